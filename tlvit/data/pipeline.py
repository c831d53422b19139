"""From a source and its score maps to batches: shuffled and augmented ones, or every image once in order.

Everything between the files and a finished batch runs in tf.data's own threads, without Python; random
choices depend on (seed, step, place in the batch) alone, so neither threads nor processes nor a restart
change a batch.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from tlvit.data import transforms
from tlvit.data.order import Order, make_order, ordered_records, read_segments, segments, window_segments
from tlvit.data.score_maps import ScoreMapReader, label_maps, verify_shard
from tlvit.data.sources import Source
from tlvit.types import Batch, ScoreMaps

SHUFFLE_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class KeyedBatch:
    """A batch and the keys of its images; padding (mask False, at the end) has no key."""

    batch: Batch
    keys: tuple[str, ...]


def train_batches(
    source: Source,
    maps: ScoreMapReader | None = None,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    seed: int,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    interpolation: transforms.Interpolation = "random",
    label_crop: transforms.LabelCrop = "aligned",
    allow_missing_maps: float = 0.0,
    shuffle_bytes: int = SHUFFLE_BYTES,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Augmented batches of one process, without end; each epoch is a new order of whole batches.

    Args:
      source: the images.
      maps: their score maps, or None for a run without token labels.
      batch_size: images of the global batch; this process gets batch_size / process_count of them.
      image_size: (H, W).
      seed: of order and augmentation.
      first_step: start with this batch; equal, bit for bit, to what a run from 0 gives from there on.
      process_index: this process; process_count: number of processes, which share one global order.
      scale, ratio, hflip, interpolation, label_crop: see `transforms.train_image`.
      allow_missing_maps: largest share of images that may lack a map; their target is their label everywhere.
      shuffle_bytes: host memory that the shuffle may hold, of encoded images and maps.
      num_threads: threads that decode; None: one for each core.

    Raises:
      ValueError: here, if the maps are not the source's or the images fill no batch; while iterating, if a
        map belongs to another image or a shard is damaged.
    """
    records, parse = (
        (source.records, source.parse) if maps is None else _with_maps(source, maps, allow_missing_maps)
    )
    order = train_order(source, batch_size=batch_size, seed=seed, shuffle_bytes=shuffle_bytes)
    threads = num_threads or available_cores()

    def prepare(raw, counter):
        example = parse(raw)
        image, geometry = transforms.train_image(
            example.pop("image"),
            tf.stack([tf.constant(seed, tf.int64), counter]),
            image_size=image_size,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            interpolation=interpolation,
            label_crop=label_crop,
        )
        del example["key"]
        return example | {"image": image, "geometry": geometry, "label": tf.cast(example["label"], tf.int32)}

    data = ordered_records(
        records, order, first_step=first_step, process_index=process_index, process_count=process_count
    )
    data = data.map(prepare, num_parallel_calls=threads, deterministic=True)
    data = data.batch(batch_size // process_count, drop_remainder=True).prefetch(2)
    return _iterate(data, threads, lambda step: _name_damage(source, maps, order, first_step + step))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    crop_pct: float = 0.9,
    interpolation: str = "bicubic",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Every image of the split exactly once over all processes; all processes give the same number of
    batches.

    Process p of n reads images [p ceil(N / n), (p + 1) ceil(N / n)) in the source's order. Batches have
    batch_size / process_count images; the last ones are filled with zeros whose mask is False.

    Args: as in `train_batches` and `transforms.eval_image`.

    Raises:
      ValueError: the processes do not divide the batch, or a shard is damaged.
    """
    local = _local_batch(batch_size, process_index, process_count)
    share = -(-source.num_examples // process_count)
    first = min(process_index * share, source.num_examples)
    last = min(first + share, source.num_examples)
    lines = tf.range(len(source.shard_lengths), dtype=tf.int64)
    raw = read_segments(source.records, *segments(source.shard_lengths, lines, first, last))
    transform = lambda encoded: transforms.eval_image(
        encoded, image_size=image_size, crop_pct=crop_pct, interpolation=interpolation
    )
    filled = (item.batch for item in _in_order(source, raw, transform, local, num_threads))
    missing = -(-share // local) - -(-(last - first) // local)
    return itertools.chain(filled, (_empty_batch(local, image_size) for _ in range(missing)))


def annotation_batches(
    source: Source,
    shard_index: int,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    num_threads: int | None = None,
) -> Iterator[KeyedBatch]:
    """The images of one shard in record order, each squashed as a whole to (H, W), with their keys.

    The last batch is filled up with zeros whose mask is False.
    """
    raw = source.records(shard_index, 0)
    transform = lambda encoded: transforms.whole_image(encoded, image_size=image_size)
    yield from _in_order(source, raw, transform, batch_size, num_threads)


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Whole global batches in an epoch."""
    return source.num_examples // batch_size


def train_order(source: Source, *, batch_size: int, seed: int, shuffle_bytes: int = SHUFFLE_BYTES) -> Order:
    """The order in which `train_batches` reads a source."""
    return make_order(
        source.shard_lengths,
        seed=seed,
        batch_size=batch_size,
        record_bytes=source.record_bytes,
        shuffle_bytes=shuffle_bytes,
    )


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_maps(source: Source, maps: ScoreMapReader, allow_missing: float):
    """(records, parse) of a source zipped with its maps; every key is checked when a record is parsed."""
    map_records = maps.records_of(source)
    info = maps.info
    if info.num_missing > allow_missing * info.num_images:
        raise ValueError(
            f"{info.num_missing} of {info.num_images} images have no score map in {maps.path}; "
            f"at most a share of {allow_missing} is allowed (allow_missing_maps)"
        )

    def records(shard, offset):
        pairs = tf.data.Dataset.zip(source.records(shard, offset), map_records(shard, offset))
        return pairs.map(lambda image, score_map: {"image": image, "map": score_map})

    def parse(raw):
        example, score_map = source.parse(raw["image"]), maps.parse(raw["map"])
        same = tf.equal(example["key"], score_map["key"])
        said = ["score map of another image: the image is", example["key"], "but its map in"]
        check = tf.debugging.Assert(same, [*said, maps.path, "belongs to", score_map["key"]])
        with tf.control_dependencies([check]):
            value, index = tf.identity(score_map["value"]), tf.identity(score_map["index"])
        if info.num_missing:
            make = lambda: label_maps(example["label"], info)
            value, index = tf.cond(score_map["missing"], make, lambda: (value, index))
        return example | {"value": value, "index": index}

    return records, parse


def _in_order(
    source: Source, raw: tf.data.Dataset, transform: Callable, batch_size: int, num_threads: int | None
) -> Iterator[KeyedBatch]:
    """Transformed records as they come, the last batch padded."""
    threads = num_threads or available_cores()

    def prepare(raw):
        example = source.parse(raw)
        image, geometry = transform(example["image"])
        label = tf.cast(example["label"], tf.int32)
        return {"image": image, "geometry": geometry, "label": label}, example["key"]

    data = raw.map(prepare, num_parallel_calls=threads, deterministic=True).batch(batch_size).prefetch(2)
    for arrays, keys in _run(data, threads, lambda step: _name_damage(source, None, None, step)):
        yield KeyedBatch(_pad(_to_batch(arrays), batch_size), tuple(key.decode() for key in keys))


def _iterate(data: tf.data.Dataset, threads: int, blame: Callable[[int], str]) -> Iterator[Batch]:
    for arrays in _run(data, threads, blame):
        yield _to_batch(arrays)


def _run(data: tf.data.Dataset, threads: int, blame: Callable[[int], str]) -> Iterator:
    """The data set's elements in numpy; TensorFlow's errors become ValueErrors that say what is wrong.

    `blame` names the damaged file, given the number of batches that came before it.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.experimental_optimization.inject_prefetch = False
    iterator = data.with_options(options).as_numpy_iterator()
    count = 0
    while True:
        try:
            element = next(iterator)
        except StopIteration:
            return
        except tf.errors.DataLossError as error:
            raise ValueError(blame(count)) from error
        except tf.errors.OpError as error:
            raise ValueError(_plain(error.message)) from error
        yield element
        count += 1


def _plain(message: str) -> str:
    """The sentence in an error of TensorFlow, without the names of its graph's nodes."""
    _, found, said = message.partition("assertion failed: ")
    if found:
        words = said.splitlines()[0].strip()[1:-1].split("] [")
        return " ".join(words)
    line = message.splitlines()[0]
    return "reading images failed: " + line.rpartition("}} ")[2].replace(" [Op:IteratorGetNext] name: ", "")


def _name_damage(source: Source, maps: ScoreMapReader | None, order: Order | None, step: int) -> str:
    """Which file near a step of training is damaged; without an order, all of the source's files are read."""
    shards = range(len(source.shard_lengths)) if order is None else _shards_near(order, step)
    for shard in shards:
        try:
            for _ in tf.data.TFRecordDataset(source.files[shard]):
                pass
        except tf.errors.DataLossError as error:
            return f"image shard {source.files[shard]} is damaged: {_plain(error.message)}"
    for number in range(len(maps.files)) if maps else ():
        try:
            verify_shard(maps, number)
        except ValueError as error:
            return str(error)
    return f"a shard of {source.identity} is damaged"


def _shards_near(order: Order, step: int) -> list[int]:
    """Shards that are being read while batch `step` is made: those of its windows and of the next two."""
    epoch, place = divmod(step, order.steps_per_epoch)
    number = epoch * order.windows_per_epoch + place * order.block // order.window
    found = set()
    for lane in range(order.lanes):
        for n in range(number, number + 3):
            epoch, window = (tf.constant(x, tf.int64) for x in divmod(n, order.windows_per_epoch))
            found.update(window_segments(order, lane, epoch, window)[0].numpy().tolist())
    return sorted(found)


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(f"a batch of {batch_size} has no slice {process_index} of {process_count}")
    return batch_size // process_count


def _to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    maps = ScoreMaps(value=arrays["value"], index=arrays["index"]) if "value" in arrays else None
    return Batch(
        image=arrays["image"],
        label=arrays["label"],
        mask=np.ones(len(arrays["label"]), bool),
        maps=maps,
        geometry=arrays["geometry"],
    )


def _pad(batch: Batch, size: int) -> Batch:
    """Fill an image-only batch up to `size` with zeros whose mask is False."""
    count = size - len(batch.label)
    if not count:
        return batch
    grow = lambda x: np.concatenate([x, np.zeros((count, *x.shape[1:]), x.dtype)])
    return Batch(grow(batch.image), grow(batch.label), grow(batch.mask), None, grow(batch.geometry))


def _empty_batch(size: int, image_size: tuple[int, int]) -> Batch:
    empty = Batch(
        image=np.zeros((0, *image_size, 3), np.uint8),
        label=np.zeros(0, np.int32),
        mask=np.zeros(0, bool),
        maps=None,
        geometry=np.zeros((0, 2, 3), np.float32),
    )
    return _pad(empty, size)
