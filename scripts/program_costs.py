"""The costs of a compiled program: FLOPs, memory, memory traffic, collectives and the bound of a chip."""

import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval
from jax.sharding import Mesh, Sharding

from scripts.hlo_traffic import hbm_traffic, loop_counts
from tlvit.models.macs import count_macs
from tlvit.training.mesh import describe_mesh
from tlvit.types import PyTree

# Peak matrix rate (bfloat16) and memory bandwidth of a chip, from the vendors' data sheets.
CHIPS = {
    "TPU v4": (275e12, 1.2e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v5e": (197e12, 0.82e12),
    "TPU v5p": (459e12, 2.77e12),
    "TPU v6 lite": (918e12, 1.64e12),
    "NVIDIA A100": (312e12, 2.0e12),
    "NVIDIA H100": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
}
LARGEST = 10  # sources of memory traffic that the report names
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def program_costs(
    compiled: jax.stages.Compiled, mesh: Mesh, batch_size: int, products: Callable[[], int] | None = None
) -> dict[str, Any]:
    """The costs of a compiled program, for each of the images of its batch where that makes sense.

    Args:
      compiled: the program.
      mesh: its devices.
      batch_size: images of a batch, over all devices.
      products: computes the FLOPs of the program's matrix products. Programs with loops need it, because XLA
        counts the body of a loop once, and programs for absent GPUs, because XLA counts nothing.

    Raises:
      ValueError: JAX cannot analyze programs for these devices.
    """
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    chips = mesh.devices.size
    kind = mesh.devices.flat[0].device_kind
    if memory is None or text is None or (cost is None and products is None):
        raise ValueError(f"JAX cannot analyze a program for {kind}.")
    images = batch_size / chips  # XLA counts the program of one chip
    traffic = hbm_traffic(text)
    flops, moved = (cost["flops"], cost["bytes accessed"]) if cost else (0, math.nan)
    if products is not None and (cost is None or max(loop_counts(text).values()) > 1):
        flops, moved = max(flops, products() / chips), math.nan
    result: dict[str, Any] = {
        "device": f"{chips} x {kind}",
        "mesh": describe_mesh(mesh),
        "flops_per_image": flops / images,
        "bytes_per_image": None if math.isnan(moved) else moved / images,
        "hbm_bytes_per_image": sum(traffic.values()) / images,
        "hbm_largest": {source: count / images for source, count in traffic.most_common(LARGEST)},
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "collectives": count_collectives(text),
        "roofline": None,
    }
    peak = next((v for k, v in CHIPS.items() if kind.startswith(k)), None)
    if peak:
        seconds = {"compute_s": flops / peak[0], "memory_s": sum(traffic.values()) / peak[1]}
        bound = max(seconds, key=lambda name: seconds[name])
        rate = batch_size / seconds[bound]
        result["roofline"] = {**seconds, "bound": bound.removesuffix("_s"), "images_per_s_at_most": rate}
    return result


def product_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of the matrix products and convolutions that the results of a function depend on.

    A traced gradient also has forward passes whose values nothing uses; XLA removes them.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return 2 * count_macs(used)


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} in the text of a compiled program; bytes of the results on one chip.

    The compiler for TPUs writes a collective several times, with one channel, if it overlaps it with
    computations, and a reduce-scatter as a computation `all-reduce-scatter` of an all-reduce and a slice.
    What is in a loop counts as often as the loop runs.
    """
    found: dict[str, dict[str, int]] = {}
    loops, times = loop_counts(text), 1
    seen: set[str] = set()
    scattered = ""  # the result of the all-reduce-scatter that the line is in
    for line in text.splitlines():
        if line.endswith("{") and "->" in line:  # a computation starts
            scattered = line.partition("->")[2] if line.startswith("%all-reduce-scatter") else ""
            times = loops.get(line.removeprefix("ENTRY ").partition(" ")[0].removeprefix("%"), 1)
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        channel = re.search(r"channel_id=\d+", line)
        if match is None or (channel and channel[0] in seen):
            continue
        seen.update([channel[0]] if channel else [])
        kind = "reduce-scatter" if scattered else match[2]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += times
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", scattered or match[1])
        if match[3] and kind != "all-reduce":  # a start lists its operands, results and contexts
            shapes = [s for s in shapes if s != ("u32", "")]
            shapes = shapes[len(shapes) // 2 :]
        for dtype, shape in shapes:
            bits = int((re.search(r"\d+", dtype) or ["8"])[0])  # pred has no number: one byte
            entry["bytes"] += times * (bits // 8) * int(np.prod([int(d) for d in shape.split(",") if d]))
    return found


def topology_devices(name: str) -> list[jax.Device]:
    """Devices of a TPU topology such as "v5e:2x4", or GPUs that a file describes. They may be absent.

    Compiling for TPUs needs `pip install "tlvit[tpu]"`, and for GPUs "tlvit[gpu]" or "tlvit[gpu-cuda12]".

    Args:
      name: of the topology, or FILE.txtpb with XLA's GpuTargetConfigProto as text; FILE.txtpb:8 for 8 GPUs of
        one machine.
    """
    from jax.experimental import topologies

    path, extension, count = name.partition(".txtpb")
    if extension:
        shape = {"topology_name": "", "topology": f"1x1x{count.removeprefix(':') or 1}"}
        target = pathlib.Path(path + extension).read_text()
        return topologies.get_topology_desc(platform="cuda", **shape, target_config=target).devices
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    shape = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith("1x1") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **shape).devices


def with_sharding(tree: PyTree, sharding: Sharding) -> PyTree:
    """Shapes of the arrays of a tree, with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
