"""The type of a data source: encoded, labeled images in shards, each image with a stable key."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tlvit.images import printable

SHOWN = 5  # classes that a message names

Records = Callable[[int | tf.Tensor, int | tf.Tensor], tf.data.Dataset]


@dataclasses.dataclass(frozen=True)
class Origin:
    """The complete split that a source's shards are cut from. Score maps of it serve every part of it.

    Attributes:
      identity: identity of the complete split.
      shard_lengths: number of records of each of its shards.
      shards: for each shard of the source, the index of the shard that it was cut from.
      offsets: for each shard of the source, the number of records left out at that shard's start.
    """

    identity: str
    shard_lengths: tuple[int, ...]
    shards: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """An ordered set of encoded, labeled images in shards.

    Attributes:
      name: the name that it was opened by.
      split: the split, as TFDS writes it: "train", "test[:10%]", …
      identity: data set, version and split. Score maps record the identity of the images they were made for.
      num_examples: number of images.
      num_classes: number of classes L.
      class_names: names of the classes, or None where the data set has none.
      shard_lengths: number of records of each shard, in order.
      record_bytes: mean size of a raw record in bytes. The shuffle buffer's memory limit uses it.
      key_kind: what the key of an image is: "file_name" (the data set's feature of that name), "tfds_id"
        (file name of the shard, two underscores, index within it) or "path" (path of the image file in the
        split's folder, without its last suffix).
      files: the file of each shard, for messages; the split's folder for class folders.
      origin: the complete split that this source is a part of.
      records: (shard, offset), scalar integers -> tf.data.Dataset of the raw records of that shard from
        `offset` on. Raw records are cheap to read in sequence. The shuffle buffer holds them.
      parse: a raw record -> {"image": encoded bytes, "label": int64, "key": string}, all scalar tensors; with
        max_labels also "real_labels", int64 [R]; with has_annotations also "annotation", encoded bytes. Runs
        in parallel, and only for records that are used.
      max_labels: R, the number of labels that each image's set of correct labels is padded to with -1
        (ImageNet ReaL); 0 for data sets with one label for each image.
      exif: whether images are turned as their EXIF orientation says.
      has_annotations: whether the images have annotations, images of the class of every pixel; `label` is
        then 0.
      annotation_folder: folder of the annotations, for messages; empty for other sources.
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
    max_labels: int = 0
    exif: bool = False
    has_annotations: bool = False
    annotation_folder: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether every image is a file of its own, so that a single image can be missing."""
        return self.key_kind == "path"

    def read(self, shard: int | tf.Tensor, offset: int | tf.Tensor = 0) -> tf.data.Dataset:
        """Returns the parsed records of one shard in order, from `offset` on."""
        return self.records(shard, offset).map(self.parse)


def check_same_classes(train: Source, test: Source) -> None:
    """Checks that the labels of two splits mean the same classes.

    Raises:
      ValueError: they do not, for example in class folders without a folder train or a file classes.txt,
        where each split has the classes of its own folders.
    """
    if (train.num_classes, train.class_names) == (test.num_classes, test.class_names):
        return
    names = [set(source.class_names or ()) for source in (train, test)]
    differ = sorted(names[0] ^ names[1])
    few = ", ".join(printable(name) for name in differ[:SHOWN]) + (", ..." if len(differ) > SHOWN else "")
    raise ValueError(
        f"The splits have different classes: {train.num_classes} in {train.identity}, {test.num_classes} in "
        f"{test.identity}" + (f"; only one of them has {few}." if differ else ".")
    )
