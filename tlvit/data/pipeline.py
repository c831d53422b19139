"""Batches of images from a source and its score maps: augmented and shuffled, or every image once in order.

Everything from the files to a finished batch runs in the threads of tf.data, and without Python except for
images that are not ordinary JPEG or PNG files. Random numbers depend only on (seed, step, index in the
batch). So the number of threads, the number of processes and restarts do not change a batch. The number of
devices that share a batch changes the places of its images if there are several views of an image.
"""

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import MAX_THREADS, Config
from tlvit.data import corruption
from tlvit.data.annotated_images import annotated_example
from tlvit.data.batching import KeyedBatch, pad_batch, padding_batch, to_batch
from tlvit.data.pairing import Parse, check_pair, pair_with_maps
from tlvit.data.score_maps.reader import ScoreMapReader, map_matrix
from tlvit.data.score_maps.verification import verified
from tlvit.data.shuffle import (
    Order,
    batch_permutation,
    make_order,
    ordered_records,
    process_batch_size,
    read_segments,
    segments,
    shuffle_memory,
)
from tlvit.data.sources.source import Source
from tlvit.data.transforms import geometry
from tlvit.data.transforms.crop import eval_image, squashed_image, train_image
from tlvit.data.transforms.decode import check_complete_jpeg, to_ordinary
from tlvit.host_memory import check_batch, host_memory
from tlvit.ops.randaugment_policy import parse_policy
from tlvit.types import Batch

log = logging.getLogger("tlvit")


def train_batches(
    source: Source,
    maps: ScoreMapReader | None,
    config: Config,
    *,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    device_shards: int = 1,
) -> Iterator[Batch]:
    """Augmented batches of one process, endless. Every epoch is a new order of full batches.

    Args:
      source: the images.
      maps: their score maps, or None for a run without token labels.
      config: uses batch_size, image_size, seed, data and augment. RandAugment is skipped if
        augment.randaugment_on is "device".
      first_step: the first batch. The batches equal, bit for bit, those of a run from step 0.
      process_index: index of this process.
      process_count: number of processes. Each gets batch_size / process_count images of every global batch.
      device_shards: number of devices that share a global batch. The views of an image that repeated
        augmentation makes are spread over them.

    Raises:
      ValueError: at once, if the maps were not made for these images, too many of them are missing, the
        images do not fill a batch, the processes do not divide it, or batches or threads are more than this
        host can hold. During iteration, if a map belongs to another image, a shard is damaged or stays lost,
        or too many images are corrupt. All map shards are verified before the second epoch that is read.
    """
    records, parse = source.records, source.parse
    if maps is not None:
        records, parse = pair_with_maps(source, maps, max_missing=config.data.max_missing_maps)
    local = process_batch_size(config.batch_size, process_index, process_count)
    check_batch(local, config.crop_size, "config.batch_size")
    order = train_order(source, config, device_shards)
    places = batch_permutation(order, process_index, process_count)
    threads = thread_count(config.data.threads)
    if source.has_annotations:
        prepare = annotated_example(parse, source, config)
    else:
        prepare = training_example(parse, source.exif, maps, config)
    key_of = lambda raw: parse(raw)["key"]
    corrupt = corruption.CorruptImages(
        source, max_corrupt=config.data.max_corrupt, setting="data.max_corrupt", replaced=True
    )

    def batches(done: int, fallback: bool) -> tf.data.Dataset:
        known = frozenset(corrupt.keys)
        data = ordered_records(
            records,
            order,
            first_step=first_step + done,
            process_index=process_index,
            process_count=process_count,
            replacements=corruption.REPLACEMENTS if fallback or known else 0,
        )

        def prepare_sound(raw: Any, counter: tf.Tensor) -> dict[str, tf.Tensor]:
            raw = corruption.skip_corrupt(raw, known, key_of) if known else raw
            return check_pair(prepare(raw, counter))

        if fallback:
            data = corruption.replace_corrupt(data, prepare, key_of, threads=threads).map(check_pair)
        else:
            data = data.map(prepare_sound, num_parallel_calls=threads, deterministic=True)
        data = data.batch(local, drop_remainder=True)
        if places is not None:
            data = data.map(lambda batch: tf.nest.map_structure(lambda x: tf.gather(x, places), batch))
        return data.prefetch(2)

    locate = lambda done: corruption.locate_damage(source, maps, order, first_step + done)
    arrays = corruption.read_batches(batches, threads=threads, corrupt=corrupt, locate=locate)
    if maps is not None:
        shards = range(process_index, len(maps.files), process_count)
        arrays = verified(arrays, maps, shards, first_step=first_step, steps_per_epoch=order.steps_per_epoch)
    return map(to_batch, _log_restart(arrays, order, first_step) if first_step else arrays)


def eval_batches(
    source: Source,
    info: ModelInfo,
    *,
    batch_size: int,
    max_corrupt: float = 0.0,
    threads: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every image of a split exactly once over all processes, resized and center-cropped for a model.

    Process p of n reads images [p ceil(N / n), (p + 1) ceil(N / n)) in the order of the source. All processes
    give the same number of batches, each of batch_size / process_count images. Missing images at the end are
    zero and have mask False, and so have corrupt images. Sources with sets of labels fill `real_labels`.

    Args:
      source: the images.
      info: the model; its image size and preprocessing are used.
      batch_size: images of a global batch.
      max_corrupt: largest fraction of corrupt images, in [0, 1].
      threads: threads that decode; 0 means one for each core.
      process_index: index of this process.
      process_count: number of processes.

    Raises:
      ValueError: the processes do not divide the batch, batches or threads are more than this host can hold,
        a shard is damaged or stays lost, or too many images are corrupt.
    """
    local = process_batch_size(batch_size, process_index, process_count)
    check_batch(local, info.image_size, "evaluation batch")
    per_process = -(-source.num_examples // process_count)
    first = min(process_index * per_process, source.num_examples)
    last = min(first + per_process, source.num_examples)
    shards = tf.range(len(source.shard_lengths), dtype=tf.int64)

    def raw(done: int) -> tf.data.Dataset:
        start = min(first + done * local, last)
        return read_segments(source.records, *segments(source.shard_lengths, shards, start, last))

    def transform(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        crop_pct, interpolation = info.preprocessing.crop_pct, info.preprocessing.interpolation
        return eval_image(encoded, image_size=info.image_size, crop_pct=crop_pct, interpolation=interpolation)

    corrupt = corruption.CorruptImages(
        source, max_corrupt=max_corrupt, setting="eval.max_corrupt", replaced=False
    )
    threads = thread_count(threads)
    items = _batches_in_order(
        raw, transform, corrupt, batch_size=local, image_size=info.image_size, threads=threads
    )
    missing = -(-per_process // local) - -(-(last - first) // local)
    padding = padding_batch(local, info.image_size, source.max_labels)
    return itertools.chain((item.batch for item in items), itertools.repeat(padding, missing))


def annotation_batches(
    source: Source,
    shard_index: int,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    center_fraction: float | None = None,
    corrupt: corruption.CorruptImages | None = None,
    threads: int = 0,
) -> Iterator[KeyedBatch]:
    """The images of one shard in the order of its records, each resized to (H, W), with their keys.

    The last batch is padded; padding is zero and has mask False. A corrupt image has mask False too, but
    keeps its index and its key.

    Args:
      source: the images.
      shard_index: index of the shard.
      batch_size: images in a batch.
      image_size: (H, W) of the images.
      center_fraction: None resizes the entire image, without its aspect ratio. Otherwise the square in its
        middle, whose side is this fraction of the shorter side, in (0, 1].
      corrupt: counts the corrupt images of all shards. None: none are allowed.
      threads: threads that decode; 0 means one for each core.

    Raises:
      ValueError: batches or threads are more than this host can hold, the shard is damaged or stays lost, or
        too many images are corrupt.
    """
    check_batch(batch_size, image_size, "batch size")
    raw = lambda done: source.records(shard_index, done * batch_size)
    if center_fraction is None:
        transform = lambda encoded: squashed_image(encoded, image_size=image_size)
    else:
        transform = lambda encoded: eval_image(encoded, image_size=image_size, crop_pct=center_fraction)
    if corrupt is None:
        corrupt = corruption.CorruptImages(source, max_corrupt=0.0, setting="max_corrupt", replaced=False)
    threads = thread_count(threads)
    return _batches_in_order(
        raw, transform, corrupt, batch_size=batch_size, image_size=image_size, threads=threads
    )


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Full global batches in an epoch."""
    return source.num_examples // batch_size


def train_order(source: Source, config: Config, device_shards: int = 1) -> Order:
    """The order in which `train_batches` reads a source.

    Raises:
      ValueError: the images do not fill a batch, or the shuffle buffer does not fit into the host's memory.
    """
    budget = config.data.shuffle_gib * 2**30
    needed, available = min(budget, shuffle_memory(source.num_examples, source.record_bytes)), host_memory()
    if needed > available:
        raise ValueError(
            f"data.shuffle_gib={config.data.shuffle_gib:g} lets the shuffle buffer take "
            f"{needed / 2**30:.1f} GiB, and this host has {available / 2**30:.1f} GiB. Choose less."
        )
    return make_order(
        source.shard_lengths,
        seed=config.seed,
        batch_size=config.batch_size,
        record_bytes=source.record_bytes,
        shuffle_bytes=int(budget),
        repeats=config.augment.repeats,
        shards=device_shards,
    )


def thread_count(threads: int) -> int:
    """The number of threads; for 0, the number of cores that this process may use.

    Raises:
      ValueError: more than MAX_THREADS.
    """
    if threads > MAX_THREADS:
        raise ValueError(f"{threads} threads are too many to read images; at most {MAX_THREADS} are used.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or cores


def training_example(
    parse: Parse, exif: bool, maps: ScoreMapReader | None, config: Config
) -> Callable[..., dict[str, tf.Tensor]]:
    """The function (raw record, counter) -> fields of an augmented example."""
    augment = config.augment
    policy = parse_policy(augment.randaugment) if augment.randaugment_on == "host" else None

    def prepare(raw: Any, counter: tf.Tensor) -> dict[str, tf.Tensor]:
        example = parse(raw)
        encoded = check_complete_jpeg(to_ordinary(example.pop("image"), exif=exif))
        image, matrix = train_image(
            encoded,
            tf.stack([tf.constant(config.seed, tf.int64), counter]),
            config.image_size,
            augment,
            label_crop="none" if config.data.annotator else config.data.label_crop,
            policy=policy,
        )
        if maps is not None and maps.info.geometry != "full" and config.data.label_crop != "published":
            matrix = geometry.compose(map_matrix(encoded, maps.info), matrix)
        return example | {"image": image, "geometry": matrix, "label": tf.cast(example["label"], tf.int32)}

    return prepare


def _batches_in_order(
    raw: Callable[[int], tf.data.Dataset],
    transform: Callable,
    corrupt: corruption.CorruptImages,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    threads: int,
) -> Iterator[KeyedBatch]:
    """Batches of transformed records in their order, the last one padded.

    Args:
      raw: maps the number of batches to skip to a Dataset of raw records.
      transform: maps an encoded image to pixels and matrix.
      corrupt: counts the corrupt images, which are left out.
      batch_size: images in a batch of this process.
      image_size: (H, W) of the transformed images.
      threads: threads that decode.
    """
    source = corrupt.source

    def prepare(record: Any) -> dict[str, tf.Tensor]:
        example = source.parse(record)
        image, matrix = transform(check_complete_jpeg(to_ordinary(example["image"], exif=source.exif)))
        label = tf.cast(example["label"], tf.int32)
        return example | {"image": image, "geometry": matrix, "label": label, "mask": True, "corrupt": ""}

    def left_out(spec: Any, record: Any) -> dict[str, tf.Tensor]:
        del spec
        key = source.parse(record)["key"]  # reads no image file: the graph leaves out what is not used
        fields = {"key": key, "corrupt": key, "mask": False, "label": tf.constant(0)}
        fields |= {"image": tf.zeros([*image_size, 3], tf.uint8), "geometry": tf.zeros([2, 3])}
        if source.max_labels:
            fields["real_labels"] = tf.fill([source.max_labels], tf.constant(-1, tf.int64))
        return fields

    def batches(done: int, fallback: bool) -> tf.data.Dataset:
        if fallback:
            attempt = lambda i, record: prepare(record)
            data = corruption.first_success(raw(done), attempt, left_out, count=1, threads=threads)
        else:
            data = raw(done).map(prepare, num_parallel_calls=threads, deterministic=True)
        return data.batch(batch_size).prefetch(2)

    locate = lambda done: corruption.locate_damage(source, None, None, done)
    for arrays in corruption.read_batches(batches, threads=threads, corrupt=corrupt, locate=locate):
        keys = tuple(os.fsdecode(key) for key in arrays.pop("key"))
        yield KeyedBatch(pad_batch(to_batch(arrays), batch_size), keys)


def _log_restart(arrays: Iterator, order: Order, first_step: int) -> Iterator:
    """Logs the seconds until the first batch of a run that resumes."""
    start = time.perf_counter()
    for number, element in enumerate(arrays):
        if not number:
            epoch, step = divmod(first_step, order.steps_per_epoch)
            log.info(
                "data: resumed at batch %d of %d in epoch %d after %.1f s",
                step, order.steps_per_epoch, epoch, time.perf_counter() - start,
            )  # fmt: skip
        yield element
