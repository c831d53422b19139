"""Copies batches from the host to the devices, some steps ahead."""

import collections
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from tlvit.training.mesh import batch_sharding
from tlvit.types import PyTree


class Prefetch:
    """Iterates over global batches, with `depth` of them on their way to the devices.

    Attributes:
      wait_s: seconds that `next` has waited for the host's pipeline since this was last set to 0.
    """

    def __init__(self, batches: Iterator[PyTree], mesh: Mesh, *, depth: int = 2):
        if depth < 1:
            raise ValueError(f"Prefetching needs a depth of at least 1, not {depth}.")
        self._batches, self._mesh, self._depth = iter(batches), mesh, depth
        self._ready: collections.deque = collections.deque()
        self.wait_s = 0.0

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> PyTree:
        while len(self._ready) < self._depth:
            start = time.perf_counter()
            batch = next(self._batches, None)
            self.wait_s += time.perf_counter() - start
            if batch is None:
                break
            self._ready.append(to_global(batch, self._mesh))
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()


def to_global(batch: PyTree, mesh: Mesh) -> PyTree:
    """Turns this process's part of a batch (NumPy arrays) into global arrays that are split over the mesh.

    It returns before the copy is done.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
