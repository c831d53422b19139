"""From a source and its score maps to batches: shuffled and augmented ones, or every image once in order.

Everything between the files and a finished batch runs in tf.data's own threads, without Python; random
choices depend on (seed, step, place in the batch) alone, so neither threads nor processes nor a restart
change a batch.
"""

import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from tlvit.data import corruption as faults
from tlvit.data.score_maps.reader import ScoreMapReader, label_maps, map_matrix
from tlvit.data.shuffle import Order, make_order, ordered_records, read_segments, segments
from tlvit.data.sources.source import Source
from tlvit.data.transforms import crop as transforms
from tlvit.ops.randaugment_policy import parse_policy
from tlvit.types import Batch, ScoreMaps

SHUFFLE_BYTES = 2 << 30

log = logging.getLogger("tlvit")


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
    randaugment: str = "",
    three_augment: bool = False,
    color_jitter: float = 0.0,
    exact_resize: bool = False,
    allow_missing_maps: float = 0.0,
    repeats: int = 1,
    max_bad: float = 0.001,
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
      randaugment: policy string like "rand-m9-n2-mstd0.5-inc1", or "" for none.
      three_augment, color_jitter, exact_resize: see `transforms.train_image`.
      allow_missing_maps: largest share of images that may lack a map; their target is their label everywhere.
      repeats: repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335): an image takes so many places in
        a row, each with an augmentation of its own; an epoch has as many steps and one in `repeats` images.
      max_bad: largest share of images that may be broken; the next image in the order takes the place of one.
      shuffle_bytes: host memory that the shuffle may hold, of encoded images and maps.
      num_threads: threads that decode; None: one for each core.

    Raises:
      ValueError: here, if the maps are not the source's or the images fill no batch; while iterating, if a
        map belongs to another image, a shard is damaged or stays lost, or too many images are broken.
    """
    records, parse = (
        (source.records, source.parse) if maps is None else _with_maps(source, maps, allow_missing_maps)
    )
    local = _local_batch(batch_size, process_index, process_count)
    order = train_order(
        source, batch_size=batch_size, seed=seed, shuffle_bytes=shuffle_bytes, repeats=repeats
    )
    threads = num_threads or available_cores()
    policy = parse_policy(randaugment)

    def prepare(raw, counter):
        example = parse(raw)
        encoded = faults.whole_jpeg(example.pop("image"))
        image, geometry = transforms.train_image(
            encoded,
            tf.stack([tf.constant(seed, tf.int64), counter]),
            image_size=image_size,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            interpolation=interpolation,
            label_crop=label_crop,
            randaugment_policy=policy,
            three_augment=three_augment,
            color_jitter=color_jitter,
            exact_resize=exact_resize,
        )
        if maps is not None and maps.info.geometry != "full":
            geometry = transforms.compose(map_matrix(encoded, maps.info), geometry)
        return example | {"image": image, "geometry": geometry, "label": tf.cast(example["label"], tf.int32)}

    broken = faults.BrokenImages(source, max_bad=max_bad, limit="data.max_bad", replaced=True)
    key_of = lambda raw: parse(raw)["key"]

    def batches(done, guarded):
        known = frozenset(broken.keys)
        data = ordered_records(
            records,
            order,
            first_step=first_step + done,
            process_index=process_index,
            process_count=process_count,
            spares=faults.SPARES if guarded or known else 0,
        )

        def whole(raw, counter):
            raw = faults.avoid_broken(raw, known, key_of) if known else raw
            return _same_image(prepare(raw, counter))

        if guarded:
            data = faults.replace_broken(data, prepare, key_of, threads=threads).map(_same_image)
        else:
            data = data.map(whole, num_parallel_calls=threads, deterministic=True)
        return data.batch(local, drop_remainder=True).prefetch(2)

    blame = lambda done: faults.name_damage(source, maps, order, first_step + done)
    arrays = faults.run(batches, threads=threads, broken=broken, blame=blame)
    return map(_to_batch, _log_restart(arrays, order, first_step) if first_step else arrays)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    crop_pct: float = 0.9,
    interpolation: str = "bicubic",
    process_index: int = 0,
    process_count: int = 1,
    max_bad: float = 0.0,
    num_threads: int | None = None,
) -> Iterator[Batch]:
    """Every image of the split exactly once over all processes; all processes give the same number of
    batches.

    Process p of n reads images [p ceil(N / n), (p + 1) ceil(N / n)) in the source's order. Batches have
    batch_size / process_count images; the last ones are filled with zeros whose mask is False. So are the
    places of broken images, as far as max_bad allows any. Sources with sets of labels (ReaL) fill `real`.

    Args: as in `train_batches` and `transforms.eval_image`.

    Raises:
      ValueError: the processes do not divide the batch, a shard is damaged or stays lost, or too many images
        are broken.
    """
    local = _local_batch(batch_size, process_index, process_count)
    share = -(-source.num_examples // process_count)
    first = min(process_index * share, source.num_examples)
    last = min(first + share, source.num_examples)
    line = tf.range(len(source.shard_lengths), dtype=tf.int64)

    def raw(done):
        start = min(first + done * local, last)
        return read_segments(source.records, *segments(source.shard_lengths, line, start, last))

    transform = lambda encoded: transforms.eval_image(
        encoded, image_size=image_size, crop_pct=crop_pct, interpolation=interpolation
    )
    items = _in_order(
        source,
        raw,
        transform,
        batch_size=local,
        image_size=image_size,
        max_bad=max_bad,
        limit="eval.max_bad",
        num_threads=num_threads,
    )
    missing = -(-share // local) - -(-(last - first) // local)
    empty = _empty_batch(local, image_size, source.max_real)
    return itertools.chain((item.batch for item in items), itertools.repeat(empty, missing))


def annotation_batches(
    source: Source,
    shard_index: int,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    max_bad: float = 0.0,
    num_threads: int | None = None,
) -> Iterator[KeyedBatch]:
    """The images of one shard in record order, each squashed as a whole to (H, W), with their keys.

    The last batch is filled up with zeros whose mask is False. The mask of a broken image is False as well,
    as far as max_bad (of the whole source) allows any; it keeps its key and its place.
    """
    raw = lambda done: source.records(shard_index, done * batch_size)
    transform = lambda encoded: transforms.whole_image(encoded, image_size=image_size)
    yield from _in_order(
        source,
        raw,
        transform,
        batch_size=batch_size,
        image_size=image_size,
        max_bad=max_bad,
        limit="--max-missing",
        num_threads=num_threads,
    )


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Whole global batches in an epoch."""
    return source.num_examples // batch_size


def train_order(
    source: Source, *, batch_size: int, seed: int, shuffle_bytes: int = SHUFFLE_BYTES, repeats: int = 1
) -> Order:
    """The order in which `train_batches` reads a source."""
    return make_order(
        source.shard_lengths,
        seed=seed,
        batch_size=batch_size,
        record_bytes=source.record_bytes,
        shuffle_bytes=shuffle_bytes,
        repeats=repeats,
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
            f"at most a share of {allow_missing} is allowed (data.allow_missing_maps)"
        )

    def records(shard, offset):
        pairs = tf.data.Dataset.zip(source.records(shard, offset), map_records(shard, offset))
        return pairs.map(lambda image, score_map: {"image": image, "map": score_map})

    def parse(raw):
        example, score_map = source.parse(raw["image"]), maps.parse(raw["map"])
        value, index = score_map["value"], score_map["index"]
        if info.num_missing:
            make = lambda: label_maps(example["label"], info)
            value, index = tf.cond(score_map["missing"], make, lambda: (value, index))
        owner = {"map_key": score_map["key"], "map_folder": tf.constant(maps.path)}
        return example | owner | {"value": value, "index": index}

    return records, parse


def _same_image(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """What goes into a batch, once it is certain that the map is the image's own.

    This comes after an image is decoded and not before, so that the error is not taken for a broken image.
    """
    rest = {k: v for k, v in example.items() if k not in ("key", "map_key", "map_folder", "real")}
    if "map_key" not in example:
        return rest
    said = ["score map of another image: the image is", example["key"], "but its map in"]
    said += [example["map_folder"], "belongs to", example["map_key"]]
    with tf.control_dependencies([tf.debugging.Assert(tf.equal(example["key"], example["map_key"]), said)]):
        return rest | {"value": tf.identity(example["value"])}


def _in_order(
    source: Source,
    raw: Callable[[int], tf.data.Dataset],
    transform: Callable,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    max_bad: float,
    limit: str,
    num_threads: int | None,
) -> Iterator[KeyedBatch]:
    """Transformed records as they come, the last batch padded; raw: batches to leave out -> raw records."""
    threads = num_threads or available_cores()

    def prepare(record):
        example = source.parse(record)
        image, geometry = transform(faults.whole_jpeg(example["image"]))
        label = tf.cast(example["label"], tf.int32)
        return example | {"image": image, "geometry": geometry, "label": label, "mask": True, "broken": ""}

    def blank(spec, record):
        del spec
        # The key alone: the image of a record is not read for it.
        key, label = source.parse(record)["key"], tf.constant(0)
        real = {"real": tf.fill([source.max_real], tf.constant(-1, tf.int64))} if source.max_real else {}
        image, geometry = tf.zeros([*image_size, 3], tf.uint8), tf.zeros([2, 3])
        fields = {
            "image": image,
            "geometry": geometry,
            "label": label,
            "mask": False,
            "broken": key,
            "key": key,
        }
        return fields | real

    def batches(done, guarded):
        if guarded:
            attempt = lambda i, record: prepare(record)
            data = faults.first_good(raw(done), attempt, blank, count=1, threads=threads)
        else:
            data = raw(done).map(prepare, num_parallel_calls=threads, deterministic=True)
        return data.batch(batch_size).prefetch(2)

    broken = faults.BrokenImages(source, max_bad=max_bad, limit=limit, replaced=False)
    blame = lambda done: faults.name_damage(source, None, None, done)
    for arrays in faults.run(batches, threads=threads, broken=broken, blame=blame):
        keys = tuple(key.decode() for key in arrays.pop("key"))
        yield KeyedBatch(_pad(_to_batch(arrays), batch_size), keys)


def _log_restart(arrays: Iterator, order: Order, first_step: int) -> Iterator:
    """Say how long it took to get to where a run goes on: the cost of a restart."""
    start = time.perf_counter()
    for number, element in enumerate(arrays):
        if not number:
            epoch, place = divmod(first_step, order.steps_per_epoch)
            log.info(
                "data: on from batch %d of %d in epoch %d after %.1f s",
                place, order.steps_per_epoch, epoch, time.perf_counter() - start,
            )  # fmt: skip
        yield element


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(f"a batch of {batch_size} has no slice {process_index} of {process_count}")
    return batch_size // process_count


def _to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    maps = ScoreMaps(value=arrays["value"], index=arrays["index"]) if "value" in arrays else None
    return Batch(
        image=arrays["image"],
        label=arrays["label"],
        mask=arrays["mask"] if "mask" in arrays else np.ones(len(arrays["label"]), bool),
        maps=maps,
        geometry=arrays["geometry"],
        real_labels=arrays["real"].astype(np.int32) if "real" in arrays else None,
    )


def _pad(batch: Batch, size: int) -> Batch:
    """Fill an image-only batch up to `size` with zeros whose mask is False."""
    count = size - len(batch.label)
    if not count:
        return batch
    grow = lambda x, value=0: np.concatenate([x, np.full((count, *x.shape[1:]), value, x.dtype)])
    return Batch(
        image=grow(batch.image),
        label=grow(batch.label),
        mask=grow(batch.mask),
        maps=None,
        geometry=grow(batch.geometry),
        real_labels=None if batch.real_labels is None else grow(batch.real_labels, -1),
    )


def _empty_batch(size: int, image_size: tuple[int, int], max_real: int) -> Batch:
    empty = Batch(
        image=np.zeros((0, *image_size, 3), np.uint8),
        label=np.zeros(0, np.int32),
        mask=np.zeros(0, bool),
        maps=None,
        geometry=np.zeros((0, 2, 3), np.float32),
        real_labels=np.zeros((0, max_real), np.int32) if max_real else None,
    )
    return _pad(empty, size)
