"""What a source of encoded images is: shards of labeled records, each with a stable key."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

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
    """An ordered set of encoded, labeled images in shards.

    Attributes:
      name: the name it was opened by.
      split: the split, as TFDS writes it: "train", "test[:10%]", …
      identity: data set, version and split: what score maps are checked against.
      num_examples: number of images.
      num_classes: number of classes L.
      class_names: their names, or None where the data set does not say.
      shard_lengths: number of records of each shard, in order.
      record_bytes: mean bytes of a raw record, for the budget of the shuffle.
      key_kind: "file_name" (the data set's own), "tfds_id" (shard file name, two underscores, position in
        it) or "path" (of an image in a folder of class folders, without its last suffix).
      files: the file of each shard, for messages; for class folders the folder.
      origin: the whole split that this one is a part of.
      records: (shard, offset), scalar integers -> tf.data.Dataset of raw records from there to the shard's
        end. Reading them is sequential and cheap; they are what a shuffle holds.
      parse: a raw record -> {"image": encoded bytes, "label": int64, "key": string}, all scalar tensors; with
        max_real also "real", int64 [R]. Runs in parallel, and only for records that are used.
      max_real: R where an image has a set of right labels beside its single one (ReaL), padded with -1; 0
        where it has not.
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
    max_real: int = 0

    @property
    def is_folder(self) -> bool:
        """Every image is a file of its own, so that one of them can be lost alone."""
        return self.key_kind == "path"

    def read(self, shard: int | tf.Tensor, offset: int | tf.Tensor = 0) -> tf.data.Dataset:
        """Parsed records of one shard in order, from `offset` on: {"image", "label", "key", …}."""
        return self.records(shard, offset).map(self.parse)
