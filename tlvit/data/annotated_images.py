"""Batches of segmentation: random views for training, and whole images of one size for evaluation."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tlvit.config import Config
from tlvit.data import corruption
from tlvit.data.batching import pad_batch, to_batch
from tlvit.data.pairing import Parse, check_pair
from tlvit.data.shuffle import read_segments, segments
from tlvit.data.sources.source import Source
from tlvit.data.transforms.annotation import decode_annotation, size_problem, to_classes
from tlvit.data.transforms.decode import check_complete_jpeg, decode, to_ordinary
from tlvit.data.transforms.scene_crop import scene_crop
from tlvit.types import IGNORE, Batch

log = logging.getLogger("tlvit")


def annotated_example(
    parse: Parse, source: Source, config: Config
) -> Callable[[Any, tf.Tensor], dict[str, tf.Tensor]]:
    """The function (raw record, counter) -> fields of a training example.

    Args:
      parse: of the source.
      source: images with annotations.
      config: seed, image_size, augment.hflip and the section segmentation are used.
    """
    read = _reader(parse, source, config)
    crop_size = config.crop_size

    def prepare(raw: Any, counter: tf.Tensor) -> dict[str, tf.Tensor]:
        example = read(raw)
        seed = tf.stack([tf.constant(config.seed, tf.int64), counter])
        image, classes, matrix = scene_crop(
            example["image"],
            example["segmentation"],
            seed,
            crop_size=crop_size,
            hflip=config.augment.hflip,
            settings=config.segmentation,
        )
        return example | {"image": image, "segmentation": classes, "geometry": matrix}

    return prepare


def annotated_eval_batches(
    source: Source, config: Config, *, batch_size: int, threads: int
) -> Iterator[Batch]:
    """Every image of a split exactly once, at its own size. The images of a batch have one size.

    A batch is given as soon as it is full; batches that are not full come at the end, padded. Padding is
    zero, of the class 255, and has mask False. Corrupt images are left out.

    Args:
      source: images with annotations.
      config: the section segmentation and eval.max_corrupt are used.
      batch_size: images of a batch.
      threads: threads that decode.

    Raises:
      ValueError: during iteration, if a shard is damaged or stays lost, too many images are corrupt, or an
        annotation does not fit its image.
    """
    groups: dict[tuple[int, int], list[dict[str, np.ndarray]]] = {}
    full = lambda group: pad_batch(to_batch(_stack(group)), batch_size)
    for arrays in _images_in_order(source, config, threads):
        group = groups.setdefault(arrays["image"].shape[1:3], [])
        group.append(arrays)
        if len(group) == batch_size:
            yield full(group)
            group.clear()
    yield from (full(group) for group in groups.values() if group)


def _images_in_order(source: Source, config: Config, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """The images of a split with their classes, batches of one."""
    read = _reader(source.parse, source, config)
    corrupt = corruption.CorruptImages(
        source, max_corrupt=config.eval.max_corrupt, setting="eval.max_corrupt", replaced=False
    )
    shards = tf.range(len(source.shard_lengths), dtype=tf.int64)

    def raw(done: int) -> tf.data.Dataset:
        parts = segments(source.shard_lengths, shards, done, source.num_examples)
        return read_segments(source.records, *parts)

    def prepare(record: Any) -> dict[str, tf.Tensor]:
        return read(record) | {"mask": True, "corrupt": "", "geometry": tf.eye(2, 3)}

    def left_out(spec: Any, record: Any) -> dict[str, tf.Tensor]:
        zeros = {
            k: tf.zeros([d or 1 for d in part.shape], part.dtype) for k, part in spec.items() if k != "key"
        }
        key = source.parse(record)["key"]  # reads no image file: the graph leaves out what is not used
        return zeros | {"key": key, "corrupt": key, "mask": False}

    def images(done: int, fallback: bool) -> tf.data.Dataset:
        if fallback:
            attempt = lambda i, record: prepare(record)
            data = corruption.first_success(raw(done), attempt, left_out, count=1, threads=threads)
            data = data.map(check_pair)
        else:
            checked = lambda record: check_pair(prepare(record))
            data = raw(done).map(checked, num_parallel_calls=threads, deterministic=True)
        return data.batch(1).prefetch(threads)

    locate = lambda done: corruption.locate_damage(source, None, None, done)
    for arrays in corruption.read_batches(images, threads=threads, corrupt=corrupt, locate=locate):
        if arrays["mask"].all():
            yield arrays


def _reader(parse: Parse, source: Source, config: Config) -> Callable[[Any], dict[str, tf.Tensor]]:
    """A raw record -> decoded "image" and "segmentation", "label", "key" and "annotation_problem".

    The classes of an annotation with a problem are IGNORE, so that nothing fails before `check_pair`.
    """

    def read(raw: Any) -> dict[str, tf.Tensor]:
        example = parse(raw)
        pixels = decode(check_complete_jpeg(to_ordinary(example["image"], exif=source.exif)))
        indices = decode_annotation(example.pop("annotation"))
        classes, problem = to_classes(indices, config.segmentation, source.num_classes, example["key"])
        problem = tf.where(problem == "", size_problem(pixels, classes, example["key"]), problem)
        ignored = tf.fill(tf.shape(pixels)[:2], tf.constant(IGNORE, tf.uint8))
        classes = tf.cond(problem == "", lambda: classes, lambda: ignored)
        label = tf.cast(example["label"], tf.int32)
        fields = {"image": pixels, "segmentation": classes, "label": label, "annotation_problem": problem}
        return example | fields

    return read


def _stack(group: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One batch of several batches of one."""
    return {name: np.concatenate([arrays[name] for arrays in group]) for name in group[0]}
