"""What the model families share: attention, MLP, transformer block, normalization, drop-path, position
embeddings.

Attribute names equal those of the published PyTorch modules, which makes conversion a renaming of leaves.
Nothing here holds random state: a call that gets a key drops, a call without a key does not.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.types import Array


class Buffer(nnx.BatchStat):
    """An array that belongs to the checkpoint but is never trained or decayed (tables, random features)."""


def linear(width_in: int, width_out: int, *, bias: bool = True, dtype=None, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer initialized as all published vision transformers: normal(0.02) and zeros."""
    return nnx.Linear(
        width_in, width_out, use_bias=bias, dtype=dtype, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
    )


def conv(
    width_in: int, width_out: int, size: int, *, stride: int = 1, padding: int = 0, groups: int = 1,
    bias: bool = True, kernel_init=None, dtype=None, rngs: nnx.Rngs,
) -> nnx.Conv:  # fmt: skip
    """Square convolution over [B, H, W, C] with torch's padding and, if nothing else is given, torch's
    default initialization."""
    bound = 1 / math.sqrt(width_in // groups * size * size)
    return nnx.Conv(
        width_in,
        width_out,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        feature_group_count=groups,
        use_bias=bias,
        dtype=dtype,
        kernel_init=kernel_init or nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound),
        rngs=rngs,
    )


def layer_norm(width: int, *, epsilon: float, dtype=None, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics; flax's default epsilon is not torch's, so it is always given."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)


class BatchNorm(nnx.Module):
    """Batch normalization over all but the last axis, with torch's conventions.

    In training the statistics are those of the whole (global) batch, computed in float32, and the running
    ones move by `momentum` towards them, the variance unbiased (torch; flax keeps the biased one).
    `nnx.view(model, use_running_average=False)` is the training mode.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, momentum: float = 0.1, dtype=None):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.mean = nnx.BatchStat(jnp.zeros((width,)))
        self.var = nnx.BatchStat(jnp.ones((width,)))
        self.epsilon, self.momentum, self.dtype = epsilon, momentum, dtype
        self.use_running_average = True

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Used by `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., C] in the compute dtype."""
        x = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            axes = tuple(range(x.ndim - 1))
            count = x.size // x.shape[-1]
            mean, var = jnp.mean(x, axes), jnp.var(x, axes)
            m = self.momentum
            self.mean[...] = (1 - m) * self.mean[...] + m * mean
            self.var[...] = (1 - m) * self.var[...] + m * var * (count / max(count - 1, 1))
        shape = (1,) * (x.ndim - 1) + (-1,)
        factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        y = x * factor.reshape(shape) + (self.bias[...] - mean * factor).reshape(shape)
        return y.astype(self.dtype) if self.dtype else y


def gelu(x: Array) -> Array:
    """The exact (erf) GELU, which all published models here use.

    Written with erf: jax.nn.gelu's erfc costs 2.7 times as much on a CPU (docs/performance.md).
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """As many keys as a layer has random parts; Nones where nothing is to be random."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes elements with probability `rate` and scales the rest; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def drop_path(x: Array, rate: float, key: Array | None) -> Array:
    """Stochastic depth (Huang et al. 2016): zeroes the whole residual branch [B, ...] of an image."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates growing linearly from 0 at the first to `rate` at the last of `depth` blocks."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_path must lie in [0, 1), not {rate}.")
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def attention_weights(query: Array, key: Array, *, scale: float) -> Array:
    """softmax(scale * q k^T) in float32: [B, heads, N, d] twice -> [B, heads, N, N]."""
    logits = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits * scale, axis=-1)


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float,
    drop_rate: float = 0.0,
    drop_key: Array | None = None,
) -> Array:
    """Attention of all families, [B, heads, N, d] -> [B, heads, N, d]: the one place for a fused kernel."""
    weights = dropout(attention_weights(query, key, scale=scale).astype(value.dtype), drop_rate, drop_key)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, value)


def split_heads(x: Array, num_heads: int) -> Array:
    """[B, N, D] -> [B, heads, N, d]."""
    batch, count, width = x.shape
    return x.reshape(batch, count, num_heads, width // num_heads).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """[B, heads, N, d] -> [B, N, D]."""
    batch, num_heads, count, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, count, num_heads * width)


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one fused qkv projection."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool, drop_rate: float = 0.0, attn_drop: float = 0.0,
          dtype=None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        if dim % num_heads:
            raise ValueError(f"Width {dim} cannot be split over {num_heads} heads.")
        self.num_heads, self.drop_rate, self.attn_drop = num_heads, drop_rate, attn_drop
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """[B, N, D] -> [B, N, D]."""
        keys = split_key(key, 2)
        x = attend(*self._heads(x), scale=self.scale, drop_rate=self.attn_drop, drop_key=keys[0])
        return dropout(self.project(merge_heads(x)), self.drop_rate, keys[1])

    def project(self, x: Array) -> Array:
        """What follows the attention, [B, N, D] -> [B, N, D]."""
        return self.proj(x)

    def weights(self, x: Array) -> Array:
        """The attention maps, float32 [B, heads, N, N]."""
        query, key, _ = self._heads(x)
        return attention_weights(query, key, scale=self.scale)

    def _heads(self, x: Array) -> list[Array]:
        """[B, N, D] -> q, k, v, [B, heads, N, d] each."""
        return [split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, axis=-1)]


class Mlp(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int, *, drop_rate: float = 0.0, dtype=None, rngs: nnx.Rngs):
        self.drop_rate = drop_rate
        self.fc1 = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """[B, N, D] -> [B, N, D]."""
        keys = split_key(key, 2)
        x = dropout(gelu(self.fc1(x)), self.drop_rate, keys[0])
        return dropout(self.fc2(x), self.drop_rate, keys[1])


class Block(nnx.Module):
    """Pre-norm transformer block; `skip_lam` divides both residual branches (LV-ViT: 2 or 3, elsewhere 1).
    `attention` and `mlp` are the classes of its two parts."""

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float, qkv_bias: bool, epsilon: float,
        skip_lam: float = 1.0, attention: type | None = None, mlp: type | None = None, drop_rate: float = 0.0,
        attn_drop: float = 0.0, drop_path: float = 0.0, dtype=None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.skip_lam, self.drop_path = skip_lam, drop_path
        self.norm1 = layer_norm(dim, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.attn = (attention or Attention)(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop=attn_drop,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = layer_norm(dim, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.mlp = (mlp or Mlp)(dim, int(dim * mlp_ratio), drop_rate=drop_rate, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """[B, N, D] -> [B, N, D]."""
        keys = split_key(key, 4)
        x = x + drop_path(self.attn(self.norm1(x), keys[0]), self.drop_path, keys[1]) / self.skip_lam
        return x + drop_path(self.mlp(self.norm2(x), keys[2]), self.drop_path, keys[3]) / self.skip_lam


def run_blocks(blocks: Sequence[nnx.Module], x: Array, key: Array | None, *, remat: bool = False) -> Array:
    """One block after the other, each with a key of its own; `remat` recomputes them in the backward pass."""
    for block, block_key in zip(blocks, split_key(key, len(blocks)), strict=True):
        x = (jax.checkpoint(block.__call__) if remat else block)(x, block_key)
    return x


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, one linear map each: [B, H, W, 3] -> [B, h, w, D]."""

    def __init__(self, dim: int, patch_size: int, *, dtype=None, rngs: nnx.Rngs):
        self.proj = conv(3, dim, patch_size, stride=patch_size, dtype=dtype, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        return self.proj(images)


def token_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(h, w) of the tokens.

    Raises:
      ValueError: the image is no multiple of the patch.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise ValueError(f"Image size {height}x{width} is no multiple of the patch size {patch_size}.")
    return height // patch_size, width // patch_size
