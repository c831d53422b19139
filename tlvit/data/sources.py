"""Where encoded images come from: prepared TFDS data sets, shard by shard, each record with a stable key."""

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

Records = Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]


@dataclasses.dataclass(frozen=True)
class Origin:
    """The whole split that a source's shards are cut from; score maps of the whole serve every part of it.

    Attributes:
      identity: identity of the whole split.
      shard_lengths: records of each of its shards.
      shards: for each shard of the source, the index of the shard it was cut from.
      offsets: for each shard of the source, the records left out at that shard's start.
    """

    identity: str
    shard_lengths: tuple[int, ...]
    shards: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """An ordered set of encoded, labelled images in shards.

    Attributes:
      name: the name it was opened by.
      split: the split, as TFDS writes it: "train", "test[:10%]", …
      identity: data set, version and split: what score maps are checked against.
      num_examples: number of images.
      num_classes: number of classes.
      class_names: their names, or None where the data set does not say.
      shard_lengths: number of records of each shard, in order.
      record_bytes: mean bytes of a record, for the budget of the shuffle.
      key_kind: "file_name" (the data set's own) or "tfds_id" (shard file name, two underscores, position in
        it).
      files: the file of each shard, for messages.
      origin: the whole split that this one is a part of.
      records: (shard, offset), scalar integers -> tf.data.Dataset of raw records from there to the shard's
        end. Reading them is sequential and cheap; they are what a shuffle holds.
      parse: a raw record -> {"image": encoded bytes, "label": int64, "key": string}, all scalar tensors. Runs
        in parallel, and only for records that are used.
    """

    name: str
    split: str
    identity: str
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...] | None
    shard_lengths: tuple[int, ...]
    record_bytes: float
    key_kind: str
    files: tuple[str, ...]
    origin: Origin
    records: Records
    parse: Callable[[Any], dict[str, tf.Tensor]]

    def read(self, shard: int | tf.Tensor, offset: int | tf.Tensor = 0) -> tf.data.Dataset:
        """Parsed records of one shard in order, from `offset` on: {"image", "label", "key"}."""
        return self.records(shard, offset).map(self.parse)


def open_source(name: str, split: str, *, data_dir: str | None = None) -> Source:
    """Open a split of a prepared TFDS data set that has an image and a label.

    Args:
      name: TFDS name ("imagenet2012", "cifar10", "name/config:version", …) or "digits" for the digit scenes.
      split: TFDS split, parts included: "train", "train[:90%]", "train+validation".
      data_dir: folder of the prepared data sets; None: TFDS's own (~/tensorflow_datasets).

    Raises:
      ValueError: the data set is unknown or not prepared, the split is unknown or empty, there is no image or
        label, or the files are not TFRecords.
    """
    builder = _find_builder(name, data_dir)
    features = builder.info.features
    if "image" not in features or "label" not in features:
        raise ValueError(f"{name} has the features {sorted(features)}; training needs 'image' and 'label'")
    try:
        info = builder.info.splits[split]
        instructions = info.file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name} has no split {split!r}, only {sorted(builder.info.splits)}: {error}"
        ) from error
    if not info.num_examples:
        raise ValueError(f"split {split!r} of {name} in {builder.data_dir} is empty")
    label = features["label"]
    if not getattr(label, "num_classes", None):
        raise ValueError(
            f"the label of {name} is {label}, not a class label: its number of classes is unknown"
        )

    lengths = tuple(item.examples_in_shard if item.take == -1 else item.take for item in instructions)
    files = tuple(str(item.filename) for item in instructions)
    key_kind = "file_name" if "file_name" in features else "tfds_id"
    return Source(
        name=name,
        split=split,
        identity=f"{builder.info.full_name}:{split}",
        num_examples=sum(lengths),
        num_classes=label.num_classes,
        class_names=tuple(label.names) if label.names else None,
        shard_lengths=lengths,
        record_bytes=tf.io.gfile.stat(files[0]).length / instructions[0].examples_in_shard,
        key_kind=key_kind,
        files=files,
        origin=_find_origin(builder, split, instructions, lengths),
        records=_record_reader(files, tuple(item.skip for item in instructions), lengths),
        parse=_record_parser(features, files, key_kind),
    )


def _find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The builder of a prepared data set, or a ValueError that says how to prepare it."""
    if name.split("/")[0] == "digits":
        builder = tfds.builder_from_directory(_find_digits(name, data_dir))
    else:
        try:
            builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(f"TFDS knows no data set {name!r}, and none lies in {data_dir}") from error
    if not tf.io.gfile.exists(os.path.join(str(builder.data_dir), "dataset_info.json")):
        command = f"tfds build {name}" + (f" --data_dir={data_dir}" if data_dir else "")
        raise ValueError(f"{name} is not prepared in {builder.data_dir}; prepare it once: {command}")
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise ValueError(
            f"{builder.data_dir} holds {builder.info.file_format} files; only TFRECORD can be read"
        )
    return builder


def _find_digits(name: str, data_dir: str | None) -> str:
    """The folder of the prepared digit scenes: "digits" where there is one set, else "digits/CONFIG"."""
    root = os.path.join(os.path.expanduser(data_dir or "~/tensorflow_datasets"), "digit_scenes")
    found = sorted(tf.io.gfile.glob(os.path.join(root, "*", "*", "dataset_info.json")))
    config = name.partition("/")[2]
    folders = [os.path.dirname(path) for path in found if config in ("", path.split(os.sep)[-3])]
    if len(folders) == 1:
        return folders[0]
    names = [path.split(os.sep)[-3] for path in found]
    if not names:
        raise ValueError(
            f"no digit scenes in {root}; prepare them once: tlvit.data.digits.prepare({data_dir!r})"
        )
    raise ValueError(
        f"{name!r} could be or is none of the sets in {root}: write 'digits/NAME' with one of {names}"
    )


def _find_origin(builder, split: str, instructions, lengths: tuple[int, ...]) -> Origin:
    """The whole split behind a part of it; a mixture of several splits is its own whole."""
    whole = re.match(r"\w*", split).group()
    if whole in builder.info.splits:
        known = builder.info.splits[whole].filenames
        names = [os.path.basename(str(item.filename)) for item in instructions]
        if set(names) <= set(known):
            return Origin(
                identity=f"{builder.info.full_name}:{whole}",
                shard_lengths=tuple(builder.info.splits[whole].shard_lengths),
                shards=tuple(known.index(name) for name in names),
                offsets=tuple(item.skip for item in instructions),
            )
    count = len(instructions)
    return Origin(f"{builder.info.full_name}:{split}", lengths, tuple(range(count)), (0,) * count)


def _record_reader(files: tuple[str, ...], skips: tuple[int, ...], lengths: tuple[int, ...]) -> Records:
    """(shard, offset) -> Dataset of {"record", "shard", "index"}; index counts within the file."""

    def records(shard, offset):
        shard = tf.cast(shard, tf.int64)
        first = tf.gather(tf.constant(skips, tf.int64), shard) + tf.cast(offset, tf.int64)
        count = tf.gather(tf.constant(lengths, tf.int64), shard) - tf.cast(offset, tf.int64)
        data = tf.data.TFRecordDataset(tf.gather(tf.constant(files), shard), buffer_size=1 << 20)
        data = data.skip(first).take(count).enumerate(start=first)
        return data.map(lambda index, record: {"record": record, "shard": shard, "index": index})

    return records


def _record_parser(features, files: tuple[str, ...], key_kind: str) -> Callable[[Any], dict[str, tf.Tensor]]:
    """{"record", "shard", "index"} -> {"image", "label", "key"}; the image stays encoded."""
    wanted = {"image": True, "label": True} | ({"file_name": True} if key_kind == "file_name" else {})
    features = tfds.decode.PartialDecoding(wanted).extract_features(features)
    names = [os.path.basename(file) for file in files]

    def parse(raw):
        example = features.deserialize_example(raw["record"], decoders={"image": tfds.decode.SkipDecoding()})
        if key_kind == "file_name":
            key = example["file_name"]
        else:
            key = tf.strings.join(
                [tf.gather(tf.constant(names), raw["shard"]), tf.strings.as_string(raw["index"])], "__"
            )
        return {"image": example["image"], "label": tf.cast(example["label"], tf.int64), "key": key}

    return parse
