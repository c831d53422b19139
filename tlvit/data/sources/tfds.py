"""Prepared TFDS data sets as a source: reads their TFRecord files without decoding the images."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from tlvit.data.sources.source import Origin, Records, Source

MAX_LABELS = 32  # labels of one image in imagenet2012_real; a record with more raises an error
ANNOTATIONS = ("annotation", "segmentation_mask", "mask")  # features with the class of every pixel


def open_tfds(name: str, split: str, *, data_dir: str | None = None) -> Source:
    """Opens a split of a prepared TFDS data set.

    Args:
      name: TFDS name: "imagenet2012", "cifar10", "name/config:version", …
      split: TFDS split or a part of one: "train", "train[:90%]", "train+validation".
      data_dir: folder of the prepared data sets. None: ~/tensorflow_datasets.

    Raises:
      ValueError: TFDS does not know the data set, it is not prepared, or as `open_builder`.
    """
    return open_builder(find_builder(name, data_dir), split, name=name)


def find_builder(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """The builder of a prepared TFDS data set.

    Raises:
      ValueError: TFDS does not know the data set, or it is not prepared.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        where = data_dir or "~/tensorflow_datasets"
        raise ValueError(
            f"TFDS does not know a data set {name!r}, {where} has none, and there is no folder of this name "
            f"in {os.getcwd()}."
        ) from error
    if not tf.io.gfile.exists(os.path.join(str(builder.data_dir), "dataset_info.json")):
        command = f"tfds build {name}" + (f" --data_dir={data_dir}" if data_dir else "")
        raise ValueError(f"{name} is not prepared in {builder.data_dir}. Prepare it once: {command}")
    return builder


def open_builder(builder: tfds.core.DatasetBuilder, split: str, *, name: str) -> Source:
    """Opens a split of a TFDS builder whose data are prepared.

    Args:
      builder: the builder.
      split: TFDS split or a part of one.
      name: the name that the data set was opened by.

    Raises:
      ValueError: the files are not TFRecords, the split is unknown or empty, or the data set has no image or
        no class label.
    """
    features = builder.info.features
    label_name = _label_name(features, name)
    files = _files(builder, split, name)
    names = features[label_name].names
    return Source(
        **files,
        num_classes=features[label_name].num_classes,
        class_names=tuple(names) if names else None,
        parse=_record_parser(features, files["files"], label_name, files["key_kind"]),
        max_labels=MAX_LABELS if "real_label" in features else 0,
    )


def open_annotated_builder(
    builder: tfds.core.DatasetBuilder,
    split: str,
    *,
    name: str,
    num_classes: int,
    class_names: tuple[str, ...] | None = None,
) -> Source:
    """Opens a split of a TFDS builder whose images have annotations, for segmentation.

    Args:
      builder: the builder.
      split: TFDS split or a part of one.
      name: the name that the data set was opened by.
      num_classes: number of classes of the annotations.
      class_names: their names.

    Raises:
      ValueError: the files are not TFRecords, the split is unknown or empty, or the data set has no image or
        none of the features ANNOTATIONS.
    """
    features = builder.info.features
    is_image = lambda key: key in features and isinstance(features[key], tfds.features.Image)
    found = [key for key in ANNOTATIONS if is_image(key)]
    if "image" not in features or not found:
        raise ValueError(
            f"{name} has the features {sorted(features)}; segmentation needs 'image' and an image with the "
            f"class of every pixel, one of {', '.join(ANNOTATIONS)}."
        )
    files = _files(builder, split, name)
    return Source(
        **files,
        num_classes=num_classes,
        class_names=class_names,
        parse=_annotated_parser(features, files["files"], found[0], files["key_kind"]),
        has_annotations=True,
    )


def _files(builder: tfds.core.DatasetBuilder, split: str, name: str) -> dict[str, Any]:
    """The fields of a `Source` that describe its files."""
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise ValueError(f"{builder.data_dir} has {builder.info.file_format} files; tlvit reads TFRECORD.")
    instructions = _instructions(builder, split, name)
    lengths = tuple(item.examples_in_shard if item.take == -1 else item.take for item in instructions)
    files = tuple(str(item.filename) for item in instructions)
    return {
        "name": name,
        "split": split,
        "identity": f"{builder.info.full_name}:{split}",
        "num_examples": sum(lengths),
        "shard_lengths": lengths,
        "record_bytes": tf.io.gfile.stat(files[0]).length / instructions[0].examples_in_shard,
        "key_kind": "file_name" if "file_name" in builder.info.features else "tfds_id",
        "files": files,
        "origin": _find_origin(builder, split, instructions, lengths),
        "records": _record_reader(files, tuple(item.skip for item in instructions), lengths),
    }


def _label_name(features: tfds.features.FeaturesDict, name: str) -> str:
    """The name of the label's feature: "label", or "original_label" in imagenet2012_real."""
    label_name = "label" if "label" in features else "original_label"
    if "image" not in features or label_name not in features:
        raise ValueError(f"{name} has the features {sorted(features)}; tlvit needs 'image' and 'label'.")
    if not getattr(features[label_name], "num_classes", None):
        raise ValueError(
            f"The label of {name} is {features[label_name]}, which is not a class label with a known number "
            "of classes."
        )
    return label_name


def _instructions(builder: tfds.core.DatasetBuilder, split: str, name: str) -> Sequence[Any]:
    """TFDS's file instructions of a split: for each file, how many records to skip and to take."""
    try:
        info = builder.info.splits[split]
        instructions = info.file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name} has no split {split!r}, only {sorted(builder.info.splits)}: {error}"
        ) from error
    if not info.num_examples:
        raise ValueError(f"Split {split!r} of {name} in {builder.data_dir} is empty.")
    return instructions


def _find_origin(
    builder: tfds.core.DatasetBuilder, split: str, instructions: Sequence[Any], lengths: tuple[int, ...]
) -> Origin:
    """The complete split that a split is a part of. A mixture of several splits is its own origin."""
    complete = re.split(r"\W", split, maxsplit=1)[0]
    if complete in builder.info.splits:
        known = builder.info.splits[complete].filenames
        names = [os.path.basename(str(item.filename)) for item in instructions]
        if set(names) <= set(known):
            return Origin(
                identity=f"{builder.info.full_name}:{complete}",
                shard_lengths=tuple(builder.info.splits[complete].shard_lengths),
                shards=tuple(known.index(name) for name in names),
                offsets=tuple(item.skip for item in instructions),
            )
    count = len(instructions)
    return Origin(f"{builder.info.full_name}:{split}", lengths, tuple(range(count)), (0,) * count)


def _record_reader(files: tuple[str, ...], skips: tuple[int, ...], lengths: tuple[int, ...]) -> Records:
    """(shard, offset) -> Dataset of {"record", "shard", "index"}. The index counts within the file."""

    def records(shard: int | tf.Tensor, offset: int | tf.Tensor) -> tf.data.Dataset:
        shard = tf.cast(shard, tf.int64)
        first = tf.gather(tf.constant(skips, tf.int64), shard) + tf.cast(offset, tf.int64)
        left = tf.gather(tf.constant(lengths, tf.int64), shard) - tf.cast(offset, tf.int64)
        count = tf.maximum(left, 0)  # take(-1) takes everything, and the file may go on after the split
        data = tf.data.TFRecordDataset(tf.gather(tf.constant(files), shard), buffer_size=1 << 20)
        data = data.skip(first).take(count).enumerate(start=first)
        return data.map(lambda index, record: {"record": record, "shard": shard, "index": index})

    return records


def _record_parser(
    features: tfds.features.FeaturesDict, files: tuple[str, ...], label_name: str, key_kind: str
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """{"record", "shard", "index"} -> {"image", "label", "key"[, "real_labels"]}, the image encoded."""
    wanted = {"image": True, label_name: True} | ({"file_name": True} if key_kind == "file_name" else {})
    wanted |= {"real_label": True} if "real_label" in features else {}
    features = tfds.decode.PartialDecoding(wanted).extract_features(features)

    def parse(raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        example = features.deserialize_example(raw["record"], decoders={"image": tfds.decode.SkipDecoding()})
        key = _key(raw, example, files)
        parsed = {"image": example["image"], "label": tf.cast(example[label_name], tf.int64), "key": key}
        if "real_label" in wanted:
            parsed["real_labels"] = _pad_labels(tf.cast(example["real_label"], tf.int64), key)
        return parsed

    return parse


def _annotated_parser(
    features: tfds.features.FeaturesDict, files: tuple[str, ...], annotation: str, key_kind: str
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """{"record", "shard", "index"} -> {"image", "annotation", "label", "key"}, both images encoded."""
    wanted = {"image": True, annotation: True} | ({"file_name": True} if key_kind == "file_name" else {})
    features = tfds.decode.PartialDecoding(wanted).extract_features(features)
    encoded = {name: tfds.decode.SkipDecoding() for name in ("image", annotation)}

    def parse(raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        example = features.deserialize_example(raw["record"], decoders=encoded)
        key = _key(raw, example, files)
        label = tf.constant(0, tf.int64)
        return {"image": example["image"], "annotation": example[annotation], "label": label, "key": key}

    return parse


def _key(raw: dict[str, tf.Tensor], example: dict[str, tf.Tensor], files: tuple[str, ...]) -> tf.Tensor:
    """The key of a record: its feature "file_name", or the name of its file and its index in it."""
    if "file_name" in example:
        return example["file_name"]
    names = tf.constant([os.path.basename(file) for file in files])
    return tf.strings.join([tf.gather(names, raw["shard"]), tf.strings.as_string(raw["index"])], "__")


def _pad_labels(labels: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Pads labels [n] with -1 to [MAX_LABELS]."""
    count = tf.size(labels)
    message = ["image", key, "has", count, "labels, more than", MAX_LABELS]
    with tf.control_dependencies([tf.debugging.Assert(count <= MAX_LABELS, message)]):
        labels = tf.pad(labels, [[0, MAX_LABELS - count]], constant_values=-1)
    return tf.ensure_shape(labels, [MAX_LABELS])
