"""Measures the training step, or reads its costs from the compiled program; the last line printed is JSON.

    python -m scripts.benchmark step --model=lvvit_s --batch-size=16        # images/s
    python -m scripts.benchmark compile --topology=v5e:2x4                  # FLOPs, bytes and collectives

`step` and `compile` train on token labels: the input is uint8 images and top-5 score maps, and the step makes
targets, applies MixToken and AdamW, and updates the moving average. They need no TensorFlow. With --annotator
the step scores the images itself, and the result says what the same step costs with stored score maps.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from scripts.program_costs import product_flops, program_costs, topology_devices, with_sharding
from tlvit import create_model
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import Augment, Config, Loss, Model, Optim
from tlvit.host_memory import keep_freed_memory
from tlvit.models.functional import functionalize
from tlvit.models.table import published_image_size
from tlvit.training.checks import check_heads
from tlvit.training.mesh import (
    AXES,
    batch_sharding,
    describe_mesh,
    make_mesh,
    state_bytes,
    state_shardings,
)
from tlvit.training.optimizer import make_optimizer
from tlvit.training.prefetch import to_global
from tlvit.training.state import TrainState, abstract_model, abstract_state, init_state
from tlvit.training.step import Teacher, make_train_step
from tlvit.types import Batch, ScoreMaps


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    keep_freed_memory(options.batch_size, (options.image_size, options.image_size))  # as training does
    devices = topology_devices(options.topology) if options.topology else None
    mesh = make_mesh(devices, **parse_mesh(options.mesh))
    measure = measure_step if options.what == "step" else inspect_program
    for attention in options.attention.split(","):
        options.attention = attention
        check_heads(make_config(options), mesh.shape.get("model", 1))
        result = measure(options, mesh)
        if options.annotator:
            result["annotator"] = annotator_price(options, result, measure(without_annotator(options), mesh))
        names = {key: getattr(options, key) for key in ("model", "dtype", "attention")}
        print(json.dumps({**names, "batch": options.batch_size, **result}))
    return 0


def measure_step(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Runs the step and times it. Times are medians over the steps after the first three.

    `step_s` is the time of a step. `host_step_s` is the processor time that the training thread spends on
    starting one: Python and dispatch, without waiting for the devices. A single CPU device runs the step in
    the same thread.
    """
    train_step, train_state, batch = build(options, mesh)
    batch = to_global(batch, mesh)
    start = time.perf_counter()
    compiled, arrays = lower(train_step, train_state, batch)
    compiled = compiled.compile()
    compile_s = time.perf_counter() - start
    seconds, host_seconds = [], []
    for _ in range(3 + options.steps):
        jax.block_until_ready(train_state)
        start, host_start = time.perf_counter(), time.thread_time()
        train_state, metrics = compiled(train_state, batch, **arrays)
        host_seconds.append(time.thread_time() - host_start)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(float(metrics["loss"])):
        raise FloatingPointError(f"The loss after {len(seconds)} steps is {float(metrics['loss'])}.")
    step_s = statistics.median(seconds[3:])
    return {
        "device": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": describe_mesh(mesh),
        "images_per_s": options.batch_size / step_s,
        "step_s": step_s,
        "step_s_quartiles": [float(q) for q in np.percentile(seconds[3:], [25, 75])],
        "host_step_s": statistics.median(host_seconds[3:]),
        "compile_s": compile_s,
        "peak_memory_bytes": peak_memory(mesh),
    }


def inspect_program(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Compiles the step and reads its costs from the program. Nothing runs, so the devices may be absent.

    `compile_cpu_s` is the processor time of all threads. `flops_per_image` is XLA's count; of a program with
    loops, whose bodies XLA counts once, it is that of the matrix products, and `bytes_per_image`, XLA's
    "bytes accessed", is null.
    """
    train_step, train_state, batch = build(options, mesh, abstract=True)
    start, cpu_start = time.perf_counter(), time.process_time()
    compiled = lower(train_step, train_state, batch)[0].compile()
    compile_s, compile_cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    if options.text:
        pathlib.Path(options.text).write_text(compiled.as_text() or "")
    products = lambda: product_flops(train_step, train_state, batch)
    return {
        **program_costs(compiled, mesh, options.batch_size, products),
        "state_bytes": state_bytes(train_state)[0],
        "compile_s": compile_s,
        "compile_cpu_s": compile_cpu_s,
    }


def annotator_price(
    options: argparse.Namespace, found: dict[str, Any], without: dict[str, Any]
) -> dict[str, Any]:
    """What the annotator inside the step adds, from the results of the step with and without it.

    `without` has the figures of the same step with stored score maps. Those that start with `added_` are of a
    whole step, on all devices.
    """
    figures = ("flops_per_image", "hbm_bytes_per_image", "argument_bytes", "temp_bytes", "step_s", "roofline")
    price: dict[str, Any] = {
        "model": options.annotator,
        "image_size": annotator_size(options),
        "without": {name: without[name] for name in figures if name in without},
    }
    for name in ("flops", "hbm_bytes"):
        if f"{name}_per_image" in found:
            more = found[f"{name}_per_image"] - without[f"{name}_per_image"]
            price[f"added_{name}_per_step"] = more * options.batch_size
    return price


def annotator_size(options: argparse.Namespace) -> int:
    """The image size of the annotator, pixels: by default that of its published evaluation."""
    return options.annotator_image_size or published_image_size(options.annotator)


def without_annotator(options: argparse.Namespace) -> argparse.Namespace:
    """The same options for a step with stored score maps."""
    return argparse.Namespace(**{**vars(options), "annotator": ""})


def lower(
    train_step: Callable[..., Any], train_state: TrainState, batch: Batch
) -> tuple[jax.stages.Lowered, dict[str, Any]]:
    """The lowered step, and the further arguments of its program: an annotator's arrays."""
    arrays: dict[str, Any] = {}
    if isinstance(train_step, functools.partial):
        train_step, arrays = train_step.func, train_step.keywords
    return cast(jax.stages.Wrapped, train_step).lower(train_state, batch, **arrays), arrays


def build(
    options: argparse.Namespace, mesh: Mesh, *, abstract: bool = False
) -> tuple[Callable[..., Any], TrainState, Batch]:
    """The step with a state and a batch of its shapes (arrays, or shapes with shardings)."""
    config = make_config(options)
    info = ModelInfo(config.model.name, options.num_classes, config.image_size)
    dtype = jnp.dtype(config.model.dtype)
    sizes = {"num_classes": info.num_classes, "image_size": info.image_size, "dtype": dtype}
    make: Callable[[], nnx.Module] = lambda: create_model(info.model, **sizes, **config.model.options)
    net, params, _ = abstract_model(make)
    # Models without a token head train on labels.
    config = dataclasses.replace(config, token_labels=net.has_token_head, loss=Loss(plain_labels=True))
    tx = make_optimizer(params, learning_rate=1e-4)
    if abstract:
        train_state = abstract_state(make, tx, mesh=mesh)
        batch = abstract_batch(options, batch_sharding(mesh))
    else:
        train_state = init_state(make, tx, mesh=mesh)
        batch = make_batch(options)
    annotator = make_annotator(options, mesh, abstract=abstract) if options.annotator else None
    return make_train_step(net, tx, mesh, config, info, teacher=annotator), train_state, batch


def make_annotator(options: argparse.Namespace, mesh: Mesh, *, abstract: bool) -> Teacher:
    """An annotator with new weights (arrays, or shapes with shardings)."""
    size = annotator_size(options)
    info = ModelInfo(options.annotator, options.num_classes, (size, size), {"dtype": options.dtype})
    if abstract:
        net, *arrays = abstract_model(info.build)
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return Teacher(net, *jax.tree.map(place, arrays, state_shardings(arrays, mesh)), info=info)
    net, *arrays = functionalize(info.build())
    return Teacher(net, *jax.device_put(arrays, state_shardings(arrays, mesh)), info=info)


def make_config(options: argparse.Namespace) -> Config:
    """The settings of the measured step."""
    return Config(
        batch_size=options.batch_size,
        image_size=(options.image_size, options.image_size),
        model=Model(
            name=options.model,
            dtype=options.dtype,
            options={
                "drop_path": options.drop_path,
                **({"attention": options.attention} if options.attention != "xla" else {}),
                **({"remat": True} if options.remat else {}),
                **({"scan_blocks": True} if options.scan_blocks else {}),
                **({"depth": options.depth} if options.depth else {}),
            },
        ),
        augment=Augment(
            randaugment=options.randaugment,
            randaugment_on="device",
            random_erasing=options.random_erasing,
        ),
        optim=Optim(accumulate=options.accumulate),
    )


def make_batch(options: argparse.Namespace) -> Batch:
    """Random images, score maps, and crops such as those of random resized crops."""
    rng = np.random.default_rng(0)
    count, k, side = options.batch_size, 5, options.map_size
    first = rng.integers(0, options.num_classes - k, (count, 1, side, side))
    index = first + np.arange(k).reshape(1, k, 1, 1)
    geometry = np.zeros((count, 2, 3), np.float32)
    extent = rng.uniform(0.3, 1.0, (count, 2))
    geometry[:, [0, 1], [0, 1]] = extent
    geometry[:, :, 2] = rng.uniform(0, 1, (count, 2)) * (1 - extent)
    return Batch(
        image=rng.integers(0, 256, (count, options.image_size, options.image_size, 3), dtype=np.uint8),
        label=rng.integers(0, options.num_classes, count).astype(np.int32),
        mask=np.ones(count, bool),
        maps=None
        if options.annotator
        else ScoreMaps(
            value=(4 * rng.standard_normal((count, k, side, side))).astype(np.float16),
            index=index.astype(np.uint16),
        ),
        geometry=geometry,
    )


def abstract_batch(options: argparse.Namespace, sharding: Sharding) -> Batch:
    """The shapes of `make_batch`, without its arrays: the batch of a pod does not fit in one host."""
    one = make_batch(argparse.Namespace(**{**vars(options), "batch_size": 1}))
    whole = lambda x: jax.ShapeDtypeStruct((options.batch_size, *x.shape[1:]), x.dtype)
    return with_sharding(jax.tree.map(whole, one), sharding)


def parse_mesh(text: str) -> dict[str, int]:
    """{"data": 2, "fsdp": 4} of "data=2,fsdp=4".

    Raises:
      ValueError: it has another form, or other axes.
    """
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(axis in AXES and size.lstrip("-").isdecimal() for axis, _, size in pairs):
        raise ValueError(f"--mesh is a list such as data=2,fsdp=4,model=1, not {text!r}.")
    return {axis: int(size) for axis, _, size in pairs}


def peak_memory(mesh: Mesh) -> int:
    """Peak memory in bytes: of the first device if it counts them, else of this process."""
    statistics_of = mesh.devices.flat[0].memory_stats() or {}
    return statistics_of.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `step` and `compile`."""
    description, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["step", "compile"], help="run and time it, or compile it and count")
    add("--model", default="lvvit_s", metavar="NAME", help="architecture (default: lvvit_s)")
    add("--batch-size", "--batch", type=int, default=16, metavar="N",
        help="number of images in a step, over all devices (default: 16)")  # fmt: skip
    add("--image-size", type=int, default=224, metavar="N", help="height and width, pixels (default: 224)")
    add("--num-classes", "--classes", type=int, default=1000, metavar="N",
        help="number of classes (default: 1000)")  # fmt: skip
    add("--map-size", type=int, default=18, metavar="N", help="height and width of a score map (default: 18)")
    add("--annotator", default="", metavar="NAME",
        help="architecture of an annotator that scores the images inside the step")  # fmt: skip
    add("--annotator-image-size", type=int, default=0, metavar="N",
        help="its image size, pixels (default: that of its published evaluation)")  # fmt: skip
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: float32")
    add("--drop-path", type=float, default=0.1, metavar="P", help="drop-path rate (default: 0.1)")
    add("--randaugment", default="", metavar="POLICY", help="RandAugment on the device (default: none)")
    add("--random-erasing", "--erasing", type=float, default=0.0, metavar="P",
        help="probability of random erasing (default: 0)")  # fmt: skip
    add("--accumulate", type=int, default=1, metavar="N", help="parts of a batch (default: 1)")
    add("--attention", default="xla", metavar="LIST",
        help="xla, fused, or both as fused,xla, which prints a line for each (default: xla)")  # fmt: skip
    add("--depth", type=int, default=0, metavar="N", help="number of blocks (default: the model's)")
    add("--remat", action="store_true", help="rematerialize the blocks' activations")
    add("--scan-blocks", action="store_true", help="run equal blocks as one loop")
    add("--steps", type=int, default=10, metavar="N", help="number of timed steps (default: 10)")
    add("--mesh", default="", metavar="AXES",
        help="sizes of the axes, such as data=2,fsdp=4,model=1 (default: data=-1, all devices)")  # fmt: skip
    add(
        "--topology",
        metavar="NAME",
        help='with compile: a TPU topology such as "v5e:2x4", or FILE.txtpb with the description of a GPU',
    )
    add("--text", metavar="FILE", help="with compile: also write the text of the compiled program")
    return parser.parse_args(arguments)
