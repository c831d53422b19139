"""Chooses the batch size of annotation by the memory of the devices."""

import logging
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from tlvit.training.annotation_stream import DEPTH

CPU_BATCH = 64  # images of a batch on CPUs, rounded up to a multiple of the devices
LARGEST = 128  # images of a batch on one device
PROBE = 8  # images on one device, whose program predicts the memory of more
SHARE = 0.9  # of the device's memory that a program may need

log = logging.getLogger("tlvit")
Compile = Callable[[int], jax.stages.Compiled]


def choose_batch(compile_program: Compile, mesh: Mesh, weights_bytes: int) -> tuple[int, jax.stages.Compiled]:
    """The batch size that the memory of the devices holds, and its program.

    Args:
      compile_program: compiles the program for a number of images, over all devices.
      mesh: the devices.
      weights_bytes: bytes of the weights on one device.

    Returns:
      A power of two of images for each device, at most LARGEST. Devices that report no limit, such as CPUs,
      get CPU_BATCH images together.

    Raises:
      ValueError: the devices cannot hold one image each.
    """
    devices = mesh.devices.size
    limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit", 0)
    if not limit:
        batch = -(-CPU_BATCH // devices) * devices
        return batch, compile_program(batch)
    limit = int(SHARE * limit)
    images, program = fitting_batch(lambda count: compile_program(count * devices), weights_bytes, limit)
    needed = program_bytes(program, weights_bytes)
    log.info(
        "batch of %d images, %d on each device: %.1f of %.1f GiB",
        images * devices, images, needed / 2**30, limit / 2**30,
    )  # fmt: skip
    return images * devices, program


def fitting_batch(
    compile_program: Compile, weights_bytes: int, limit: int
) -> tuple[int, jax.stages.Compiled]:
    """The largest power of two of images, at most LARGEST, whose program fits, and the program.

    The program of PROBE images is compiled first. What an image needs in it predicts the largest batch.

    Args:
      compile_program: compiles the program for a number of images on each device.
      weights_bytes: bytes of the weights on one device.
      limit: bytes that a program may need on one device.

    Raises:
      ValueError: one image does not fit.
    """
    images, program = _halved(compile_program, PROBE, weights_bytes, limit)
    for_images = max(program_bytes(program, weights_bytes) - weights_bytes, 1)
    predicted = min(LARGEST, (limit - weights_bytes) * images // for_images)
    larger = 1 << (predicted.bit_length() - 1)
    if larger <= images:
        return images, program
    return _halved(compile_program, larger, weights_bytes, limit)


def program_bytes(program: jax.stages.Compiled, weights_bytes: int) -> int:
    """Bytes that a program needs on one device: weights, temporaries, and DEPTH batches and their scores."""
    memory = program.memory_analysis()
    if memory is None:
        return weights_bytes
    images = memory.argument_size_in_bytes - weights_bytes
    return weights_bytes + memory.temp_size_in_bytes + DEPTH * (images + memory.output_size_in_bytes)


def _halved(
    compile_program: Compile, images: int, weights_bytes: int, limit: int
) -> tuple[int, jax.stages.Compiled]:
    """The first of images, images / 2, … whose program compiles and fits."""
    while images:
        try:
            program = compile_program(images)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        else:
            if program_bytes(program, weights_bytes) <= limit:
                return images, program
        images //= 2
    raise ValueError(
        f"The annotator does not fit into {limit / 2**30:.1f} GiB of a device with one image. Choose a "
        "smaller image size."
    )
