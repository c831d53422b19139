"""DeiT III (Touvron et al. 2022, "DeiT III: Revenge of the ViT", arXiv:2204.07118): a plain vision
transformer with LayerScale, whose class token has no position."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.models.layers import classifier, drop_path, layer_norm, split_key
from tlvit.models.transformer import Block, PatchEmbed, fuses_attention, token_grid
from tlvit.models.vit import TokenModel, check_rule
from tlvit.shapes import Float
from tlvit.types import Array, Dtype

# As published. All have MLP ratio 4 and patches of 16 pixels.
SIZES = {
    "small": {"dim": 384, "depth": 12, "num_heads": 6},
    "base": {"dim": 768, "depth": 12, "num_heads": 12},
    "large": {"dim": 1024, "depth": 24, "num_heads": 16},
}
VARIANTS = {f"deit_{size}_patch16_LS": options for size, options in SIZES.items()}  # the published names


class DeiT3(TokenModel):
    """Vision transformer with LayerScale and a class token that is added after the positions.

    `layer_scale` is the initial factor of every channel of the residual branches. All blocks have the same
    rate of drop path. `token_head` adds a head for every patch token, which token labels train. `rule` and
    `token_weight` then say how inference combines the heads (`vit.infer`).
    """

    prefix_positions = False

    def __init__(
        self, *, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, patch_size: int = 16,
        dim: int, depth: int = 12, num_heads: int, mlp_ratio: float = 4.0, layer_scale: float = 1e-4,
        token_head: bool = False, drop_rate: float = 0.0, attn_drop: float = 0.0, drop_path: float = 0.0,
        rule: str = "max", token_weight: float = 0.5, attention: str = "xla", remat: bool = False,
        scan_blocks: bool = False, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.grid = token_grid(image_size, patch_size)
        self.num_classes, self.rule, self.token_weight = num_classes, check_rule(rule), token_weight
        self.drop_rate, self.dtype = drop_rate, dtype
        self.remat, self.scan_blocks = remat, scan_blocks
        self.patch_embed = PatchEmbed(dim, patch_size, dtype=dtype, rngs=rngs)
        fused = fuses_attention(attention, attn_drop=attn_drop)
        init = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, dim)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, self.grid[0] * self.grid[1], dim)))
        self.blocks = nnx.List(
            LayerScaleBlock(
                dim, num_heads, layer_scale=layer_scale, mlp_ratio=mlp_ratio, qkv_bias=True, epsilon=1e-6,
                drop_rate=drop_rate, attn_drop=attn_drop, drop_path=drop_path, fused=fused, dtype=dtype,
                rngs=rngs,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = layer_norm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.head = classifier(dim, num_classes, dtype=dtype, rngs=rngs)
        self.aux_head = classifier(dim, num_classes, dtype=dtype, rngs=rngs) if token_head else None

    def embed_patches(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None = None
    ) -> Float[Array, "B h w D"]:
        """The stem: images to patch tokens. `key` is not used; every stem has it."""
        return self.patch_embed(images)


class LayerScaleBlock(Block):
    """A block whose residual branches are multiplied by a learned factor for each channel: LayerScale
    (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(
        self, dim: int, num_heads: int, *, layer_scale: float, dtype: Dtype = None, rngs: nnx.Rngs,
        **options: Any,
    ):  # fmt: skip
        super().__init__(dim, num_heads, dtype=dtype, rngs=rngs, **options)
        self.gamma_1 = nnx.Param(jnp.full((dim,), layer_scale))
        self.gamma_2 = nnx.Param(jnp.full((dim,), layer_scale))

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N D"]:
        keys = split_key(key, 4)
        x = self._add(x, self.gamma_1, self.attn(self.norm1(x), keys[0]), keys[1])
        return self._add(x, self.gamma_2, self.mlp(self.norm2(x), keys[2]), keys[3])

    def with_weights(
        self, x: Float[Array, "B N D"], weights: Float[Array, "B heads N N"]
    ) -> Float[Array, "B N D"]:
        """The output for given attention weights. Nothing is dropped."""
        x = self._add(x, self.gamma_1, self.attn.with_weights(self.norm1(x), weights))
        return self._add(x, self.gamma_2, self.mlp(self.norm2(x)))

    def _add(self, x: Array, gamma: nnx.Param, branch: Array, key: jax.Array | None = None) -> Array:
        scaled = gamma[...].astype(branch.dtype)[None, None, :] * branch
        return x + drop_path(scaled, self.drop_path, key) / self.skip_lam
