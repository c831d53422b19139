"""LV-ViT (Jiang et al. 2021, "All Tokens Matter", arXiv:2104.10858): a vision transformer with a
convolutional stem and a token head."""

import jax
from flax import nnx

from tlvit.models.batch_norm import BatchNorm
from tlvit.models.layers import Conv, classifier, drop_path_rates, layer_norm
from tlvit.models.transformer import Block, PatchEmbed, fuses_attention, token_grid
from tlvit.models.vit import TokenModel, check_rule
from tlvit.shapes import Float
from tlvit.types import Array, Dtype

# As published: width / depth / heads, stem width, residual scale. All have MLP ratio 3 and 16-pixel patches.
S = {"dim": 384, "depth": 16, "num_heads": 6}
VARIANTS = {
    "lvvit_t": {"dim": 240, "depth": 12, "num_heads": 4, "stem_width": 64, "skip_lam": 1.0},
    "lvvit_s": {**S, "stem_width": 64, "skip_lam": 2.0},
    "lvvit_m": {"dim": 512, "depth": 20, "num_heads": 8, "stem_width": 64, "skip_lam": 2.0},
    "lvvit_l": {"dim": 768, "depth": 24, "num_heads": 12, "stem_width": 128, "skip_lam": 3.0},
    # The paper's baselines: a plain ViT of the size of S, and S without token head.
    "vit": {**S, "stem_width": None, "skip_lam": 1.0, "token_head": False},
    "lvvit": {**S, "stem_width": 64, "skip_lam": 2.0, "token_head": False},
}


class ConvStem(nnx.Module):
    """Three convolutions with BatchNorm at half resolution, then patches."""

    def __init__(self, dim: int, patch_size: int, width: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        if patch_size % 2:
            raise ValueError(
                f"The convolutional stem has stride 2, so the patch size must be even, not {patch_size}."
            )
        self.conv1 = Conv(3, width, 7, stride=2, padding=3, bias=False, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, dtype=dtype)
        self.conv2 = Conv(width, width, 3, padding=1, bias=False, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(width, dtype=dtype)
        self.conv3 = Conv(width, width, 3, padding=1, bias=False, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(width, dtype=dtype)
        self.proj = Conv(width, dim, patch_size // 2, stride=patch_size // 2, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        x = jax.nn.relu(self.bn1(self.conv1(images)))
        x = jax.nn.relu(self.bn2(self.conv2(x)))
        x = jax.nn.relu(self.bn3(self.conv3(x)))
        return self.proj(x)


class LVViT(TokenModel):
    """Vision transformer with a head for every patch token.

    `rule` and `token_weight` say how inference combines the heads (`vit.infer`); the published rule is "max"
    with 0.5. Without `stem_width` the stem is one linear layer for each patch. Without `token_head` the
    logits are those of the class token.
    """

    def __init__(
        self, *, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, patch_size: int = 16,
        dim: int, depth: int, num_heads: int, mlp_ratio: float = 3.0, stem_width: int | None, skip_lam: float,
        token_head: bool = True, drop_rate: float = 0.0, attn_drop: float = 0.0, drop_path: float = 0.0,
        rule: str = "max", token_weight: float = 0.5, attention: str = "xla", remat: bool = False,
        scan_blocks: bool = False, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.grid = token_grid(image_size, patch_size)
        self.num_classes, self.rule, self.token_weight = num_classes, check_rule(rule), token_weight
        self.drop_rate, self.dtype = drop_rate, dtype
        self.remat, self.scan_blocks = remat, scan_blocks
        if stem_width:
            self.patch_embed = ConvStem(dim, patch_size, stem_width, dtype=dtype, rngs=rngs)
        else:
            self.patch_embed = PatchEmbed(dim, patch_size, dtype=dtype, rngs=rngs)
        fused = fuses_attention(attention, attn_drop=attn_drop)
        init = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, dim)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, 1 + self.grid[0] * self.grid[1], dim)))
        self.blocks = nnx.List(
            Block(
                dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=False, epsilon=1e-5, skip_lam=skip_lam,
                drop_rate=drop_rate, attn_drop=attn_drop, drop_path=rate, fused=fused, dtype=dtype, rngs=rngs,
            )
            for rate in drop_path_rates(drop_path, depth)
        )  # fmt: skip
        self.norm = layer_norm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.head = classifier(dim, num_classes, dtype=dtype, rngs=rngs)
        self.aux_head = classifier(dim, num_classes, dtype=dtype, rngs=rngs) if token_head else None

    def embed_patches(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None = None
    ) -> Float[Array, "B h w D"]:
        """The stem: images to patch tokens."""
        return self.patch_embed(images)
