"""Chosen images as they are and as training sees them, for pictures of data and score maps."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tlvit.config import Config
from tlvit.data.batching import to_batch
from tlvit.data.pairing import check_pair, pair_with_maps
from tlvit.data.pipeline import training_example
from tlvit.data.score_maps.reader import ScoreMapReader, map_matrix
from tlvit.data.sources.source import Source
from tlvit.data.transforms.decode import decode, to_ordinary
from tlvit.types import Batch


@dataclasses.dataclass(frozen=True)
class View:
    """An image and one augmented view of it.

    Attributes:
      key: key of the image.
      photograph: uint8 [H, W, 3], the entire image.
      to_map: float32 [2, 3], maps a point (x, y, 1) of the photograph to its score map.
      batch: the augmented view, its score map and its geometry: a batch of one image.
    """

    key: str
    photograph: np.ndarray
    to_map: np.ndarray
    batch: Batch


def training_views(source: Source, maps: ScoreMapReader, config: Config, *, count: int) -> list[View]:
    """Views of images that are spread evenly over a source, made by the functions of the input pipeline.

    An image without a map has its label in every cell, as in training. RandAugment runs on the host,
    whatever augment.randaugment_on says. Random erasing and mixing belong to the training step.

    Args:
      source: the images.
      maps: their score maps.
      config: image_size, seed, data and augment are used.
      count: number of images; all if there are fewer.

    Raises:
      ValueError: the maps were not made for these images, or a map belongs to another image.
    """
    records, parse = pair_with_maps(source, maps, max_missing=1.0)
    augment = dataclasses.replace(config.augment, randaugment_on="host")
    prepare = training_example(parse, source.exif, maps, dataclasses.replace(config, augment=augment))

    def view(raw: Any, number: tf.Tensor) -> dict[str, tf.Tensor]:
        example = parse(raw)
        encoded = to_ordinary(example["image"], exif=source.exif)
        fields = {"photograph": decode(encoded), "to_map": map_matrix(encoded, maps.info)}
        return check_pair(prepare(raw, number)) | fields | {"own_key": example["key"]}

    count = min(count, source.num_examples)
    numbers = [i * source.num_examples // count for i in range(count)]
    views = []
    for arrays in _select(records, source, _places(source, numbers)).map(view).as_numpy_iterator():
        key, photograph, to_map = (arrays.pop(name) for name in ("own_key", "photograph", "to_map"))
        batch = to_batch({name: np.asarray(value)[None] for name, value in arrays.items()})
        views.append(View(os.fsdecode(key), photograph, to_map, batch))
    return views


def photographs(source: Source, places: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The images of a source at (shard, offset), uint8 [H, W, 3] each."""
    read = lambda raw, number: decode(to_ordinary(source.parse(raw)["image"], exif=source.exif))
    return list(_select(source.records, source, places).map(read).as_numpy_iterator())


def _places(source: Source, numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(shard, offset) of the images of these numbers."""
    ends = np.cumsum(source.shard_lengths)
    shards = np.searchsorted(ends, numbers, side="right")
    return [
        (int(s), int(n - ends[s] + source.shard_lengths[s])) for s, n in zip(shards, numbers, strict=True)
    ]


def _select(records: Any, source: Source, places: Sequence[tuple[int, int]]) -> tf.data.Dataset:
    """(raw record, its number in `places`), in order."""
    shards, offsets = (tf.constant([place[i] for place in places], tf.int64) for i in range(2))
    chosen = tf.data.Dataset.from_tensor_slices((shards, offsets)).enumerate()

    def read(number: tf.Tensor, place: tuple[tf.Tensor, tf.Tensor]) -> tf.data.Dataset:
        return records(*place).take(1).map(lambda raw: (raw, number))

    return chosen.flat_map(read)
