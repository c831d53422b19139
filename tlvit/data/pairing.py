"""Reads images together with their score maps and checks that a map and an image belong together."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tlvit.data.score_maps.reader import ScoreMapReader, label_maps
from tlvit.data.sources.source import Records, Source

Parse = Callable[[Any], dict[str, tf.Tensor]]


def pair_with_maps(source: Source, maps: ScoreMapReader, *, max_missing: float) -> tuple[Records, Parse]:
    """Returns `records` and `parse` as a `Source` has them, for pairs of an image and its score map.

    Parsed examples have further fields: "value" and "index" are the score map, the others are for
    `check_pair`. An image without a map gets one with the image's label in every cell.

    Args:
      source: the images.
      maps: their score maps.
      max_missing: largest fraction of images without a map.

    Raises:
      ValueError: the maps were not made for these images, their images were turned differently, or too many
        maps are missing.
    """
    map_records, info = maps.records_of(source), maps.info
    if info.num_missing > max_missing * info.num_images:
        raise ValueError(
            f"{info.num_missing} of {info.num_images} images have no score map in {maps.path}, more than "
            f"data.max_missing_maps = {max_missing:g} allows."
        )
    if info.exif != source.exif:
        turned, setting = ("turned", "apply") if info.exif else ("not turned", "ignore")
        raise ValueError(
            f"The images of the score maps in {maps.path} were {turned} as their EXIF orientation says. Set "
            f"config.data.exif={setting}, or write the maps again."
        )

    def records(shard: int | tf.Tensor, offset: int | tf.Tensor) -> tf.data.Dataset:
        pairs = tf.data.Dataset.zip(source.records(shard, offset), map_records(shard, offset))
        return pairs.map(lambda image, score_map: {"image": image, "map": score_map})

    def parse(raw: dict[str, Any]) -> dict[str, tf.Tensor]:
        example, score_map = source.parse(raw["image"]), maps.parse(raw["map"])
        value, index = score_map["value"], score_map["index"]
        if info.num_missing:
            replacement = lambda: label_maps(example["label"], info)
            value, index = tf.cond(score_map["missing"], replacement, lambda: (value, index))
        owner = {"map_key": score_map["key"], "map_folder": maps.path, "map_problem": score_map["problem"]}
        return example | tf.nest.map_structure(tf.convert_to_tensor, owner) | {"value": value, "index": index}

    return records, parse


def check_pair(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """The fields of an example that go into a batch, after checks of its score map and its annotation.

    The score map must be that of the image, and the annotation must fit it. The checks run after the image
    was decoded and not before. Otherwise their errors would count as corrupt images.
    """
    left_out = ("key", "map_key", "map_folder", "map_problem", "real_labels", "annotation_problem")
    fields = {k: v for k, v in example.items() if k not in left_out}
    if "annotation_problem" in example:
        problem = example["annotation_problem"]
        with tf.control_dependencies([tf.debugging.Assert(tf.equal(problem, ""), [problem])]):
            fields["segmentation"] = tf.identity(example["segmentation"])
    if "map_key" not in example:
        return fields
    message = ["score map of another image: the image is", example["key"], "but its map in"]
    message += [example["map_folder"], "belongs to", example["map_key"]]
    same = tf.debugging.Assert(tf.equal(example["key"], example["map_key"]), message)
    message = ["the score map of", example["key"], "in", example["map_folder"], example["map_problem"]]
    complete = tf.debugging.Assert(tf.equal(example["map_problem"], ""), message)
    with tf.control_dependencies([same, complete]):
        return fields | {"value": tf.identity(example["value"])}
