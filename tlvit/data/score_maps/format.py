"""The format of score maps on disk: TFRecord shards and score_maps.json, which describes them.

Record i of map shard s belongs to record i of image shard s and has the key of that image. Values are raw
logits in float16; indices are uint16, or int32 above 65,535 classes. score_maps.json is written last, so a
folder that has it is complete.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np
import tensorflow as tf

FORMAT = 1
INFO_FILE = "score_maps.json"
STARTED_FILE = "score_maps.started.json"  # the description of an unfinished folder
GEOMETRIES = ("full", "center")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapDescription:
    """What score maps are: the part of their description that does not depend on the images.

    Attributes:
      annotator: name of the model that scored the images.
      annotator_hash: hash of its weights.
      top_k: K, number of classes kept for each cell, at most num_classes.
      grid: rows and columns (h, w) of a map.
      num_classes: number of classes L of the annotator.
      geometry: what a map covers: "full", the entire image, or "center", a square in its middle.
      center_fraction: with "center", the side of the square as a fraction of the image's shorter side, in
        (0, 1].

    Raises:
      ValueError: a value is outside of its range.

    Example:
      >>> description = tlvit.MapDescription("my_model", "v1", top_k=5, grid=(18, 18), num_classes=1000)
      >>> writer = tlvit.ScoreMapWriter("score_maps", source, description)
    """

    annotator: str
    annotator_hash: str
    top_k: int
    grid: tuple[int, int]
    num_classes: int
    geometry: str = "full"
    center_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_classes:
            raise ValueError(
                f"top_k must be between 1 and the number of classes, {self.num_classes}, not {self.top_k}."
            )
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry must be {' or '.join(GEOMETRIES)}, not {self.geometry!r}.")
        if not 0 < self.center_fraction <= 1:
            raise ValueError(f"center_fraction must be in (0, 1], not {self.center_fraction}.")

    @property
    def index_dtype(self) -> np.dtype:
        """Type of the class indices: uint16, or int32 above 65,535 classes."""
        return np.dtype(np.uint16 if self.num_classes <= 65535 else np.int32)


@dataclasses.dataclass(frozen=True)
class MapShard:
    """One file of score maps.

    Attributes:
      file: name of the file.
      records: number of records.
      missing: number of records without a map.
      bytes: size of the file.
      sha256: its checksum.
    """

    file: str
    records: int
    missing: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreMapInfo(MapDescription):
    """The contents of score_maps.json.

    Attributes:
      dataset: identity of the source that was scored (see `Source.identity`).
      num_images: number of images, including those without a map.
      shards: the files; empty in the description of an unfinished folder.
    """

    dataset: str
    num_images: int
    shards: tuple[MapShard, ...] = ()

    @property
    def num_missing(self) -> int:
        """Number of images without a map."""
        return sum(shard.missing for shard in self.shards)

    def write(self, path: str) -> None:
        """Writes the description as JSON, under a temporary name that is then renamed."""
        temporary = f"{path}.tmp-{os.getpid()}"
        with tf.io.gfile.GFile(temporary, "w") as file:
            file.write(json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n")
        tf.io.gfile.rename(temporary, path, overwrite=True)

    @classmethod
    def read(cls, path: str) -> "ScoreMapInfo":
        """Reads a description. Version 0.1 called center_fraction "center_share", or left it out.

        Raises:
          ValueError: the file is damaged or of another format.
        """
        with tf.io.gfile.GFile(path) as file:
            text = file.read()
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}, the one that this version reads")
            if "center_share" in fields:
                fields["center_fraction"] = fields.pop("center_share")
            shards = tuple(MapShard(**shard) for shard in fields["shards"])
            return cls(**fields | {"grid": tuple(fields["grid"]), "shards": shards})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def describe_shard(path: str) -> MapShard:
    """Counts the records of a shard and computes its checksum.

    Raises:
      ValueError: the shard is damaged.
    """
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
