"""The format of score maps on disk: TFRecord shards and score_maps.json, which describes them.

Record i of map shard s belongs to record i of image shard s and has the key of that image. Values are raw
logits in float16; indices are uint16, or int32 above 65,535 classes. score_maps.json is written last, so a
folder that has it is complete.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tlvit.error_text import tensorflow_sentence
from tlvit.files import temporary_name
from tlvit.records import build, parse_json

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
      >>> description = tlvit.MapDescription(
      ...     annotator="my_model", annotator_hash="v1", top_k=5, grid=(18, 18), num_classes=1000)
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
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid must be two numbers of at least 1, (h, w), not {tuple(self.grid)}.")
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

    Raises:
      ValueError: a value is outside of its range.
    """

    file: str
    records: int
    missing: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not self.file or self.file != os.path.basename(self.file) or self.file in (".", ".."):
            raise ValueError(f"a shard must be a file of the same folder, not {self.file!r}.")
        if not 0 <= self.missing <= self.records or self.bytes < 0:
            raise ValueError(
                f"{self.file} cannot have {self.records} records, {self.missing} of them without a map, in "
                f"{self.bytes} bytes."
            )
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"the checksum of {self.file} is not a SHA-256: {self.sha256[:80]!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreMapInfo(MapDescription):
    """The contents of score_maps.json.

    Attributes:
      dataset: identity of the source that was scored (see `Source.identity`).
      num_images: number of images, including those without a map.
      exif: whether the images were turned as their EXIF orientation says.
      shards: the files; empty in the description of an unfinished folder.
    """

    dataset: str
    num_images: int
    exif: bool = False
    shards: tuple[MapShard, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        records = sum(shard.records for shard in self.shards)
        if self.num_images < 1 or (self.shards and records != self.num_images):
            raise ValueError(f"num_images is {self.num_images}, but the shards have {records} records.")

    @property
    def num_missing(self) -> int:
        """Number of images without a map."""
        return sum(shard.missing for shard in self.shards)

    def write(self, path: str) -> None:
        """Writes the description as JSON, under a temporary name that is then renamed."""
        temporary = temporary_name(path)
        record = {"format": FORMAT} | dataclasses.asdict(self)
        with tf.io.gfile.GFile(temporary, "w") as file:
            file.write(json.dumps(record | {"checksum": _checksum(record)}, indent=1) + "\n")
        tf.io.gfile.rename(temporary, path, overwrite=True)

    @classmethod
    def read(cls, path: str) -> "ScoreMapInfo":
        """Reads a description.

        Version 0.1 called center_fraction "center_share", or left it out, and had no checksum.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is damaged, was changed after it was written, or has another format.
        """
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for its writer
            raise OSError(f"{path} is not a regular file.")
        try:
            with tf.io.gfile.GFile(path, "rb") as file:
                record = parse_json(file.read(), path)
        except tf.errors.OpError as error:
            raise OSError(f"{path} cannot be read: {error.message}") from error
        if record.get("format") != FORMAT:
            raise ValueError(f"{path}: its format is not {FORMAT}, the one that this version reads.")
        fields = {key: value for key, value in record.items() if key not in ("format", "checksum")}
        if "center_share" in fields:
            fields["center_fraction"] = fields.pop("center_share")
        info = build(cls, fields, path)
        if "checksum" in record and record.pop("checksum") != _checksum(record):
            raise ValueError(
                f"{path} was changed after it was written: its checksum is wrong. Restore the file, or write "
                "the score maps again."
            )
        return info


def _checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of a description."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


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
    except tf.errors.OpError as error:
        raise ValueError(
            f"score-map shard {path} is damaged: {tensorflow_sentence(error.message)}"
        ) from error
    return MapShard(os.path.basename(path), len(missing), int(np.sum(missing)), size, digest.hexdigest())
