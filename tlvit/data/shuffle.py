"""The order of the training images, as a pure function of (seed, epoch, position).

In each epoch the shards are permuted and their records concatenated. This sequence is cut into `streams`
equal parts that are read in parallel. Each part is cut into windows of `window` records, and each window is
permuted. Stream i supplies the i-th part of every batch.

The record at every position of every epoch is therefore known without reading data. A run that resumes in the
middle of an epoch reads at most one window of each stream before its first batch. The windows bound the
memory. A process reads only the streams that its slice of the batches needs. The order depends on the batch
size, the shards and the memory budget, but not on the number of processes.

With repeated augmentation a record fills `repeats` consecutive positions. An epoch has as many positions as
without, so it visits one record in `repeats`. Where several devices share a batch, consecutive positions are
on different devices, because the images of a device are mixed with each other. `Order.positions` has the
places of the positions in a batch.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

from tlvit.data.sources.source import Records

MAX_STREAMS = 16
MIN_WINDOW = 8  # records; with any budget, a corrupt record has others in its window that can replace it
MAP_BYTES = 8192  # reserved for a record's score map in every run, so that maps do not change the order
COPIES = 3  # windows of a stream in memory: the current one, the next one, and what the allocator keeps
STREAM_BYTES = 8 << 20  # of a stream in addition to its windows: buffers of open files, its part of the graph


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a training run, see the top of this file.

    Attributes:
      shard_lengths: number of records of each shard.
      seed: seeds all permutations.
      batch_size: images of a global batch B. An epoch has full batches only, so it leaves out up to B - 1
        images.
      streams: number of parts that are read in parallel; divides B.
      window: number of records that are permuted together in one stream.
      repeats: consecutive positions that a record fills, each with its own augmentation.
      shards: number of devices that share a batch; divides B.
    """

    shard_lengths: tuple[int, ...]
    seed: int
    batch_size: int
    streams: int
    window: int
    repeats: int = 1
    shards: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return sum(self.shard_lengths) // self.batch_size

    @property
    def stream_batch(self) -> int:
        """Images of a batch that come from one stream."""
        return self.batch_size // self.streams

    @property
    def stream_length(self) -> int:
        """Records of a stream in an epoch, including those after the last full batch."""
        return sum(self.shard_lengths) // self.streams

    @property
    def windows_per_epoch(self) -> int:
        """Windows of a stream that contain records of full batches."""
        return self._windows - (self.merged > 0)

    @property
    def merged(self) -> int:
        """Records of a last window below MIN_WINDOW, which are part of the window before it; otherwise 0.

        A window that is not read is not merged, so it does not change the order.
        """
        full, rest = divmod(self.stream_length, self.window)
        return rest if self._windows > full >= 1 and rest < MIN_WINDOW else 0

    @property
    def _windows(self) -> int:
        """Windows of a stream that contain records of full batches, before a short one is merged."""
        return math.ceil(self.steps_per_epoch * self.stream_batch / (self.window * self.repeats))

    def positions(self, index: np.ndarray) -> np.ndarray:
        """The positions, in [0, B), of the images with these indices in a global batch.

        They are the same numbers with one shard or without repeats. Otherwise the shards form groups of at
        least `repeats`, where there are as many, and the positions of a group are dealt out to its shards in
        turn. Groups are as small as possible, so that a process needs few streams.
        """
        if self.repeats == 1:
            return index
        sizes = (size for size in range(1, self.shards + 1) if self.shards % size == 0)
        in_group = next((size for size in sizes if size >= self.repeats), self.shards)
        length = self.batch_size // self.shards
        group, rest = np.divmod(index, in_group * length)
        return group * in_group * length + rest % length * in_group + rest // length

    def window_at(self, step: int) -> int:
        """Number of the window that every stream reads at a step, counted from the start of training."""
        epoch, step = divmod(step, self.steps_per_epoch)
        window = step * self.stream_batch // (self.window * self.repeats)
        return epoch * self.windows_per_epoch + min(window, self.windows_per_epoch - 1)


def make_order(
    shard_lengths: tuple[int, ...],
    *,
    seed: int,
    batch_size: int,
    record_bytes: float,
    shuffle_bytes: int,
    repeats: int = 1,
    shards: int = 1,
) -> Order:
    """Chooses the order that shuffles best within a memory budget: one window of all records if that fits.

    Args:
      shard_lengths: number of records of each shard.
      seed: seeds all permutations.
      batch_size: images of a global batch.
      record_bytes: mean size of a record, bytes.
      shuffle_bytes: host memory of the shuffle, bytes.
      repeats: see `Order`.
      shards: see `Order`.

    Raises:
      ValueError: the images do not fill one batch.
    """
    total = sum(shard_lengths)
    if total < batch_size or batch_size < 1:
        raise ValueError(f"{total} images do not fill one batch of {batch_size}.")
    shard_lengths = tuple(shard_lengths)
    capacity = shuffle_bytes / COPIES / (record_bytes + MAP_BYTES)  # records
    if capacity >= total:
        return Order(shard_lengths, seed, batch_size, 1, total, repeats, shards)
    streams = 1
    # More streams shuffle better, but each needs memory in addition to its windows: at most half the budget.
    limit = min(
        MAX_STREAMS, len(shard_lengths), capacity / MIN_WINDOW, shuffle_bytes / 2 / max(STREAM_BYTES, 1)
    )
    while streams * 2 <= limit and batch_size % (streams * 2) == 0:
        streams *= 2
    capacity = (shuffle_bytes - streams * STREAM_BYTES) / COPIES / (record_bytes + MAP_BYTES)
    window = min(total, max(MIN_WINDOW, int(capacity / streams)))
    return Order(shard_lengths, seed, batch_size, streams, window, repeats, shards)


def shuffle_memory(total: int, record_bytes: float) -> float:
    """Bytes of host memory with which one window holds all records.

    Args:
      total: number of records.
      record_bytes: mean size of a record, bytes.
    """
    return COPIES * total * (record_bytes + MAP_BYTES)


def ordered_records(
    records: Records,
    order: Order,
    *,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    replacements: int = 0,
) -> tf.data.Dataset:
    """The records of one process's slice of every global batch, starting at `first_step`; endless.

    They come in the order of their positions. `batch_permutation` puts those of a batch in their places.

    Args:
      records: maps (shard, offset) to a Dataset of raw records, of any structure of tensors of fixed shape.
      order: the order.
      first_step: the first batch.
      process_index: index p of this process. It gets images [p B / n, (p + 1) B / n) of every batch of B.
      process_count: number n of processes; must divide B.
      replacements: number of further records that come with each record and can replace it. They are the next
        ones of its window.

    Returns:
      Dataset of (raw record, counter), counter = step * B + position in the global batch, int64. With
      replacements, the record's tensors have a leading axis of length 1 + replacements.
    """
    slots = np.sort(_own_positions(order, process_index, process_count))
    stream_of = slots // order.stream_batch
    streams = np.unique(stream_of)
    datasets = []
    for stream in streams:
        wanted = np.zeros(order.stream_batch, bool)
        wanted[slots[stream_of == stream] % order.stream_batch] = True
        datasets.append(_stream_records(records, order, int(stream), wanted, first_step, replacements))
    if len(datasets) == 1:
        return datasets[0]
    turns = tf.data.Dataset.from_tensor_slices(np.searchsorted(streams, stream_of)).repeat()
    return tf.data.Dataset.choose_from_datasets(datasets, turns, stop_on_empty_dataset=False)


def batch_permutation(order: Order, process_index: int = 0, process_count: int = 1) -> np.ndarray | None:
    """The permutation that puts the images of a batch of `ordered_records` in their places.

    Returns:
      For every place in the process's slice of a batch, the index of its image in the order of the records;
      None if that is the same order.
    """
    positions = _own_positions(order, process_index, process_count)
    permutation = np.argsort(np.argsort(positions))
    return None if (np.diff(permutation) == 1).all() else permutation


def process_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    """Images of a global batch that one process reads.

    Raises:
      ValueError: the processes do not divide the batch, or there is no process of this index.
    """
    if batch_size % process_count:
        raise ValueError(f"A batch of {batch_size} images cannot be divided among {process_count} processes.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in [0, {process_count}), not {process_index}.")
    return batch_size // process_count


def segments(
    shard_lengths: tuple[int, ...], shards: tf.Tensor, first: tf.Tensor | int, last: tf.Tensor | int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Locates records [first, last) of a concatenation of shards.

    Args:
      shard_lengths: number of records of each shard.
      shards: int64 [n], the shards in order; one may occur more than once.
      first: scalar, the first record.
      last: scalar, the record after the last; at most the length of the concatenation.

    Returns:
      (shard, offset, count), int64 vectors: what to read, in order.
    """
    lengths = tf.gather(tf.constant(shard_lengths, tf.int64), shards)
    ends = tf.cumsum(lengths)
    starts = ends - lengths
    low, high = tf.maximum(starts, first), tf.minimum(ends, last)
    touched = high > low
    return tuple(tf.boolean_mask(x, touched) for x in (shards, low - starts, high - low))


def read_segments(records: Records, shard: tf.Tensor, offset: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
    """The raw records of some segments, concatenated."""
    parts = tf.data.Dataset.from_tensor_slices((shard, offset, count))
    return parts.flat_map(lambda shard, offset, count: records(shard, offset).take(count))


def window_segments(
    order: Order, stream: int, epoch: tf.Tensor, window: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Locates the records of a stream's window: (shard, offset, count), as `segments`."""
    total = sum(order.shard_lengths)
    seed = tf.stack([tf.constant(order.seed, tf.int64), tf.cast(epoch, tf.int64)])
    shards = tf.random.experimental.stateless_shuffle(
        tf.range(len(order.shard_lengths), dtype=tf.int64), seed=tf.random.fold_in(seed, 0)
    )
    # An epoch starts at a random record, so that its windows and its unused records vary.
    start = tf.random.stateless_uniform([], tf.random.fold_in(seed, 1), 0, total, tf.int64)
    first = (stream * order.stream_length + window * order.window + start) % total
    return segments(order.shard_lengths, tf.tile(shards, [2]), first, first + window_length(order, window))


def window_length(order: Order, window: tf.Tensor) -> tf.Tensor:
    """Number of records of a window; the last one of an epoch can be shorter, or longer by `order.merged`."""
    left = order.stream_length - window * order.window  # records of the stream from this window on
    return tf.where(left <= order.window + order.merged, left, tf.constant(order.window, tf.int64))


def _own_positions(order: Order, process_index: int, process_count: int) -> np.ndarray:
    """The positions of a process's slice of a batch, in the order of their places."""
    local = process_batch_size(order.batch_size, process_index, process_count)
    return order.positions(np.arange(process_index * local, (process_index + 1) * local))


def _stream_records(
    records: Records, order: Order, stream: int, wanted: np.ndarray, first_step: int, replacements: int
) -> tf.data.Dataset:
    """One stream's records, in order: Dataset of (raw record, counter).

    `wanted`, bool [stream_batch], selects the images of each batch that this process needs.
    """

    def load(number: tf.Tensor) -> tf.data.Dataset:
        epoch, window = number // order.windows_per_epoch, number % order.windows_per_epoch
        data = read_segments(records, *window_segments(order, stream, epoch, window))
        data = data.batch(order.window + order.merged)
        return data.map(lambda held: (held, epoch, window))

    def permute(held: Any, epoch: tf.Tensor, window: tf.Tensor) -> tf.data.Dataset:
        length = window_length(order, window)
        permutation = _permutation(held, length, order, stream, epoch, window)
        index, counter = _positions(order, stream, epoch, window, wanted, first_step)

        # Records are copied out of the window one by one, so that a window is in memory only once.
        def take(index: tf.Tensor, counter: tf.Tensor) -> tuple[Any, tf.Tensor]:
            first = index // order.repeats
            chosen = first
            if replacements:
                chosen = (first + tf.range(1 + replacements, dtype=tf.int64)) % length
            chosen = tf.gather(permutation, chosen)
            return tf.nest.map_structure(lambda x: tf.gather(x, chosen), held), counter

        return tf.data.Dataset.from_tensor_slices((index, counter)).map(take)

    windows = tf.data.Dataset.range(order.window_at(first_step), np.iinfo(np.int64).max)
    return windows.flat_map(load).prefetch(1).flat_map(permute)


def _permutation(
    held: Any, length: tf.Tensor, order: Order, stream: int, epoch: tf.Tensor, window: tf.Tensor
) -> tf.Tensor:
    """The permutation of a window, int64 [length], after a check that all of its records were found."""
    found = tf.shape(tf.nest.flatten(held)[0], tf.int64)[0]
    complete = tf.debugging.Assert(
        tf.equal(found, length), ["a shard ends early: found", found, "records instead of", length]
    )
    with tf.control_dependencies([complete]):
        seed = tf.stack([tf.constant(order.seed, tf.int64), epoch])
        seed = tf.random.fold_in(tf.random.fold_in(seed, 2 + stream), window)
    return tf.random.experimental.stateless_shuffle(tf.range(length), seed=seed)


def _positions(
    order: Order, stream: int, epoch: tf.Tensor, window: tf.Tensor, wanted: np.ndarray, first_step: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The positions of a window that are read, by index in the window and by counter, int64 vectors."""
    used = order.steps_per_epoch * order.stream_batch  # positions of the stream in an epoch
    index = tf.range(window_length(order, window) * order.repeats)
    position = (window * order.window) * order.repeats + index
    step, slot = epoch * order.steps_per_epoch + position // order.stream_batch, position % order.stream_batch
    keep = (position < used) & tf.gather(tf.constant(wanted), slot) & (step >= first_step)
    counter = step * order.batch_size + stream * order.stream_batch + slot
    return tf.boolean_mask(index, keep), tf.boolean_mask(counter, keep)
