"""Compiles attention alone, forward and backward, and prints its costs, one JSON line for each kind.

    python -m scripts.benchmark attention --topology=v5e:1x1 --tokens=197 --heads=6
    python -m scripts.benchmark attention --topology=v5e:1x1 --tokens=785,1025 --heads=12 --images=32

The kinds: `xla` is the attention of the models, `fused` the kernel of tlvit/ops/fused_attention.py. `flash`
and `splash` are kernels that come with JAX (jax.experimental.pallas.ops.tpu); they get tokens padded to a
multiple of 128. The input is a block's [images, tokens, 3 * width] in bfloat16, query, key and value, and the
gradient has the same layout, so changes of layout count. Figures are for an image. An operand of a kernel
counts once, although flash and splash attention read keys and values again for each block of queries.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention, splash_attention

from scripts.program_costs import program_costs, topology_devices
from tlvit.ops.attention import attend, merge_heads, split_heads
from tlvit.ops.fused_attention import short_attention
from tlvit.training.mesh import batch_sharding, make_mesh
from tlvit.types import Array

BLOCK = 128  # tokens of a block of JAX's kernels


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    mesh = make_mesh(topology_devices(options.topology)) if options.topology else make_mesh(jax.devices()[:1])
    for tokens in map(int, options.tokens.split(",")):
        for kind in options.kinds.split(","):
            function = lambda qkv, kind=kind: KINDS[kind](qkv, options.heads)
            run = jax.jit(lambda qkv, grad, function=function: _with_gradient(function, qkv, grad))
            width, place = options.head_width * options.heads, batch_sharding(mesh)
            shapes = [
                jax.ShapeDtypeStruct((options.images, tokens, channels), jnp.bfloat16, sharding=place)
                for channels in (3 * width, width)
            ]
            start = time.process_time()
            compiled = run.lower(*shapes).compile()
            cpu = time.process_time() - start
            costs = program_costs(compiled, mesh, options.images)
            figures = {name: costs[name] for name in ("device", "hbm_bytes_per_image", "temp_bytes")}
            print(json.dumps({"kind": kind, "tokens": tokens, **figures, "compile_cpu_s": cpu}), flush=True)
    return 0


def _with_gradient(function: Callable[[Array], Array], qkv: Array, grad: Array) -> tuple[Array, Array]:
    out, vjp = jax.vjp(function, qkv)
    return out, vjp(grad)[0]


def _xla(qkv: Array, heads: int) -> Array:
    return merge_heads(attend(*_split(qkv, heads), scale=_scale(qkv, heads)))


def _fused(qkv: Array, heads: int) -> Array:
    return short_attention(qkv, heads, _scale(qkv, heads))


def _flash(qkv: Array, heads: int) -> Array:
    (query, key, value), real = _pad(_split(qkv, heads))
    segments = flash_attention.SegmentIds(q=real, kv=real)
    out = flash_attention.flash_attention(
        query, key, value, segment_ids=segments, sm_scale=_scale(qkv, heads)
    )
    return merge_heads(out[:, :, : qkv.shape[1]])


def _splash(qkv: Array, heads: int) -> Array:
    kernels, masks = splash_attention.splash_attention_kernel, splash_attention.splash_attention_mask
    (query, key, value), real = _pad(_split(qkv, heads))
    tokens = query.shape[2]
    mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens)) for _ in range(heads)])
    kernel = kernels.make_splash_mha_single_device(mask)
    attend_image: Callable[..., Any] = lambda q, k, v, ids: kernel(
        q, k, v, segment_ids=kernels.SegmentIds(q=ids, kv=ids)
    )
    out = jax.vmap(attend_image)(query * _scale(qkv, heads), key, value, real)
    return merge_heads(out[:, :, : qkv.shape[1]])


KINDS: dict[str, Callable[[Array, int], Array]] = {
    "xla": _xla, "fused": _fused, "flash": _flash, "splash": _splash,
}  # fmt: skip


def _split(qkv: Array, heads: int) -> list[Array]:
    return [split_heads(part, heads) for part in jnp.split(qkv, 3, axis=-1)]


def _scale(qkv: Array, heads: int) -> float:
    return (qkv.shape[-1] // 3 // heads) ** -0.5


def _pad(parts: list[Array]) -> tuple[list[jax.Array], jax.Array]:
    """Tokens padded to whole blocks, and int32 [B, tokens]: 1 for tokens, 0 for padding."""
    batch, _, tokens, _ = parts[0].shape
    extra = -tokens % BLOCK
    real = jnp.tile(jnp.arange(tokens + extra, dtype=jnp.int32) < tokens, (batch, 1))
    return [jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in parts], jnp.asarray(real, jnp.int32)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    description, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark attention",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", default="197", metavar="LIST", help="numbers of tokens (default: 197)")
    add("--heads", type=int, default=6, metavar="N", help="number of heads (default: 6)")
    add("--head-width", type=int, default=64, metavar="N", help="channels of a head (default: 64)")
    add("--images", type=int, default=128, metavar="N", help="images of a batch (default: 128)")
    add("--kinds", default=",".join(KINDS), metavar="LIST", help="default: all four")
    add("--topology", metavar="NAME", help='a TPU topology such as "v5e:1x1" (default: this device)')
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds.split(",")) - set(KINDS):
        parser.error(f"--kinds is a list of {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    return options
