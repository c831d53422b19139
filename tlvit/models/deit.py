"""DeiT (Touvron et al. 2021, "Training data-efficient image transformers", arXiv:2012.12877): a plain vision
transformer, optionally with a distillation token."""

import jax
from flax import nnx

from tlvit.models.layers import classifier, drop_path_rates, layer_norm
from tlvit.models.transformer import Block, PatchEmbed, fuses_attention, token_grid
from tlvit.models.vit import TokenModel, check_rule
from tlvit.shapes import Float
from tlvit.types import Array, Dtype

# Widths and heads as published. All have 12 blocks, MLP ratio 4 and patches of 16 pixels.
SIZES = {
    "tiny": {"dim": 192, "num_heads": 3},
    "small": {"dim": 384, "num_heads": 6},
    "base": {"dim": 768, "num_heads": 12},
}
VARIANTS = {
    f"deit_{size}{infix}_patch16_{image_size}": {
        **SIZES[size],
        "distilled": bool(infix),
        "image_size": image_size,
    }
    for size, image_size in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
    for infix in ("", "_distilled")
}


class DeiT(TokenModel):
    """Vision transformer with a class token and, if `distilled`, a distillation token with its own head.

    The logits of a distilled model are the mean of its two heads. `token_head` adds a head for every patch
    token, which token labels train. `rule` and `token_weight` then say how inference combines the heads
    (`vit.infer`).
    """

    def __init__(
        self, *, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, patch_size: int = 16,
        dim: int, depth: int = 12, num_heads: int, mlp_ratio: float = 4.0, distilled: bool = False,
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
        self.dist_token = nnx.Param(init(rngs.params(), (1, 1, dim))) if distilled else None
        count = 1 + distilled + self.grid[0] * self.grid[1]
        self.pos_embed = nnx.Param(init(rngs.params(), (1, count, dim)))
        self.blocks = nnx.List(
            Block(
                dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, epsilon=1e-6, drop_rate=drop_rate,
                attn_drop=attn_drop, drop_path=rate, fused=fused, dtype=dtype, rngs=rngs,
            )
            for rate in drop_path_rates(drop_path, depth)
        )  # fmt: skip
        self.norm = layer_norm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.head = classifier(dim, num_classes, dtype=dtype, rngs=rngs)
        self.head_dist = classifier(dim, num_classes, dtype=dtype, rngs=rngs) if distilled else None
        self.aux_head = classifier(dim, num_classes, dtype=dtype, rngs=rngs) if token_head else None

    def embed_patches(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None = None
    ) -> Float[Array, "B h w D"]:
        """The stem: images to patch tokens."""
        return self.patch_embed(images)
