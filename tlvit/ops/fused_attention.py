"""Self-attention whose weights [N, N] stay on the chip: a Pallas kernel on TPUs, cuDNN on GPUs."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tlvit.ops.attention import attend, merge_heads, split_heads
from tlvit.shapes import Float
from tlvit.types import Array

DEFAULT_VECTOR_MEMORY = 16 * 2**20  # bytes that a kernel may use of a TPU's vector memory
LANES = 128  # channels in a register of a TPU
CUDNN_TYPES = ("bfloat16", "float16")
BATCH_AXES = ("data", "fsdp")  # axes of the mesh that divide the images


def fused_attention(qkv: Float[Array, "B N _"], num_heads: int, *, scale: float) -> Float[Array, "B N D"]:
    """Softmax attention of the tokens of an image to each other, without its weights in memory.

    The implementation is `short_attention` on TPUs and cuDNN's on GPUs for float16 and bfloat16. XLA computes
    the same formula on other platforms and in other types. The devices of a mesh each handle their images.

    Args:
      qkv: [B, N, 3 D]: query, key and value, D channels each. The channels of a head are adjacent.
      num_heads: number of heads, a divisor of D.
      scale: factor of the logits, as a rule (D / num_heads) ** -0.5.

    Returns:
      [B, N, D] in the type of `qkv`. Logits and softmax are float32.
    """
    if jax.default_backend() == "gpu" and qkv.dtype in CUDNN_TYPES:
        return _with_cudnn(qkv, num_heads, scale)
    function = lambda part: short_attention(part, num_heads, scale)
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(axis for axis in BATCH_AXES if kinds.get(axis) == jax.sharding.AxisType.Auto)
    if not axes or mesh.size == 1:
        return function(qkv)
    spec = jax.sharding.PartitionSpec(axes)  # XLA cannot divide a kernel by itself
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(qkv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def short_attention(
    qkv: Float[Array, "B N _"], num_heads: int, scale: float, interpret: bool = False
) -> Float[Array, "B N D"]:
    """Attention by a kernel for short sequences. One step of it handles an image with all heads.

    It reads `qkv` and writes the result. The logits and weights of a head stay in the chip's vector memory,
    and the forward pass saves only its input: the backward pass computes the weights P a second time. With
    the gradient G of the result O = P V it is dV = P^T G, dP = G V^T, dS = P * (dP - sum(dP * P)),
    dQ = scale * dS K and dK = scale * dS^T Q, where the sum is over the keys.

    Args:
      qkv: as in `fused_attention`.
      num_heads: number of heads.
      scale: factor of the logits.
      interpret: run the kernel in Pallas' interpreter, on any platform. Without it, platforms that are not
        TPUs compute the same by XLA.
    """
    return _forward(qkv, num_heads, scale, interpret)[0]


def _forward(qkv: Array, num_heads: int, scale: float, interpret: bool) -> tuple[Array, Array]:
    options = {"num_heads": num_heads, "scale": scale}
    kernel = functools.partial(
        _run_kernel, _forward_kernel, width=qkv.shape[-1] // 3, interpret=interpret, **options
    )
    return _choose(kernel, functools.partial(_with_xla, **options), interpret, qkv), qkv


def _backward(num_heads: int, scale: float, interpret: bool, qkv: Array, grad: Array) -> tuple[Array]:
    options = {"num_heads": num_heads, "scale": scale}
    kernel = functools.partial(
        _run_kernel, _backward_kernel, width=qkv.shape[-1], interpret=interpret, **options
    )
    plain = lambda qkv, grad: jax.vjp(functools.partial(_with_xla, **options), qkv)[1](grad)[0]
    return (_choose(kernel, plain, interpret, qkv, grad),)


short_attention.defvjp(_forward, _backward)


def _choose(kernel: Callable, plain: Callable, interpret: bool, *operands: Array) -> Array:
    """The kernel in the interpreter and on TPUs, the plain computation elsewhere."""
    return (
        kernel(*operands) if interpret else jax.lax.platform_dependent(*operands, tpu=kernel, default=plain)
    )


def _run_kernel(
    kernel: Callable, *operands: Array, width: int, num_heads: int, scale: float, interpret: bool
) -> Array:
    """Runs a kernel for every image: operands [B, N, …] -> [B, N, width]."""
    batch, tokens, _ = operands[0].shape
    image = lambda channels: pl.BlockSpec((None, tokens, channels), lambda i: (i, 0, 0))
    products = 2 if len(operands) == 1 else 5  # of matrices, forward and backward
    moved = (width + sum(x.shape[-1] for x in operands)) * tokens * operands[0].dtype.itemsize  # for an image
    # Two images are in the vector memory, and a few matrices [N, N].
    memory = max(DEFAULT_VECTOR_MEMORY, 2 * moved + 40 * tokens**2)
    return pl.pallas_call(
        functools.partial(kernel, num_heads=num_heads, scale=scale),
        grid=(batch,),
        in_specs=[image(x.shape[-1]) for x in operands],
        out_specs=image(width),
        out_shape=jax.ShapeDtypeStruct((batch, tokens, width), operands[0].dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=memory),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * tokens**2 * (operands[0].shape[-1] // 3),
            bytes_accessed=batch * moved,
            transcendentals=batch * num_heads * tokens**2,
        ),
        interpret=interpret,
    )(*operands)


def _forward_kernel(qkv_ref: Any, out_ref: Any, *, num_heads: int, scale: float) -> None:
    width = out_ref.shape[-1]

    def attend_group(channels: Callable) -> None:
        query, key, value = (qkv_ref[:, channels(part)] for part in range(3))
        outputs: list[Array] = []
        for own in _heads(query.shape[-1], width // num_heads):
            weights = _weights(query[:, own], key[:, own], scale).astype(value.dtype)
            outputs.append(_dot(weights, value[:, own], 1, 0).astype(out_ref.dtype))
        out_ref[:, channels(0)] = jnp.concatenate(outputs, axis=-1)

    _for_each_group(attend_group, width, width // num_heads)


def _backward_kernel(qkv_ref: Any, grad_ref: Any, out_ref: Any, *, num_heads: int, scale: float) -> None:
    width = grad_ref.shape[-1]

    def differentiate_group(channels: Callable) -> None:
        query, key, value = (qkv_ref[:, channels(part)] for part in range(3))
        grad = grad_ref[:, channels(0)]
        outputs = []
        for own in _heads(query.shape[-1], width // num_heads):
            weights = _weights(query[:, own], key[:, own], scale)
            grad_weights = _dot(grad[:, own], value[:, own], 1, 1)
            grad_logits = weights * (grad_weights - jnp.sum(grad_weights * weights, axis=-1, keepdims=True))
            grad_logits = (grad_logits * scale).astype(query.dtype)
            grad_query = _dot(grad_logits, key[:, own], 1, 0)
            grad_key = _dot(grad_logits, query[:, own], 0, 0)
            grad_value = _dot(weights.astype(grad.dtype), grad[:, own], 0, 0)
            outputs.append((grad_query, grad_key, grad_value))
        for part, of_heads in enumerate(zip(*outputs, strict=True)):
            out_ref[:, channels(part)] = jnp.concatenate(of_heads, axis=-1).astype(out_ref.dtype)

    _for_each_group(differentiate_group, width, width // num_heads)


def _for_each_group(function: Callable, width: int, d: int) -> None:
    """Calls `function` in a loop over groups of heads with 128 channels, as many as a register of a TPU has.

    Heads that do not fill 128 channels are one group. The argument of `function` gives the channels of the
    group in query (part 0), key (1) and value (2).
    """
    if width % LANES or LANES % d:
        function(lambda part: pl.ds(part * width, width))
    else:
        channels = lambda i, part: pl.ds(pl.multiple_of(part * width + i * LANES, LANES), LANES)
        loop = lambda i, _: function(functools.partial(channels, i))
        jax.lax.fori_loop(0, width // LANES, loop, None)


def _heads(channels: int, d: int) -> list[slice]:
    """The channels of each head in a group."""
    return [slice(start, start + d) for start in range(0, channels, d)]


def _weights(query: Array, key: Array, scale: float) -> Array:
    """softmax(scale * query @ key^T): [N, d], [N, d] -> float32 [N, N]."""
    return jax.nn.softmax(_dot(query, key, 1, 1) * scale, axis=-1)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product of two matrices over an axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _with_xla(qkv: Array, num_heads: int, scale: float) -> Array:
    parts = [split_heads(part, num_heads) for part in jnp.split(qkv, 3, axis=-1)]
    return merge_heads(attend(*parts, scale=scale))


def _with_cudnn(
    qkv: Array, num_heads: int, scale: float, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Array:
    """cuDNN's attention. Its heads have a multiple of 8 channels, so zeros are added and removed.

    With gradients JAX refuses an odd number of tokens (`check_is_flash_attention` in JAX 0.10 and 0.12 takes
    any call for one with a bias), so a token is added that the lengths leave out.
    """
    query, key, value = rearrange(qkv, "b n (t h d) -> t b n h d", t=3, h=num_heads)
    batch, n, _, d = query.shape
    padding = ((0, 0), (0, n % 2), (0, 0), (0, -d % 8))
    lengths = jnp.full(batch, n, jnp.int32) if n % 2 else None
    out = jax.nn.dot_product_attention(
        *(jnp.pad(x, padding) for x in (query, key, value)),
        scale=scale,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return rearrange(out[:, :n, :, :d], "b n h d -> b n (h d)")
