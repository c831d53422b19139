"""Measures inference; the last line printed is JSON.

    python -m scripts.benchmark inference --model=lvvit_s --batch-size=64   # images/s, latency and memory

The input is uint8 images on the device and the output probabilities; the weights are random. `images_per_s`
is that of batches of --batch-size, `latency_s` the time of one image alone, both medians. `peak_memory_bytes`
is that of the device if it counts it, otherwise that of this process. No TensorFlow is needed.
"""

import argparse
import json
import resource
import statistics
import time
from typing import Any

import jax
import numpy as np

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.program import Inference, inference
from tlvit.models.table import published_image_size

WARM_UP = 2  # runs that are not timed


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    size = options.image_size or published_image_size(options.model)
    more = {"depth": options.depth} if options.depth else {}
    info = ModelInfo(options.model, options.num_classes, (size, size), {"dtype": options.dtype, **more})
    what = inference(info.build(), info)
    one, many = measure(what, 1, options.steps), measure(what, options.batch_size, options.steps)
    device = jax.devices()[0]
    counted = (device.memory_stats() or {}).get("peak_bytes_in_use")
    result = {
        "model": options.model,
        "image_size": size,
        "dtype": options.dtype,
        "batch": options.batch_size,
        "device": device.device_kind,
        "images_per_s": options.batch_size / many["median_s"],
        "batch_s": many["median_s"],
        "latency_s": one["median_s"],
        "latency_s_quartiles": one["quartiles_s"],
        "compile_s": many["compile_s"],
        "peak_memory_bytes": counted or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result))
    return 0


def measure(what: Inference, batch_size: int, steps: int) -> dict[str, Any]:
    """Seconds of one batch on the first device."""
    shape = (batch_size, *what.info.image_size, 3)
    images = jax.device_put(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))
    start = time.perf_counter()
    run = jax.jit(what.run).lower(what.weights, images).compile()
    compile_s, seconds = time.perf_counter() - start, []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        jax.block_until_ready(run(what.weights, images))
        seconds.append(time.perf_counter() - start)
    timed = seconds[WARM_UP:]
    quartiles = [float(q) for q in np.percentile(timed, [25, 75])]
    return {"median_s": statistics.median(timed), "quartiles_s": quartiles, "compile_s": compile_s}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    description, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark inference",
        description=description,
        epilog=f"example:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="lvvit_s", metavar="NAME", help="architecture (default: lvvit_s)")
    add("--batch-size", type=int, default=32, metavar="N", help="images in a batch (default: 32)")
    add("--image-size", type=int, default=0, metavar="N", help="pixels (default: the published size)")
    add("--num-classes", type=int, default=1000, metavar="N", help="number of classes (default: 1000)")
    add("--depth", type=int, default=0, metavar="N", help="number of blocks (default: the model's)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: float32")
    add("--steps", type=int, default=10, metavar="N", help="number of timed runs (default: 10)")
    return parser.parse_args(arguments)
