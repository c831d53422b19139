"""Which record stands where: the order of training as a pure function of (seed, epoch, position).

The shards of an epoch, permuted, form one long line of records. It is cut into `lanes` equal pieces that are
read side by side, each piece into windows of `window` records, and each window is permuted as a whole. Lane i
supplies the i-th part of every batch. So every position of every epoch is known without reading anything;
starting in the middle reads at most one window of each lane; memory is bounded by the windows; and a process
of a pod reads only the lanes that its slice of the batches needs. The order depends on the batch size, the
shards and the memory budget, but not on the processes.

With repeated augmentation a record takes `repeats` places in a row and an epoch has as many places as before,
so it visits one record in `repeats`.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from tlvit.data.sources.source import Records

MAX_LANES = 16
MIN_WINDOW = 8  # records: whatever the budget, one that is broken has others beside it to take its place
MAP_BYTES = 8192  # kept for a record's score map, with or without one, so that maps do not change the order
COPIES = 3  # windows of a lane in memory: the one in use, the next one, and what the allocator keeps
LANE_BYTES = 8 << 20  # of a lane beside its windows: buffers of open files, its part of the graph


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a training run; see the top of this file.

    Attributes:
      shard_lengths: records of each shard.
      seed: seed of all permutations.
      batch_size: images of a global batch B; whole batches only, so up to B - 1 images of an epoch are left
        out.
      lanes: number of pieces read side by side; divides B.
      window: records permuted together in one lane.
      repeats: places in a row that a record takes, each with an augmentation of its own.
    """

    shard_lengths: tuple[int, ...]
    seed: int
    batch_size: int
    lanes: int
    window: int
    repeats: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.shard_lengths) // self.batch_size

    @property
    def block(self) -> int:
        """Images of a batch that come from one lane."""
        return self.batch_size // self.lanes

    @property
    def lane_length(self) -> int:
        """Records of a lane's piece of an epoch; those after the last whole batch stay unused."""
        return sum(self.shard_lengths) // self.lanes

    @property
    def windows_per_epoch(self) -> int:
        """Windows of a lane that hold records of whole batches."""
        return math.ceil(self.steps_per_epoch * self.block / (self.window * self.repeats))

    def window_of(self, step: int) -> int:
        """Number, counted from the start of training, of the window that each lane is in at a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch * self.windows_per_epoch + place * self.block // (self.window * self.repeats)


def make_order(
    shard_lengths: tuple[int, ...],
    *,
    seed: int,
    batch_size: int,
    record_bytes: float,
    shuffle_bytes: int,
    repeats: int = 1,
) -> Order:
    """The order that mixes best within `shuffle_bytes` of host memory; one window of all records where that
    fits.

    Raises:
      ValueError: the images do not fill one batch, or a record is to come less than once.
    """
    total = sum(shard_lengths)
    if total < batch_size or batch_size < 1:
        raise ValueError(f"{total} images do not fill one batch of {batch_size}")
    if repeats < 1:
        raise ValueError(f"an image cannot come {repeats} times in a row: repeats must be at least 1")
    lengths, most = tuple(shard_lengths), shuffle_bytes / COPIES / (record_bytes + MAP_BYTES)
    if most >= total:
        return Order(lengths, seed, batch_size, lanes=1, window=total, repeats=repeats)
    lanes = 1
    # More lanes mix better, but each needs memory beside its windows: half of the budget at most.
    fit = min(MAX_LANES, len(lengths), most / MIN_WINDOW, shuffle_bytes / 2 / max(LANE_BYTES, 1))
    while lanes * 2 <= fit and batch_size % (lanes * 2) == 0:
        lanes *= 2
    most = (shuffle_bytes - lanes * LANE_BYTES) / COPIES / (record_bytes + MAP_BYTES)
    return Order(
        lengths,
        seed,
        batch_size,
        lanes,
        window=min(total, max(MIN_WINDOW, int(most / lanes))),
        repeats=repeats,
    )


def ordered_records(
    records: Records,
    order: Order,
    *,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    spares: int = 0,
) -> tf.data.Dataset:
    """This process's slice of every global batch from `first_step` on, without end.

    Args:
      records: (shard, offset) -> Dataset of raw records of a shard, of any structure of tensors of fixed
        shape.
      order: the order.
      first_step: the batch to start with.
      process_index: this process; it gets images [p B / n, (p + 1) B / n) of every global batch.
      process_count: number of processes n; must divide B.
      spares: give with each record this many others that can take its place, the next ones of its window.

    Returns:
      Dataset of (raw record, counter): counter = step * B + index in the global batch, int64. With spares the
      record's tensors have a leading axis of 1 + spares.
    """
    if order.batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(f"a batch of {order.batch_size} has no slice {process_index} of {process_count}")
    share = order.batch_size // process_count
    slots = np.arange(process_index * share, (process_index + 1) * share)
    lanes = np.unique(slots // order.block)
    streams = [_lane_records(records, order, int(lane), first_step, slots, spares) for lane in lanes]
    if len(streams) == 1:
        return streams[0]
    turns = tf.data.Dataset.from_tensor_slices(np.searchsorted(lanes, slots // order.block)).repeat()
    return tf.data.Dataset.choose_from_datasets(streams, turns, stop_on_empty_dataset=False)


def segments(shard_lengths: tuple[int, ...], shards: tf.Tensor, first: tf.Tensor, last: tf.Tensor):
    """Where records [first, last) of a line of shards lie.

    Args:
      shard_lengths: records of each shard.
      shards: int64 [n], the shards in the order of the line; the line may hold one more than once.
      first: scalar; last: scalar, at most the length of the line.

    Returns:
      (shard, offset, count), int64 vectors: what to read, in order.
    """
    lengths = tf.gather(tf.constant(shard_lengths, tf.int64), shards)
    ends = tf.cumsum(lengths)
    starts = ends - lengths
    low, high = tf.maximum(starts, first), tf.minimum(ends, last)
    touched = high > low
    return tuple(tf.boolean_mask(x, touched) for x in (shards, low - starts, high - low))


def window_segments(order: Order, lane: int, epoch: tf.Tensor, window: tf.Tensor):
    """What to read for one window of a lane: (shard, offset, count), int64 vectors; windows count from 0."""
    total = sum(order.shard_lengths)
    seed = tf.stack([tf.constant(order.seed, tf.int64), tf.cast(epoch, tf.int64)])
    shards = tf.random.experimental.stateless_shuffle(
        tf.range(len(order.shard_lengths), dtype=tf.int64), seed=tf.random.fold_in(seed, 0)
    )
    # The line starts at a random record, so that windows and remainders do not always fall on the same ones.
    turn = tf.random.stateless_uniform([], tf.random.fold_in(seed, 1), 0, total, tf.int64)
    first = (lane * order.lane_length + window * order.window + turn) % total
    return segments(order.shard_lengths, tf.tile(shards, [2]), first, first + window_length(order, window))


def window_length(order: Order, window: tf.Tensor) -> tf.Tensor:
    """Records of a lane's window; the last one of an epoch can be shorter."""
    return tf.minimum(tf.constant(order.window, tf.int64), order.lane_length - window * order.window)


def read_segments(records: Records, shard: tf.Tensor, offset: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
    """The raw records of some segments, one after the other."""
    parts = tf.data.Dataset.from_tensor_slices((shard, offset, count))
    return parts.flat_map(lambda shard, offset, count: records(shard, offset).take(count))


def _lane_records(
    records: Records, order: Order, lane: int, first_step: int, slots: np.ndarray, spares: int
) -> tf.data.Dataset:
    """One lane's records, in order, that fill `slots` of the batches: Dataset of (raw record, counter)."""
    used = order.steps_per_epoch * order.block  # places of an epoch that this lane fills
    per_epoch = order.windows_per_epoch
    wanted = np.zeros(order.block, bool)
    wanted[slots[slots // order.block == lane] % order.block] = True

    def load(number):
        epoch, window = number // per_epoch, number % per_epoch
        data = read_segments(records, *window_segments(order, lane, epoch, window)).batch(order.window)
        return data.map(lambda held: (held, epoch, window))

    def serve(held, epoch, window):
        length = window_length(order, window)
        found = tf.shape(tf.nest.flatten(held)[0], tf.int64)[0]
        complete = tf.debugging.Assert(
            tf.equal(found, length),
            ["a shard ends early: records found", found, "of the", length, "promised"],
        )
        with tf.control_dependencies([complete]):
            seed = tf.stack([tf.constant(order.seed, tf.int64), epoch])
            seed = tf.random.fold_in(tf.random.fold_in(seed, 2 + lane), window)
        picks = tf.random.experimental.stateless_shuffle(tf.range(length), seed=seed)
        place = (window * order.window) * order.repeats + tf.range(
            length * order.repeats
        )  # in the lane's epoch
        keep = (place < used) & tf.gather(tf.constant(wanted), place % order.block)
        keep &= epoch * order.steps_per_epoch + place // order.block >= first_step
        index, place = (tf.boolean_mask(x, keep) for x in (tf.range(length * order.repeats), place))
        step = epoch * order.steps_per_epoch + place // order.block
        counter = step * order.batch_size + lane * order.block + place % order.block

        # Records are copied out of the window one by one, so that a window is in memory only once.
        def take(index, counter):
            nth = index // order.repeats
            chosen = tf.gather(
                picks, (nth + tf.range(1 + spares, dtype=tf.int64)) % length if spares else nth
            )
            return tf.nest.map_structure(lambda x: tf.gather(x, chosen), held), counter

        return tf.data.Dataset.from_tensor_slices((index, counter)).map(take)

    windows = tf.data.Dataset.range(order.window_of(first_step), np.iinfo(np.int64).max)
    return windows.flat_map(load).prefetch(1).flat_map(serve)
