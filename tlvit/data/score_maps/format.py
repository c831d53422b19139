"""What a folder of score maps holds: its description, its shards, and how these are counted and hashed."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import tensorflow as tf

FORMAT = 1
INFO_FILE = "score_maps.json"
STARTED_FILE = "score_maps.started.json"  # what an unfinished writer was told; its successor must agree
GEOMETRIES = ("full", "center")


@dataclasses.dataclass(frozen=True)
class MapShard:
    """One file of score maps: its name, records, how many of these are empty (no map), bytes and SHA-256."""

    file: str
    records: int
    missing: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class ScoreMapInfo:
    """What `score_maps.json` says.

    Attributes:
      annotator: name of the model that scored the images.
      annotator_hash: hash of its checkpoint.
      dataset: identity of the source it scored (see `Source.identity`).
      num_images: number of images, missing ones included.
      top_k: classes kept for each cell, K.
      grid: rows and columns of a map, (h, w).
      num_classes: number of classes L of the annotator.
      geometry: "full": a map covers the whole image; "center": the square in its middle, see `map_matrix`.
      shards: the files.
      center_share: with "center": side of that square as a share of the image's shorter side.
    """

    annotator: str
    annotator_hash: str
    dataset: str
    num_images: int
    top_k: int
    grid: tuple[int, int]
    num_classes: int
    geometry: str
    shards: tuple[MapShard, ...]
    center_share: float = 1.0

    @property
    def num_missing(self) -> int:
        return sum(shard.missing for shard in self.shards)

    @property
    def index_dtype(self) -> np.dtype:
        return index_dtype(self.num_classes)


def index_dtype(num_classes: int) -> np.dtype:
    """Type of the class indices: uint16, or int32 above 65,535 classes."""
    return np.dtype(np.uint16 if num_classes <= 65535 else np.int32)


def describe_shard(path: str) -> MapShard:
    """Count and hash a shard. Raises ValueError where it cannot be read."""
    digest = hashlib.sha256()
    size = 0
    with tf.io.gfile.GFile(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    fields = {"value": tf.io.FixedLenFeature([], tf.string)}
    empty = lambda record: tf.strings.length(tf.io.parse_single_example(record, fields)["value"]) == 0
    try:
        missing = list(tf.data.TFRecordDataset(path).map(empty).as_numpy_iterator())
    except tf.errors.DataLossError as error:
        raise ValueError(f"score-map shard {path} is damaged: {error.message.splitlines()[0]}") from error
    return MapShard(os.path.basename(path), len(missing), int(np.sum(missing)), size, digest.hexdigest())


def write_json(path: str, content: dict) -> None:
    """Write under a temporary name and rename."""
    temporary = f"{path}.tmp-{os.getpid()}"
    with tf.io.gfile.GFile(temporary, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
    tf.io.gfile.rename(temporary, path, overwrite=True)
