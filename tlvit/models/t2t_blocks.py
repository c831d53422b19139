"""The block designs from convolutional networks that T2T-ViT (Yuan et al. 2021, arXiv:2101.11986) compares:
squeeze-and-excitation, ghost and dense."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from tlvit.models.layers import drop_path_rates, gelu, linear, split_key
from tlvit.models.transformer import Attention, Block, Mlp
from tlvit.ops.dropout import dropout
from tlvit.shapes import Float
from tlvit.types import Array, Dtype


def make_blocks(
    kind: str, dim: int, num_heads: int, *, depth: int | Sequence[int], growth: int, drop_path: float,
    **options: Any,
) -> tuple[list[nnx.Module], int]:  # fmt: skip
    """Builds the blocks of a T2T-ViT.

    Args:
      kind: "plain", "se", "ghost" or "dense".
      dim: width of the first block's input.
      num_heads: attention heads of every block.
      depth: number of blocks; if the kind is "dense", a tuple with the number of blocks in each stage.
      growth: channels that every dense block appends.
      drop_path: rate of the last block, in [0, 1). The rates grow linearly from 0.
      **options: further options of every `Block`.

    Returns:
      The blocks, and the width of the last block's output.

    Raises:
      ValueError: the kind is unknown or does not fit the depth.
    """
    if kind not in (*PARTS, "dense"):
        raise ValueError(f"block must be one of {', '.join([*PARTS, 'dense'])}, not {kind!r}.")
    if isinstance(depth, int) == (kind == "dense"):
        raise ValueError(f"depth must be {'a tuple' if kind == 'dense' else 'a number'}, not {depth!r}.")
    if isinstance(depth, int):
        attention, mlp = PARTS[kind]
        make = functools.partial(Block, dim, num_heads, attention=attention, mlp=mlp, **options)
        return [make(drop_path=rate) for rate in drop_path_rates(drop_path, depth)], dim
    blocks: list[nnx.Module] = []
    # As published, all blocks of stage i have the rate of the i-th of 12 blocks.
    for rate, count in zip(drop_path_rates(drop_path, 12), depth, strict=False):
        if blocks:
            blocks.append(Transition(dim, dtype=options["dtype"], rngs=options["rngs"]))
            dim //= 2
        for _ in range(count):
            blocks.append(DenseBlock(dim, num_heads, growth=growth, drop_path=rate, **options))
            dim += growth
    return blocks, dim


class SqueezeExciteAttention(Attention):
    """Attention with squeeze-and-excitation of its output channels."""

    def __init__(self, dim: int, num_heads: int, *, dtype: Dtype = None, rngs: nnx.Rngs, **options: Any):
        super().__init__(dim, num_heads, dtype=dtype, rngs=rngs, **options)
        self.se_layer = TokenGate(dim, dim // 16, dtype=dtype, rngs=rngs)

    def project(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """The projection and the gates."""
        return self.se_layer(self.proj(x))


class TokenGate(nnx.Module):
    """Squeeze-and-excitation over tokens (Hu et al. 2018, arXiv:1709.01507), without biases."""

    def __init__(self, dim: int, squeezed: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        options = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.fc = nnx.List([linear(dim, squeezed, **options), jax.nn.relu, linear(squeezed, dim, **options)])

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        gate = jnp.mean(x, axis=1, keepdims=True, dtype=jnp.float32)
        for layer in self.fc:
            gate = layer(gate)
        return x * jax.nn.sigmoid(gate).astype(x.dtype)


class ChannelScale(nnx.Module):
    """Multiplies every channel by a learned factor: the "cheap operation" of GhostNet, a depthwise 1x1
    convolution in PyTorch."""

    def __init__(self, dim: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        self.dtype = dtype
        self.scale = nnx.Param(jax.random.uniform(rngs.params(), (dim, 1, 1), minval=-1.0, maxval=1.0))

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return x * rearrange(self.scale[...], "d 1 1 -> 1 1 d").astype(x.dtype)


class GhostAttention(Attention):
    """Attention with ghost projections (Han et al. 2020, GhostNet, arXiv:1911.11907).

    One half of the channels of query, key and value is projected. The other half is a scaled copy of it.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool, drop_rate: float = 0.0, attn_drop: float = 0.0,
        fused: bool = False, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        if dim % num_heads or dim % 2:
            raise ValueError(f"Width {dim} cannot be halved or split over {num_heads} heads.")
        self.num_heads, self.drop_rate, self.attn_drop, self.fused = num_heads, drop_rate, attn_drop, fused
        self.scale = (dim // num_heads) ** -0.5
        for name in "qkv":
            setattr(self, name, linear(dim, dim // 2, bias=qkv_bias, dtype=dtype, rngs=rngs))
            setattr(self, f"cheap_operation_{name}", ChannelScale(dim // 2, dtype=dtype, rngs=rngs))
        self.proj = linear(dim, dim, dtype=dtype, rngs=rngs)

    def _project_to_qkv(self, x: Array) -> Array:
        """[B, N, D] -> [B, N, 3 D]."""
        parts = []
        for name in "qkv":
            half = getattr(self, name)(x)
            parts += [half, getattr(self, f"cheap_operation_{name}")(half)]
        return jnp.concatenate(parts, axis=-1)

    def _parallel_heads(self, x: Array) -> list[Array]:
        """Every device of the axis `model` projects all heads."""
        return self._split_heads(x)


class GhostMlp(nnx.Module):
    """MLP of ratio 3. The second and third part of its hidden layer are computed from the first, scaled."""

    def __init__(self, dim: int, hidden: int, *, drop_rate: float = 0.0, dtype: Dtype = None, rngs: nnx.Rngs):
        if hidden != 3 * dim:
            raise ValueError(f"The ghost MLP has ratio 3: a hidden width of {3 * dim}, not {hidden}.")
        self.drop_rate = drop_rate
        self.fc1 = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, dim, dtype=dtype, rngs=rngs)
        self.cheap_operation2 = ChannelScale(dim, dtype=dtype, rngs=rngs)
        self.cheap_operation3 = ChannelScale(dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N D"]:
        keys = split_key(key, 2)
        x = gelu(self.fc1(x))
        x = jnp.concatenate([x, gelu(self.cheap_operation2(x)), gelu(self.cheap_operation3(x))], axis=-1)
        return dropout(self.fc2(dropout(x, self.drop_rate, keys[0])), self.drop_rate, keys[1])


class DenseBlock(Block):
    """A block that appends `growth` channels to its input."""

    def __init__(
        self, dim: int, num_heads: int, *, growth: int, dtype: Dtype = None, rngs: nnx.Rngs, **options: Any
    ):
        super().__init__(dim, num_heads, dtype=dtype, rngs=rngs, **options)
        self.dense_linear = linear(dim, growth, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N _"]:
        """Returns [B, N, D + growth]."""
        return jnp.concatenate([x, self.dense_linear(super().__call__(x, key))], axis=-1)

    def with_weights(
        self, x: Float[Array, "B N D"], weights: Float[Array, "B heads N N"]
    ) -> Float[Array, "B N _"]:
        """[B, N, D + growth] for given attention weights. Nothing is dropped."""
        return jnp.concatenate([x, self.dense_linear(super().with_weights(x, weights))], axis=-1)


class Transition(nnx.Module):
    """Halves the channels between two dense stages."""

    def __init__(self, dim: int, *, dtype: Dtype = None, rngs: nnx.Rngs):
        self.linear = linear(dim, dim // 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], key: jax.Array | None = None) -> Float[Array, "B N _"]:
        """Returns [B, N, D / 2]. `key` is not used; every block has it."""
        return gelu(self.linear(x))


# The classes of a block's attention and MLP.
PARTS: dict[str, tuple[type, type]] = {
    "plain": (Attention, Mlp),
    "se": (SqueezeExciteAttention, Mlp),
    "ghost": (GhostAttention, GhostMlp),
}
