"""Measures the parts of a run. The last line printed is JSON.

    python -m scripts.benchmark step --model lvvit_s --batch 16         # images/s of the whole training step
    python -m scripts.benchmark compile --model lvvit_s --batch 128     # FLOPs, bytes, collectives
    python -m scripts.benchmark compile --topology v5e:2x4 --batch 1024 # compiled for TPUs, without a TPU
    python -m scripts.benchmark input --help                            # images/s of the data pipeline
    python -m scripts.benchmark resume --help                           # start in the middle of an epoch

`step` and `compile` run the training step with token labels: its inputs are uint8 images and top-5 score
  maps, and
it contains targets, MixToken, forward and backward pass, AdamW and the moving average. They need no
TensorFlow.
"""

import argparse
import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import Augment, Config, Loss, Optim
from tlvit.training.mesh import batch_sharding, make_mesh
from tlvit.training.optimizer import make_optimizer
from tlvit.training.prefetch import to_global
from tlvit.training.state import TrainState, abstract_model, abstract_state, init_state
from tlvit.training.step import make_train_step
from tlvit.types import Batch, PyTree, ScoreMaps

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
    """The command; returns the exit status."""
    if arguments[:1] in (["input"], ["resume"]):
        import tlvit.data  # noqa: F401 (sets TensorFlow's log level before it is imported)
        from scripts import benchmark_input, benchmark_resume

        program = {"input": benchmark_input, "resume": benchmark_resume}[arguments[0]]
        return program.main(arguments[1:])
    options = parse(arguments)
    devices = topology_devices(options.topology) if options.topology else None
    mesh = make_mesh(devices)
    result = measure_step(options, mesh) if options.what == "step" else inspect_program(options, mesh)
    result = {"model": options.model, "batch": options.batch, "dtype": options.dtype, **result}
    print(json.dumps(result))
    return 0


def measure_step(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Times the step: the median over the steps after the first three.

    `host_step_s` is the processor time that the host's thread needs to start one step.
    """
    train_step, train_state, batch = build(options, mesh)
    batch = to_global(batch, mesh)
    start = time.perf_counter()
    compiled = train_step.lower(train_state, batch).compile()
    compile_s = time.perf_counter() - start
    seconds, host = [], []
    for _ in range(3 + options.steps):
        start, host_start = time.perf_counter(), time.thread_time()
        train_state, metrics = compiled(train_state, batch)
        host.append(time.thread_time() - host_start)
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
        "host_step_s": statistics.median(host[3:]),
        "compile_s": compile_s,
        "peak_memory_bytes": peak_memory(mesh),
    }


def inspect_program(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Compiles the step and reads its cost from the program. Nothing runs, so no TPU is needed."""
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


def build(
    options: argparse.Namespace, mesh: Mesh, *, abstract: bool = False
) -> tuple[Callable, TrainState, Batch]:
    """The jitted step with a state and a batch: arrays, or their shapes and shardings."""
    size = (options.image_size, options.image_size)
    model = {"dtype": options.dtype, **json.loads(options.options)}
    if options.remat:
        model["remat"] = True
    info = ModelInfo(options.model, options.classes, size, model)
    net, shapes, _ = abstract_model(info.build)
    config = Config(
        token_labels=net.has_token_head,
        augment=Augment(
            randaugment=options.randaugment, randaugment_on="device", random_erasing=options.erasing
        ),
        loss=Loss(plain_labels=True),
        optim=Optim(accumulate=options.accumulate),
    )
    tx = make_optimizer(shapes, learning_rate=1e-4)
    train_step = make_train_step(net, tx, mesh, config, info)
    if abstract:
        batch = with_sharding(jax.eval_shape(lambda: make_batch(options)), batch_sharding(mesh))
        return train_step, abstract_state(info.build, tx, mesh=mesh), batch
    return train_step, init_state(info.build, tx, mesh=mesh), make_batch(options)


def make_batch(options: argparse.Namespace) -> Batch:
    """Random images and score maps with the geometry of random crops."""
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


def with_sharding(tree: PyTree, where: Sharding) -> PyTree:
    """The shapes of a tree with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def topology_devices(name: str) -> Sequence[jax.Device]:
    """Devices of a TPU topology such as "v5e:2x4", to compile for. They need not exist, but `tlvit[tpu]` has
    to be installed."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    shape = {"chips_per_host_bounds": "1x1x1"} if name.endswith("1x1") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **shape).devices


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} of a compiled program's text. Bytes are those of the results on one chip."""
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


def peak_memory(mesh: Mesh) -> int:
    """Peak memory in bytes: of the first device if it reports it, otherwise of this process."""
    statistics_of = mesh.devices.flat[0].memory_stats() or {}
    return statistics_of.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "compile", "input", "resume"])
    parser.add_argument("--model", default="lvvit_s")
    parser.add_argument("--batch", type=int, default=16, help="images in a step, over all devices")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--map-size", type=int, default=18, help="cells along a side of a score map")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--options", default='{"drop_path": 0.1}', help="options of the model class, as JSON")
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
