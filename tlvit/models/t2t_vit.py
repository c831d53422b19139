"""T2T-ViT (Yuan et al. 2021, "Tokens-to-Token ViT", arXiv:2101.11986): a stem of overlapping neighborhoods
with attention, then a deep and narrow transformer."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from tlvit.models.layers import Buffer, classifier, gelu, layer_norm, linear, split_key
from tlvit.models.t2t_blocks import make_blocks
from tlvit.models.transformer import Mlp, fuses_attention, token_grid
from tlvit.models.vit import TokenModel, check_rule
from tlvit.ops.attention import attend, performer_attention
from tlvit.ops.dropout import dropout
from tlvit.shapes import Float
from tlvit.types import Array, Dtype


def _size(dim: int, depth: int | tuple[int, ...], num_heads: int, mlp_ratio: float, **more: Any) -> dict:
    return {"dim": dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, **more}


# As published: width, depth, heads, MLP ratio.
VARIANTS = {
    "t2t_vit_7": _size(256, 7, 4, 2.0),
    "t2t_vit_10": _size(256, 10, 4, 2.0),
    "t2t_vit_12": _size(256, 12, 4, 2.0),
    "t2t_vit_14": _size(384, 14, 6, 3.0),
    "t2t_vit_19": _size(448, 19, 7, 3.0),
    "t2t_vit_24": _size(512, 24, 8, 3.0),
    "t2t_vit_t_14": _size(384, 14, 6, 3.0, tokens="transformer"),
    "t2t_vit_t_19": _size(448, 19, 7, 3.0, tokens="transformer"),
    "t2t_vit_t_24": _size(512, 24, 8, 3.0, tokens="transformer"),
    # The paper's comparison of block designs known from convolutional networks.
    "t2t_vit_14_resnext": _size(384, 14, 32, 3.0),
    "t2t_vit_14_wide": _size(768, 4, 12, 3.0),
    "t2t_vit_14_se": _size(384, 14, 6, 3.0, block="se"),
    "t2t_vit_16_ghost": _size(384, 16, 6, 3.0, block="ghost"),
    "t2t_vit_dense": _size(128, (3, 6, 6, 4), 8, 2.0, block="dense"),
}


class T2TViT(TokenModel):
    """Vision transformer with a tokens-to-token stem and fixed sinusoidal positions.

    `block` is "plain", "se" (squeeze-and-excitation after the attention), "ghost" (half of every projection
    is a scaled copy of the other half) or "dense" (every block appends `growth` channels, and `depth` is a
    tuple with the depth of each stage). `tokens` is the attention of the stem, "performer" or "transformer".
    `token_head` adds a head for every patch token. `rule` and `token_weight` then say how inference combines
    the heads (`vit.infer`).
    """

    def __init__(
        self, *, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, dim: int,
        depth: int | tuple[int, ...], num_heads: int, mlp_ratio: float, tokens: str = "performer",
        block: str = "plain", growth: int = 64, token_head: bool = False, token_drop: float = 0.1,
        drop_rate: float = 0.0, attn_drop: float = 0.0, drop_path: float = 0.0, rule: str = "max",
        token_weight: float = 0.5, attention: str = "xla", remat: bool = False, scan_blocks: bool = False,
        dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.grid = token_grid(image_size, 16)
        self.num_classes, self.rule, self.token_weight = num_classes, check_rule(rule), token_weight
        self.drop_rate, self.dtype = drop_rate, dtype
        self.remat, self.scan_blocks = remat, scan_blocks
        self.tokens_to_token = TokensToToken(dim, tokens, drop_rate=token_drop, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, dim)))
        self.pos_embed = Buffer(jnp.asarray(sinusoid_table(1 + self.grid[0] * self.grid[1], dim)))
        blocks, dim = make_blocks(
            block, dim, num_heads, depth=depth, growth=growth, drop_path=drop_path, mlp_ratio=mlp_ratio,
            qkv_bias=False, epsilon=1e-5, drop_rate=drop_rate, attn_drop=attn_drop,
            fused=fuses_attention(attention, attn_drop=attn_drop), dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.blocks = nnx.List(blocks)
        self.norm = layer_norm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.head = classifier(dim, num_classes, dtype=dtype, rngs=rngs)
        self.aux_head = classifier(dim, num_classes, dtype=dtype, rngs=rngs) if token_head else None

    def embed_patches(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None = None
    ) -> Float[Array, "B h w D"]:
        """The stem: images to patch tokens. `key` is the PRNG key of the Performer's dropout."""
        return self.tokens_to_token(images, key)


def sinusoid_table(count: int, dim: int) -> Float[np.ndarray, "1 {count} {dim}"]:
    """Fixed positions (Vaswani et al. 2017, arXiv:1706.03762) of `count` tokens. The class token has position
    0.

    Returns:
      float32: channels 2i and 2i + 1 are sin and cos of position / 10000^(2i / dim), computed in float64.
    """
    angle = np.arange(count)[:, None] / 10000.0 ** (2 * (np.arange(dim) // 2) / dim)[None, :]
    table = np.where(np.arange(dim)[None, :] % 2, np.cos(angle), np.sin(angle))
    return table[None].astype(np.float32)


def soft_split(x: Float[Array, "B H W C"], size: int, stride: int) -> Float[Array, "B h w _"]:
    """Gathers overlapping neighborhoods of size x size cells, zero-padded at the border.

    Returns:
      [B, H / stride, W / stride, C * size * size] in the order (C, size, size) of PyTorch's `unfold`.
    """
    padding = (size - stride + 1) // 2
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    h, w = ((side - size) // stride + 1 for side in x.shape[1:3])
    along = lambda y, axis, count: jnp.stack(
        [jax.lax.slice_in_dim(y, i, i + stride * (count - 1) + 1, stride, axis) for i in range(size)], axis=-1
    )
    return rearrange(along(along(x, 1, h), 2, w), "b h w c i j -> b h w (c i j)")


class TokensToToken(nnx.Module):
    """Three soft splits with attention between them. The overall stride is 16."""

    def __init__(
        self, dim: int, tokens: str, *, width: int = 64, drop_rate: float = 0.1, dtype: Dtype = None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        if tokens not in ("performer", "transformer"):
            raise ValueError(f"tokens must be performer or transformer, not {tokens!r}.")
        attention = TokenTransformer
        if tokens == "performer":
            attention = functools.partial(TokenPerformer, drop_rate=drop_rate)
        self.attention1 = attention(3 * 7 * 7, width, dtype=dtype, rngs=rngs)
        self.attention2 = attention(width * 3 * 3, width, dtype=dtype, rngs=rngs)
        self.project = linear(width * 3 * 3, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: Float[Array, "B H W 3"], key: jax.Array | None = None
    ) -> Float[Array, "B h w D"]:
        keys = split_key(key, 2)
        x = self._attend(self.attention1, soft_split(images, 7, 4), keys[0])
        x = self._attend(self.attention2, soft_split(x, 3, 2), keys[1])
        return self.project(soft_split(x, 3, 2))

    def _attend(self, attention: nnx.Module, x: Array, key: jax.Array | None) -> Array:
        tokens = attention(rearrange(x, "b h w d -> b (h w) d"), key)
        return rearrange(tokens, "b (h w) d -> b h w d", h=x.shape[1])


class TokenTransformer(nnx.Module):
    """Transformer block with one head, from D to `width` channels. Its residual starts at the values."""

    def __init__(self, dim: int, width: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.attn = NarrowingAttention(dim, width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N width"]:
        """`key` is not used. `TokenPerformer` has the same signature."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NarrowingAttention(nnx.Module):
    """Attention of one head from D to `width` channels, plus the values."""

    def __init__(self, dim: int, width: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        self.scale = dim**-0.5  # by the input width, as published
        self.qkv = linear(dim, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N width"]:
        query, key, value = jnp.split(self.qkv(x)[:, None], 3, axis=-1)
        return (value + self.proj(attend(query, key, value, scale=self.scale)))[:, 0]


class TokenPerformer(nnx.Module):
    """As TokenTransformer, with the linear attention of the Performer (Choromanski et al. 2020,
    arXiv:2009.14794)."""

    def __init__(self, dim: int, width: int, *, drop_rate: float, dtype: Dtype = None, rngs: nnx.Rngs):
        self.drop_rate = drop_rate
        self.kqv = linear(dim, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mlp = nnx.List(
            [linear(width, width, dtype=dtype, rngs=rngs), gelu, linear(width, width, dtype=dtype, rngs=rngs)]
        )
        # width / 2 orthogonal random features, which are not trained.
        init = nnx.initializers.orthogonal(scale=math.sqrt(width // 2))
        self.w = Buffer(init(rngs.params(), (width // 2, width)))

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N width"]:
        """`key` is the PRNG key of the dropout."""
        keys = split_key(key, 2)
        # The published order of the projection is key, query, value.
        attention_key, query, value = jnp.split(self.kqv(self.norm1(x)), 3, axis=-1)
        y = performer_attention(query, attention_key, value, self.w[...]).astype(value.dtype)
        x = value + dropout(self.proj(y), self.drop_rate, keys[0])
        y = self.norm2(x)
        for layer in self.mlp:
            y = layer(y)
        return x + dropout(y, self.drop_rate, keys[1])
