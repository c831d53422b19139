"""The parts of a vision transformer: patches, self-attention, MLP and the block made of both."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec

from tlvit.models.layers import Conv, drop_path, gelu, layer_norm, linear, model_axis, split_key
from tlvit.ops.attention import (
    apply_weights,
    attend,
    attention_weights,
    merge_heads,
    split_heads,
)
from tlvit.ops.dropout import dropout
from tlvit.ops.fused_attention import fused_attention
from tlvit.shapes import Float
from tlvit.types import Array, Dtype

ATTENTION = ("xla", "fused", "auto")  # implementations of the blocks' attention


class Block(nnx.Module):
    """Pre-norm transformer block: attention, then MLP, each with a residual connection.

    `skip_lam` divides both residual branches (2 or 3 in LV-ViT, 1 elsewhere). `attention` and `mlp` are the
    classes of the two parts.
    """

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float, qkv_bias: bool, epsilon: float,
        skip_lam: float = 1.0, attention: type | None = None, mlp: type | None = None, drop_rate: float = 0.0,
        attn_drop: float = 0.0, drop_path: float = 0.0, fused: bool = False, dtype: Dtype = None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.skip_lam, self.drop_path = skip_lam, drop_path
        self.norm1 = layer_norm(dim, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.attn = (attention or Attention)(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop=attn_drop,
            fused=fused,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = layer_norm(dim, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.mlp = (mlp or Mlp)(dim, int(dim * mlp_ratio), drop_rate=drop_rate, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N _"]:
        keys = split_key(key, 4)
        x = x + drop_path(self.attn(self.norm1(x), keys[0]), self.drop_path, keys[1]) / self.skip_lam
        return x + drop_path(self.mlp(self.norm2(x), keys[2]), self.drop_path, keys[3]) / self.skip_lam

    def with_weights(
        self, x: Float[Array, "B N D"], weights: Float[Array, "B heads N N"]
    ) -> Float[Array, "B N _"]:
        """The output for given attention weights. Nothing is dropped."""
        x = x + self.attn.with_weights(self.norm1(x), weights) / self.skip_lam
        return x + self.mlp(self.norm2(x)) / self.skip_lam


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762) with one projection to query, key and
    value. With `fused` its weights stay on the chip (`ops.fused_attention`)."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool, drop_rate: float = 0.0, attn_drop: float = 0.0,
        fused: bool = False, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        if dim % num_heads:
            raise ValueError(f"Width {dim} cannot be split over {num_heads} heads.")
        self.num_heads, self.drop_rate, self.attn_drop, self.fused = num_heads, drop_rate, attn_drop, fused
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N D"]:
        keys = split_key(key, 2)
        if self.fused and model_axis() == 1:
            x = fused_attention(self._project_to_qkv(x), self.num_heads, scale=self.scale)
        else:
            x = attend(*self._heads(x), scale=self.scale, drop_rate=self.attn_drop, drop_key=keys[0])
            x = merge_heads(x)
        return dropout(self.project(x), self.drop_rate, keys[1])

    def project(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """The layers after the attention. Subclasses add to it."""
        return self.proj(x)

    def weights(self, x: Float[Array, "B N D"]) -> Float[Array, "B heads N N"]:
        """The attention maps, in float32."""
        query, key, _ = self._heads(x)
        return attention_weights(query, key, scale=self.scale)

    def with_weights(
        self, x: Float[Array, "B N D"], weights: Float[Array, "B heads N N"]
    ) -> Float[Array, "B N D"]:
        """The output for given attention weights instead of its own."""
        return self.project(merge_heads(apply_weights(weights, self._heads(x)[2])))

    def _heads(self, x: Array) -> list[Array]:
        """[B, N, D] -> query, key and value, [B, heads, N, d] each."""
        if model_axis() > 1 and self.num_heads % model_axis() == 0:
            return self._parallel_heads(x)
        return self._split_heads(x)

    def _split_heads(self, x: Array) -> list[Array]:
        """`_heads` of one device."""
        return [split_heads(part, self.num_heads) for part in jnp.split(self._project_to_qkv(x), 3, axis=-1)]

    def _project_to_qkv(self, x: Array) -> Array:
        """[B, N, D] -> [B, N, 3 D]."""
        return self.qkv(x)

    def _parallel_heads(self, x: Array) -> list[Array]:
        """`_heads` if the heads are split over the axis `model` of the device mesh.

        Devices exchange columns of the kernel before the product. That moves less than the product, in which
        the heads of query, key and value are not adjacent.
        """
        x, kernel, bias = self.qkv.promote_dtype(
            (x, self.qkv.kernel[...], None if self.qkv.bias is None else self.qkv.bias[...]),
            dtype=self.qkv.dtype,
        )
        kernel = rearrange(kernel, "i (t h d) -> i t h d", t=3, h=self.num_heads)
        kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec(None, None, "model", None))
        heads = jnp.einsum("bni,ithd->tbhnd", x, kernel)
        if bias is not None:
            heads += rearrange(bias, "(t h d) -> t 1 h 1 d", t=3, h=self.num_heads)
        return list(heads)


class Mlp(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int, *, drop_rate: float = 0.0, dtype: Dtype = None, rngs: nnx.Rngs):
        self.drop_rate = drop_rate
        self.fc1 = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N D"]:
        keys = split_key(key, 2)
        x = dropout(gelu(self.fc1(x)), self.drop_rate, keys[0])
        return dropout(self.fc2(x), self.drop_rate, keys[1])


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, each mapped to D channels by one linear layer."""

    def __init__(self, dim: int, patch_size: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        self.proj = Conv(3, dim, patch_size, stride=patch_size, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        return self.proj(images)


def fuses_attention(attention: str, *, attn_drop: float) -> bool:
    """Whether the blocks use `fused_attention`.

    Args:
      attention: "xla", "fused", or "auto": "fused" on a TPU or GPU without dropout of the weights.
      attn_drop: dropout of the attention weights.

    Raises:
      ValueError: "fused" with dropout of the weights, which it does not have, or another value.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, not {attention!r}.")
    if attention == "fused" and attn_drop:
        raise ValueError(f'attention="fused" has no dropout of the weights, but attn_drop is {attn_drop}.')
    return attention == "fused" or (
        attention == "auto" and not attn_drop and jax.default_backend() in ("tpu", "gpu")
    )


MAX_TOKENS = 65_536  # 4096x4096 pixels in patches of 16; their attention map has 4 billion values


def token_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image.

    Args:
      image_size: pixels, one number for a square or (height, width).
      patch_size: side of a patch, pixels.

    Returns:
      (h, w).

    Raises:
      ValueError: the image size is not a multiple of the patch size, or has more than MAX_TOKENS patches.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise ValueError(f"Image size {height}x{width} is not a multiple of the patch size {patch_size}.")
    h, w = height // patch_size, width // patch_size
    if h * w > MAX_TOKENS:
        raise ValueError(
            f"Image size {height}x{width} with patches of {patch_size} gives {h}x{w} = {h * w:,} tokens; the "
            f"limit is {MAX_TOKENS:,}."
        )
    return h, w
