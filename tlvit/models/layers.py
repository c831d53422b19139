"""Layers and functions that all model families use: linear layers, convolutions, GELU, drop-path.

Parameter names equal those of the published PyTorch modules, so that a conversion only renames leaves. No
layer holds random state: a call with a PRNG key drops, a call without a key does not.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive
from jax.sharding import AxisType

from tlvit.ops.convolution import convolve
from tlvit.ops.dropout import dropout
from tlvit.shapes import Float, Float32
from tlvit.types import Array, Dtype, PyTree

KERNELS = (
    "pallas_call",
    "dot_product_attention_fwd_wrapper",
)  # names of JAX; the second is cuDNN's attention


class Buffer(nnx.BatchStat):
    """An array of the checkpoint that is not trained: position tables and random features."""


def linear(
    width_in: int, width_out: int, *, bias: bool = True, dtype: Dtype = None, rngs: nnx.Rngs
) -> nnx.Linear:
    """Linear layer with the initialization of the published vision transformers: normal(0.02), bias 0.

    Raises:
      ValueError: a width below 1.
    """
    check_widths(width_in, width_out)
    return nnx.Linear(
        width_in, width_out, use_bias=bias, dtype=dtype, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
    )


def classifier(width: int, num_classes: int, *, dtype: Dtype = None, rngs: nnx.Rngs) -> nnx.Linear:
    """A `linear` layer whose results are float32 whatever its type: logits.

    The products are summed in float32 and not rounded to `dtype` afterwards.
    """
    layer = linear(width, num_classes, dtype=dtype, rngs=rngs)
    layer.preferred_element_type = jnp.float32
    return layer


def layer_norm(width: int, *, epsilon: float, dtype: Dtype = None, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics. Flax and PyTorch differ in their default epsilon, so it is
    required."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)


class Conv(nnx.Conv):
    """Square convolution of [B, H, W, C] with PyTorch's padding and, by default, PyTorch's initialization."""

    def __init__(
        self, width_in: int, width_out: int, size: int, *, stride: int = 1, padding: int = 0, groups: int = 1,
        bias: bool = True, kernel_init: nnx.Initializer | None = None, dtype: Dtype = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_widths(width_in, width_out)
        bound = 1 / math.sqrt(width_in // groups * size * size)
        uniform = lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
        super().__init__(
            width_in,
            width_out,
            (size, size),
            strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            feature_group_count=groups,
            use_bias=bias,
            dtype=dtype,
            kernel_init=kernel_init or nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            bias_init=uniform,
            conv_general_dilated=convolve,
            rngs=rngs,
        )


def check_widths(*widths: int) -> None:
    """Raises ValueError if a layer would have no channels: the options of its model exclude each other."""
    if min(widths) < 1:
        raise ValueError(f"A layer of widths {', '.join(map(str, widths))}: every layer needs a channel.")


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), which all published models use.

    It is written with erf because the erfc of jax.nn.gelu takes 2.7 times as long on a CPU
    (docs/performance.md).
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def drop_path(
    x: Float[Array, "B ..."], rate: float | Float32[Array, ""], key: jax.Array | None
) -> Float[Array, "B ..."]:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382).

    Args:
      x: output of a residual branch.
      rate: probability in [0, 1) with which the branch of an image is set to zero; an array in a loop.
      key: PRNG key. Nothing is dropped without one.

    Returns:
      An array of the shape and type of `x`. The branches that are kept are divided by 1 - rate.
    """
    return dropout(x, rate, key, axes=(0,))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates that grow linearly from 0 in the first of `depth` blocks to `rate` in the last.

    Raises:
      ValueError: the rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_path must be in [0, 1), not {rate}.")
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def model_axis() -> int:
    """The size of the axis `model` of the device mesh, over which a model is split; 1 without one.

    A program sets the mesh with `jax.sharding.use_abstract_mesh` (`tlvit.training.mesh.mesh_context`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [
        axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto
    ]
    return mesh.shape["model"] if "model" in automatic else 1


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Splits a PRNG key into `count` keys. Without a key, `count` times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def run_blocks(
    blocks: Sequence[nnx.Module], x: Array, key: jax.Array | None, *, remat: bool = False, scan: bool = False
) -> Array:
    """Applies the blocks one after the other, each with its own key.

    Args:
      blocks: the blocks, `block(x, key)`.
      x: input of the first one.
      key: PRNG key, or None. Nothing is dropped without one.
      remat: the backward pass computes the activations of each block again, to save memory.
      scan: successive blocks that differ in their arrays and drop-path rates only are one loop of the
        program: less to compile, and attention logits are not kept for the backward pass. Results are the
        same, except for rounding.

    Returns:
      The output of the last block.
    """
    return run_part(blocks, x, split_key(key, len(blocks)), remat=remat, scan=scan)


def run_part(
    blocks: Sequence[nnx.Module], x: Array, keys: Sequence[jax.Array | None], *, remat: bool, scan: bool
) -> Array:
    """As `run_blocks`, with one key for each block."""
    pairs = list(zip(blocks, keys, strict=True))
    runs = itertools.groupby(pairs, lambda pair: _split_block(pair[0])[0]) if scan else [(None, pairs)]
    for graph, run in runs:
        run = list(run)
        if graph is not None and len(run) > 1:
            x = _run_loop(graph, x, run, remat=remat)
        else:
            for block, key in run:
                x = run_block(block, x, key, remat=remat)
    return x


def run_block(block: nnx.Module, x: Array, key: jax.Array | None, *, remat: bool = False) -> Array:
    """Applies one block. With `remat` the backward pass computes its activations again, to save memory."""
    return (jax.checkpoint(block.__call__) if remat else block)(x, key)


def _split_block(block: nnx.Module) -> tuple[nnx.GraphDef, PyTree]:
    """(what the blocks of one loop have in common, arrays)."""
    block = nnx.clone(block)
    block.drop_path = 0.0  # the loop sets it
    graph, params = nnx.split(block, nnx.Param)
    return graph, nnx.to_pure_dict(params)


def _run_loop(
    graph: nnx.GraphDef, x: Array, run: Sequence[tuple[nnx.Module, jax.Array | None]], *, remat: bool
) -> Array:
    """Applies blocks of one structure as a loop over their stacked arrays, rates and keys."""
    rates = [getattr(block, "drop_path", 0.0) for block, _ in run]

    def step(x: Array, inputs: tuple[PyTree, Array, jax.Array | None]) -> tuple[Array, None]:
        params, rate, key = inputs
        block = nnx.merge(graph, params)
        if any(rates):
            block.drop_path = rate
        return block(x, key), None

    stack = lambda *arrays: jnp.stack(arrays)
    params = jax.tree.map(stack, *(_split_block(block)[1] for block, _ in run))
    keys = None if run[0][1] is None else stack(*(key for _, key in run))
    step = jax.checkpoint(step, prevent_cse=False, policy=None if remat else _is_kept)
    return jax.lax.scan(step, x, (params, jnp.array(rates, jnp.float32), keys))[0]


def _is_kept(primitive: Primitive, *operands: Any, **options: Any) -> bool:
    """Whether a loop keeps the result of an operation for the backward pass.

    It keeps the results of kernels, and matrix products, but not the logits of attention: [N, N] in float32
    are larger than query and key. The rest is computed again, which XLA also does, by fusion, for blocks that
    are not in a loop.
    """
    if primitive.name != "dot_general":
        return primitive.name in KERNELS
    (_, contracted), (_, batch) = options["dimension_numbers"]
    size = lambda axes: math.prod(operands[1].shape[axis] for axis in axes)
    columns = operands[1].size // size(batch) // size(contracted)
    return not batch or columns <= size(contracted)
