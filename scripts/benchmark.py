"""Measures the parts of a run; the last line printed is JSON.

    python -m scripts.benchmark step --model lvvit_s --batch 16         # images/s of the whole training step
    python -m scripts.benchmark compile --model lvvit_s --batch 128     # FLOPs, bytes, collectives
    python -m scripts.benchmark compile --topology v5e:2x4 --batch 1024 # the same for TPUs that are not here
    python -m scripts.benchmark input --help                            # images/s of the data pipeline
    python -m scripts.benchmark resume --help                           # its start in the middle of an epoch

`step` and `compile` run token labels as a recipe does: uint8 images and top-5 score maps go in; targets,
MixToken, forward, backward, AdamW and the moving average are inside. They need no TensorFlow.
"""

import argparse
import json
import os
import re
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlvit import create_model
from tlvit.ops.randaugment_policy import parse_policy
from tlvit.training import mesh as sharding
from tlvit.training import optimizer as optim
from tlvit.training import state
from tlvit.training import step as steps
from tlvit.training.prefetch import to_global
from tlvit.types import Batch, ScoreMaps

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
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["input"], ["resume"]):
        import tlvit.data  # noqa: F401 (before TensorFlow, which it keeps quiet)
        from scripts import benchmark_input, benchmark_resume

        program = {"input": benchmark_input, "resume": benchmark_resume}[arguments[0]]
        return program.main(arguments[1:])
    options = parse(arguments)
    devices = topology_devices(options.topology) if options.topology else None
    mesh = sharding.make_mesh(devices)
    result = measure_step(options, mesh) if options.what == "step" else inspect_program(options, mesh)
    result = {"model": options.model, "batch": options.batch, "dtype": options.dtype, **result}
    print(json.dumps(result))
    return 0


def measure_step(options: argparse.Namespace, mesh) -> dict[str, float]:
    """Runs the step and times it: the median over the steps after the first three."""
    train_step, train_state, batch = build(options, mesh)
    batch = to_global(batch, mesh)
    start = time.perf_counter()
    compiled = train_step.lower(train_state, batch).compile()
    compile_s = time.perf_counter() - start
    seconds = []
    for _ in range(3 + options.steps):
        start = time.perf_counter()
        train_state, metrics = compiled(train_state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(float(metrics["loss"])):
        raise FloatingPointError(f"The loss after {len(seconds)} steps is {float(metrics['loss'])}.")
    step_s = statistics.median(seconds[3:])
    return {
        "device": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        "images_per_s": options.batch / step_s,
        "step_s": step_s,
        "step_s_quartiles": [float(q) for q in np.percentile(seconds[3:], [25, 75])],
        "compile_s": compile_s,
        "peak_memory_bytes": peak_memory(mesh),
    }


def inspect_program(options: argparse.Namespace, mesh) -> dict:
    """Compiles the step and reads what it costs; nothing runs, so the chips need not be here."""
    train_step, train_state, batch = build(options, mesh, abstract=True)
    start = time.perf_counter()
    compiled = train_step.lower(train_state, batch).compile()
    compile_s = time.perf_counter() - start
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    chips = mesh.devices.size
    kind = mesh.devices.flat[0].device_kind
    images = options.batch / chips  # XLA counts one chip's program
    flops, moved = cost["flops"], cost["bytes accessed"]
    result = {
        "device": f"{chips} x {kind}",
        "flops_per_image": flops / images,
        "bytes_per_image": moved / images,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "collectives": count_collectives(compiled.as_text()),
        "compile_s": compile_s,
        "roofline": None,
    }
    peak = next((v for k, v in CHIPS.items() if kind.startswith(k)), None)
    if peak:
        seconds = {"compute_s": flops / peak[0], "memory_s": moved / peak[1]}
        bound = max(seconds, key=seconds.get)
        rate = options.batch / seconds[bound]
        result["roofline"] = {**seconds, "bound": bound.removesuffix("_s"), "images_per_s_at_most": rate}
    return result


def build(options: argparse.Namespace, mesh, *, abstract: bool = False):
    """The jitted step with a state and a batch of the right shapes (arrays, or shapes with shardings)."""
    size = (options.image_size, options.image_size)
    dtype = jnp.dtype(options.dtype)
    overrides = {"drop_path": options.drop_path, "dtype": dtype, **({"remat": True} if options.remat else {})}
    make = lambda: create_model(options.model, num_classes=options.classes, image_size=size, **overrides)
    make_tx = lambda params: optim.make_optimizer(params, learning_rate=1e-4)
    if abstract:
        net, params, stats = state.abstract_model(make)
        tx = make_tx(params)
        train_state = jax.eval_shape(
            lambda: state.state_from(*jax.tree.map(jnp.zeros_like, (params, stats)), tx)
        )
        train_state = with_sharding(train_state, sharding.replicated(mesh))
        batch = with_sharding(jax.eval_shape(lambda: make_batch(options)), sharding.batch_sharding(mesh))
    else:
        net, tx, train_state = state.init_state(make, make_tx, mesh=mesh)
        batch = make_batch(options)
    grid = getattr(nnx.eval_shape(make), "grid", None)
    train_step = steps.make_train_step(
        net,
        tx,
        mesh=mesh,
        num_classes=options.classes,
        token_grid=grid,
        accumulate=options.accumulate,
        policy=parse_policy(options.randaugment),
        erasing=options.erasing,
    )
    return train_step, train_state, batch


def make_batch(options: argparse.Namespace) -> Batch:
    """Random images and maps, crops as random resized crops have them."""
    rng = np.random.default_rng(0)
    count, k, side = options.batch, 5, options.map_size
    index = rng.integers(0, options.classes - k, (count, 1, side, side)) + np.arange(k).reshape(1, k, 1, 1)
    geometry = np.zeros((count, 2, 3), np.float32)
    extent = rng.uniform(0.3, 1.0, (count, 2))
    geometry[:, [0, 1], [0, 1]] = extent
    geometry[:, :, 2] = rng.uniform(0, 1, (count, 2)) * (1 - extent)
    return Batch(
        image=rng.integers(0, 256, (count, options.image_size, options.image_size, 3)).astype(np.uint8),
        label=rng.integers(0, options.classes, count).astype(np.int32),
        mask=np.ones(count, bool),
        maps=ScoreMaps(
            value=(4 * rng.standard_normal((count, k, side, side))).astype(np.float16),
            index=index.astype(np.uint16),
        ),
        geometry=geometry,
    )


def with_sharding(tree, where):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def topology_devices(name: str):
    """Devices of a TPU topology ("v5e:2x4") that need not exist; compiling for them needs `pip install
    "tlvit[tpu]"`."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    shape = {"chips_per_host_bounds": "1x1x1"} if name.endswith("1x1") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **shape).devices


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} of a compiled program's text; bytes are those of the results on one chip."""
    found: dict[str, dict[str, int]] = {}
    bits = lambda dtype: int((re.search(r"\d+", dtype) or ["8"])[0])  # pred has none: a byte
    for kind in COLLECTIVES:
        for match in re.finditer(rf"= (.*?) {kind}(-start)?\(", text):
            entry = found.setdefault(kind, {"count": 0, "bytes": 0})
            entry["count"] += 1
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
            if match.group(2) and kind != "all-reduce":  # a start names its operands, results and contexts
                shapes = [s for s in shapes if s != ("u32", "")]
                shapes = shapes[len(shapes) // 2 :]
            for dtype, shape in shapes:
                entry["bytes"] += bits(dtype) // 8 * int(np.prod([int(d) for d in shape.split(",") if d]))
    return found


def peak_memory(mesh) -> int:
    """Bytes at the peak: of the first device where it counts them, else of this process."""
    statistics_of = mesh.devices.flat[0].memory_stats() or {}
    return statistics_of.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "compile", "input", "resume"])
    parser.add_argument("--model", default="lvvit_s")
    parser.add_argument("--batch", type=int, default=16, help="images a step, over all devices")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--map-size", type=int, default=18, help="cells along a side of a score map")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument(
        "--randaugment", default="", help="policy of RandAugment on the device; none if empty"
    )
    parser.add_argument("--erasing", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--topology", help='compile for these TPUs, such as "v5e:2x4"')
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
