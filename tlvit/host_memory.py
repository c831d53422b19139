"""The memory of this host: its size, a check that batches of images fit into it, and what is freed."""

import ctypes
import os
import pathlib
from collections.abc import Callable

import jax

LARGE_BATCH = 2**19  # pixels: 11 images of 224 x 224
COPIES = 4  # of a batch on the host: read ahead, in the making, and on its way to the devices
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def host_memory() -> int:
    """Bytes of memory that this process may use: the container's limit, or the machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in LIMIT_FILES:
        path = pathlib.Path(name)
        limit = path.read_text().strip() if path.is_file() else ""
        memory = min(memory, int(limit)) if limit.isdigit() else memory
    return memory


def check_batch(batch_size: int, image_size: tuple[int, int], setting: str) -> None:
    """Checks that batches of images fit into the memory of this host.

    Args:
      batch_size: images in a batch of this process.
      image_size: (height, width) in pixels.
      setting: name of the setting of the batch size, for the message.

    Raises:
      ValueError: they do not fit.
    """
    needed, available = COPIES * batch_size * image_size[0] * image_size[1] * 3, host_memory()
    if needed > available:
        raise ValueError(
            f"{COPIES} batches of {batch_size} images of {image_size[0]} x {image_size[1]} pixels take "
            f"{needed / 2**30:.1f} GiB, and this host has {available / 2**30:.1f} GiB. Choose a smaller "
            f"{setting} or image size."
        )


def keep_freed_memory(batch_size: int, image_size: tuple[int, int]) -> bool:
    """Makes this process keep the memory that it frees, for its next allocations, if it computes on a CPU.

    glibc returns every large buffer to the kernel as soon as it is freed, so each training step on a CPU
    waits until the kernel has cleared gigabytes of memory again (docs/performance.md). It can keep buffers
    of more than 64 MB only for the main thread. So, for large batches, this also tells JAX to run programs
    for a single CPU device in the thread that calls them; JAX reads that setting when it is first used. With
    small batches this would cost more than it saves, because the thread prepares the next batch meanwhile.

    Args:
      batch_size: images in a batch.
      image_size: (height, width) in pixels.

    Returns:
      Whether this process computes on a CPU and has a C library that can keep memory: glibc.
    """
    if batch_size * image_size[0] * image_size[1] >= LARGE_BATCH:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = _glibc("mallopt")
    if mallopt is None or jax.default_backend() != "cpu":
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Returns the memory that `keep_freed_memory` has kept to the kernel.

    For a change from one program to another, whose buffers do not fit into those that the first one has left.
    """
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None and jax.default_backend() == "cpu":
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, or None if it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library
        return None
