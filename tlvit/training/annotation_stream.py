"""Scores the images of shards without waiting: batches are read ahead, and results are fetched while the
devices compute the next ones."""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tlvit.types import Array

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow
    from tlvit.data.batching import KeyedBatch

DEPTH = 3  # batches whose scores are computed or fetched
Scores = tuple[Array, Array, Array]  # value and index [B, K, h, w], best class of the mean map [B]
Fetched = tuple[np.ndarray, np.ndarray, np.ndarray]


class DeviceClock:
    """Measures how long the devices had nothing to compute.

    The time before the first batch and after the last one does not count. A batch counts as computed until
    its scores are complete; the time in which its images are copied belongs to it.

    Attributes:
      idle_s: seconds without a batch.
      batches: number of batches that are complete.

    Example:
      >>> clock = DeviceClock()
      >>> clock.started()
      >>> clock.finished()
      >>> clock.idle_fraction
      0.0
    """

    def __init__(self):
        self.idle_s, self.batches = 0.0, 0
        self._lock, self._running = threading.Lock(), 0
        self._first: float | None = None
        self._last = 0.0

    def started(self) -> None:
        """A batch is given to the devices."""
        with self._lock:
            now = time.perf_counter()
            if self._first is None:
                self._first = now
            elif not self._running:
                self.idle_s += now - self._last
            self._running += 1

    def finished(self) -> None:
        """The scores of the oldest batch are complete."""
        with self._lock:
            self._last = time.perf_counter()
            self._running -= 1
            self.batches += 1

    @property
    def seconds(self) -> float:
        """From the start of the first batch to the end of the last one."""
        return 0.0 if self._first is None else self._last - self._first

    @property
    def idle_fraction(self) -> float:
        """The fraction of these seconds in which the devices waited for images, in [0, 1]."""
        return self.idle_s / self.seconds if self.idle_s else 0.0


@dataclasses.dataclass(frozen=True)
class ShardScores:
    """The scores of a shard's n images: keys, value and index [n, K, h, w], missing bool [n].

    `agreed` is the number of images whose label is the best class of their mean map.
    """

    keys: list[str]
    value: np.ndarray
    index: np.ndarray
    missing: np.ndarray
    agreed: int


class ShardParts:
    """The scores of a shard's batches, until all of them have come."""

    def __init__(self):
        self.keys: list[str] = []
        self._values: list[np.ndarray] = []
        self._indices: list[np.ndarray] = []
        self._present: list[np.ndarray] = []
        self._agreed = 0

    def add(self, item: "KeyedBatch", scores: Fetched) -> None:
        """Adds the scores of the next batch."""
        (value, index, best), count = scores, len(item.keys)
        self.keys += item.keys
        self._values.append(value[:count])
        self._indices.append(index[:count])
        self._present.append(item.batch.mask[:count])
        self._agreed += int(np.sum((best[:count] == item.batch.label[:count]) & self._present[-1]))

    def joined(self) -> ShardScores:
        """The scores of the whole shard."""
        value, index = np.concatenate(self._values), np.concatenate(self._indices)
        return ShardScores(self.keys, value, index, ~np.concatenate(self._present), self._agreed)


def scored_batches(
    shards: Sequence[int],
    open_shard: Callable[[int], "Iterable[KeyedBatch]"],
    score: Callable[["KeyedBatch"], Scores],
    clock: DeviceClock,
) -> "Iterator[tuple[int, KeyedBatch, Fetched]]":
    """The scores of all batches of some shards, in order.

    After an error in reading a batch, the scores of the batches before it still come, then the error.

    Args:
      shards: indices of shards.
      open_shard: the batches of a shard. The next shard is opened, in another thread, while one is read.
      score: starts to score a batch. It may return before the scores are computed.
      clock: is told when the devices have work.

    Yields:
      (shard, batch, its scores on the host).
    """
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1, "fetch") as fetcher:
        try:
            for shard, item in read_ahead(shards, open_shard):
                clock.started()
                scores = score(item)
                _start_copies(scores)
                waiting.append((shard, item, fetcher.submit(_fetch, scores, clock)))
                if len(waiting) == DEPTH:
                    yield _result(waiting.popleft())
        except Exception as error:  # GeneratorExit and KeyboardInterrupt end at once
            while waiting:
                yield _result(waiting.popleft())
            raise error
        while waiting:
            yield _result(waiting.popleft())


def read_ahead(
    shards: Sequence[int], open_shard: Callable[[int], "Iterable[KeyedBatch]"]
) -> "Iterator[tuple[int, KeyedBatch]]":
    """(shard, batch) for all batches of the shards. The first batch of the next shard is read in advance."""

    def first(shard: int) -> "tuple[Iterator[KeyedBatch], KeyedBatch | None]":
        batches = iter(open_shard(shard))
        return batches, next(batches, None)

    with concurrent.futures.ThreadPoolExecutor(1, "open") as opener:
        opened = [opener.submit(first, shard) for shard in shards[:1]]
        for position, shard in enumerate(shards):
            batches, item = opened.pop().result()
            opened += [opener.submit(first, following) for following in shards[position + 1 : position + 2]]
            while item is not None:
                yield shard, item
                item = next(batches, None)


def _start_copies(scores: Scores) -> None:
    for array in scores:
        if isinstance(array, jax.Array):
            array.copy_to_host_async()


def _fetch(scores: Scores, clock: DeviceClock) -> Fetched:
    """Waits for the scores, in a thread of its own."""
    jax.block_until_ready(scores)
    clock.finished()
    return jax.device_get(scores)


def _result(waiting: tuple[int, Any, concurrent.futures.Future]) -> tuple[int, Any, Fetched]:
    shard, item, fetched = waiting
    return shard, item, fetched.result()
