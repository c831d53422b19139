"""Measures annotation; the last line printed is JSON.

    python -m scripts.benchmark annotate --model regnety_160 --batch-size 16   # images/s of JPEGs on a disk
    python -m scripts.benchmark annotate --model dm_nfnet_f6 --topology v5e:2x4  # the program for absent TPUs

Without --topology the JPEGs of `benchmark input` are annotated with a model of random weights, as `tlvit
annotate` does it, into a temporary folder. `device_wait` is the fraction of the time, from the start of the
first batch to the end of the last one, in which no batch was on the devices. With --topology nothing runs,
and no TensorFlow is needed: the costs are those of the compiled program, and `imagenet_hours` is the time
that these chips need for the 1,281,167 training images of ImageNet if they reach --utilization of the rate
that arithmetic or memory traffic allows.
"""

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from scripts.program_costs import product_flops, program_costs, topology_devices, with_sharding
from tlvit.annotators.scoring import Scoring
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.models.table import published_image_size
from tlvit.training.annotation_batch import fitting_batch, program_bytes
from tlvit.training.mesh import batch_sharding, make_mesh, replicated
from tlvit.training.state import abstract_model

IMAGENET = 1_281_167  # training images
V5E_BYTES = 15.75 * 2**30  # memory of a TPU v5e chip that a program can use
SHARDS = 8  # of the JPEGs


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    size = options.image_size or published_image_size(options.model)
    info = ModelInfo(options.model, options.num_classes, (size, size), {"dtype": options.dtype})
    if options.topology:
        result = inspect_annotation(options, info, make_mesh(topology_devices(options.topology)))
    else:
        result = measure_annotation(options, info)
    print(json.dumps({"model": options.model, "image_size": size, "dtype": options.dtype, **result}))
    return 0


def measure_annotation(options: argparse.Namespace, info: ModelInfo) -> dict[str, Any]:
    """Annotates JPEGs and times it."""
    import tlvit.data  # noqa: F401 (sets TensorFlow's log level before TensorFlow is imported)
    from scripts.benchmark_input import make_data
    from tlvit.training.annotation import open_writer, write_shards
    from tlvit.training.device_scorer import Annotator, DeviceScorer

    logging.getLogger("tlvit").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        source, _ = make_data(folder, options.images, shards=SHARDS)
        annotator = Annotator(info.build(), info)
        start = time.perf_counter()
        scorer = DeviceScorer(annotator, Scoring(), top_k=5, batch_size=options.batch_size or None)
        batch_size = scorer.batch_size
        compile_s = time.perf_counter() - start
        writer = open_writer(scorer, source, f"{folder}/score_maps")
        cpu = time.process_time()
        clock = write_shards(writer, scorer, max_corrupt=0.0, threads=options.threads)
        cpu = time.process_time() - cpu
        costs = program_costs(scorer.program, scorer.mesh, batch_size)
    return {
        **costs,
        "batch": batch_size,
        "images": options.images,
        "images_per_s": options.images / clock.seconds,
        "images_per_cpu_s": options.images / cpu,
        "device_wait": clock.idle_fraction,
        "compile_s": compile_s,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def inspect_annotation(options: argparse.Namespace, info: ModelInfo, mesh: Mesh) -> dict[str, Any]:
    """Compiles the program of annotation and reads its costs."""
    from tlvit.training.device_scorer import dense_function, score_function

    net, *arrays = abstract_model(info.build)
    dense, scoring = dense_function(net, info.preprocessing), Scoring()
    image = jax.ShapeDtypeStruct((1, *info.image_size, 3), jnp.uint8)
    views = scoring.views(info.image_size, jax.eval_shape(dense, arrays, image).shape[1:3])
    score = score_function(dense, views, scoring, 5, mesh)
    weights = with_sharding(tuple(arrays), replicated(mesh))
    weights_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    chips, start = mesh.devices.size, time.perf_counter()

    def pixels(images: int) -> jax.ShapeDtypeStruct:
        shape = (images * chips, *info.image_size, 3)
        return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh))

    def compiled(images: int) -> jax.stages.Compiled:
        return score.lower(weights, pixels(images)).compile()

    if options.batch_size:
        images, program = options.batch_size // chips, compiled(options.batch_size // chips)
    else:
        images, program = fitting_batch(compiled, weights_bytes, int(0.9 * V5E_BYTES))
    compile_s = time.perf_counter() - start
    products = lambda: product_flops(score, weights, pixels(images))
    costs = program_costs(program, mesh, images * chips, products)
    result = {**costs, "batch": images * chips, "needed_bytes": program_bytes(program, weights_bytes)}
    if costs["roofline"]:
        rate = options.utilization * costs["roofline"]["images_per_s_at_most"]
        result |= {"utilization": options.utilization, "imagenet_hours": IMAGENET / rate / 3600}
    return {**result, "compile_s": compile_s}


def parse(arguments: list[str]) -> argparse.Namespace:
    description, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        "python -m scripts.benchmark annotate",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="regnety_160", metavar="NAME", help="architecture (default: regnety_160)")
    add(
        "--image-size", type=int, default=0, metavar="N", help="height and width, pixels (default: published)"
    )
    add("--num-classes", type=int, default=1000, metavar="N", help="number of classes (default: 1000)")
    add("--batch-size", type=int, default=0, metavar="N", help="images in a batch (default: by the memory)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: float32")
    add("--images", type=int, default=512, metavar="N", help="number of JPEGs (default: 512)")
    add("--threads", type=int, default=0, metavar="N", help="threads that decode; 0: one for each core")
    add(
        "--topology",
        default="",
        metavar="NAME",
        help='a TPU topology such as "v5e:2x4", or FILE.txtpb with the description of a GPU, for which '
        "--batch-size should be given: without it, the batch is that of a chip of 16 GB",
    )
    add("--utilization", type=float, default=0.5, metavar="F",
        help="fraction of the possible rate that imagenet_hours assumes (default: 0.5)")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
