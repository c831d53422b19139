"""Opens the images of a run by name: prepared TFDS data sets, digit scenes, and folders of class folders."""

import os
import re

import tensorflow as tf
import tensorflow_datasets as tfds

from tlvit.data.sources.folders import open_folder
from tlvit.data.sources.source import Origin, Records, Source

MAX_REAL = 32  # of an image's set of labels (ReaL); records with more are refused, not cut


def open_source(name: str, split: str, *, data_dir: str | None = None) -> Source:
    """Open a split of a prepared TFDS data set that has an image and a label, or of class folders.

    Args:
      name: TFDS name ("imagenet2012", "cifar10", "name/config:version", …), "digits" for the digit scenes, or
        a folder ROOT with ROOT/SPLIT/CLASS/IMAGE (see `folders.open_folder`).
      split: TFDS split, parts included: "train", "train[:90%]", "train+validation"; of class folders: a
        folder's name, or a part of it: "val", "train[:90%]".
      data_dir: folder of the prepared data sets; None: TFDS's own (~/tensorflow_datasets).

    Raises:
      ValueError: the data set is unknown or not prepared, the split is unknown or empty, there is no image or
        label, or the files are not TFRecords.
    """
    if _is_folder(name):
        return open_folder(name, split)
    builder = _find_builder(name, data_dir)
    features = builder.info.features
    label_name = "label" if "label" in features else "original_label"  # the latter: imagenet2012_real
    if "image" not in features or label_name not in features:
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
    label = features[label_name]
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
        parse=_record_parser(features, files, label_name, key_kind),
        max_real=MAX_REAL if "real_label" in features else 0,
    )


def _is_folder(name: str) -> bool:
    """Whether a name means class folders: it is written as a path, or a folder that TFDS did not prepare."""
    if os.path.isabs(name) or name.startswith((".", "~")):
        return True
    prepared = [os.path.join(name, *["*"] * depth, "dataset_info.json") for depth in (0, 1, 2)]
    is_digits = name.split("/")[0] == "digits"
    return os.path.isdir(name) and not is_digits and not any(tf.io.gfile.glob(p) for p in prepared)


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
            f"no digit scenes in {root}; prepare them once: "
            f"tlvit.data.sources.digit_scenes.prepare({data_dir!r})"
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


def _record_parser(features, files: tuple[str, ...], label_name: str, key_kind: str):
    """{"record", "shard", "index"} -> {"image", "label", "key"[, "real"]}; the image stays encoded."""
    wanted = {"image": True, label_name: True} | ({"file_name": True} if key_kind == "file_name" else {})
    wanted |= {"real_label": True} if "real_label" in features else {}
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
        parsed = {"image": example["image"], "label": tf.cast(example[label_name], tf.int64), "key": key}
        if "real_label" in wanted:
            parsed["real"] = _fixed_length(tf.cast(example["real_label"], tf.int64), key)
        return parsed

    return parse


def _fixed_length(labels: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Some labels [n] -> [MAX_REAL], padded with -1."""
    count = tf.size(labels)
    said = ["image", key, "has", count, "labels, more than", MAX_REAL]
    with tf.control_dependencies([tf.debugging.Assert(count <= MAX_REAL, said)]):
        labels = tf.pad(labels, [[0, MAX_REAL - count]], constant_values=-1)
    return tf.ensure_shape(labels, [MAX_REAL])
