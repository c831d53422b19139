"""Writes score maps, shard by shard, so that an interrupted run goes on where it stopped."""

import dataclasses
import json
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tlvit.data.score_maps.format import (
    FORMAT,
    GEOMETRIES,
    INFO_FILE,
    STARTED_FILE,
    ScoreMapInfo,
    describe_shard,
    index_dtype,
    write_json,
)
from tlvit.data.sources.source import Source


class ScoreMapWriter:
    """Writes score maps shard by shard; a second writer with the same arguments continues an interrupted one.

    Several processes may write different shards of one folder; one of them calls `finalize` when all are
    done.

    Args:
      path: the folder, made if needed.
      source: the images; one map shard is written for each of its shards.
      annotator, annotator_hash, top_k, grid, num_classes, geometry, center_share: see ScoreMapInfo.

    Raises:
      ValueError: K is larger than the number of classes, the class count is not the source's, the geometry is
        unknown, or the folder holds maps made with other arguments.
    """

    def __init__(
        self,
        path: str,
        *,
        source: Source,
        annotator: str,
        annotator_hash: str,
        top_k: int,
        grid: tuple[int, int],
        num_classes: int,
        geometry: str = "full",
        center_share: float = 1.0,
    ):
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"top_k = {top_k} is not between 1 and the number of classes, {num_classes}")
        if num_classes != source.num_classes:
            raise ValueError(
                f"the annotator has {num_classes} classes, {source.identity} has {source.num_classes}"
            )
        if geometry not in GEOMETRIES:
            raise ValueError(f"geometry {geometry!r} is unknown; a map is one of {GEOMETRIES}")
        if not 0 < center_share <= 1:
            raise ValueError(f"center_share is a share of the shorter side, in (0, 1], not {center_share}")
        self.path = os.path.expanduser(path)
        self.source = source
        self.info = ScoreMapInfo(
            annotator=annotator,
            annotator_hash=annotator_hash,
            dataset=source.identity,
            num_images=source.num_examples,
            top_k=top_k,
            grid=tuple(grid),
            num_classes=num_classes,
            geometry=geometry,
            shards=(),
            center_share=center_share,
        )
        tf.io.gfile.makedirs(self.path)
        self._check_folder()

    def shard_path(self, shard_index: int) -> str:
        """Final name of a shard."""
        return os.path.join(
            self.path, f"maps-{shard_index:05d}-of-{len(self.source.shard_lengths):05d}.tfrecord"
        )

    def done_shards(self) -> set[int]:
        """Indices of the shards that are written completely."""
        return {i for i in range(len(self.source.shard_lengths)) if tf.io.gfile.exists(self.shard_path(i))}

    def write_shard(
        self,
        shard_index: int,
        keys: Sequence[str],
        values: np.ndarray,
        indices: np.ndarray,
        missing: np.ndarray | None = None,
    ) -> None:
        """Write one shard under a temporary name and rename it.

        Args:
          shard_index: index in the source.
          keys: the images' keys in the source's order, n.
          values: [n, K, h, w], raw logits.
          indices: integers [n, K, h, w], class indices.
          missing: bool [n], True where there is no map for an image; None: nowhere.

        Raises:
          ValueError: a count or shape is not the promised one, a key comes twice, a logit is not finite in
            float16, or an index is no integer or no class.
        """
        missing = np.zeros(len(keys), bool) if missing is None else np.asarray(missing, bool)
        values, indices = self._checked(shard_index, keys, np.asarray(values), np.asarray(indices), missing)
        final = self.shard_path(shard_index)
        temporary = f"{final}.tmp-{os.getpid()}"
        with tf.io.TFRecordWriter(temporary) as writer:
            for i, key in enumerate(keys):
                value, index = (b"", b"") if missing[i] else (values[i].tobytes(), indices[i].tobytes())
                writer.write(_encode({"key": key.encode(), "value": value, "index": index}))
        tf.io.gfile.rename(temporary, final, overwrite=True)

    def finalize(self) -> ScoreMapInfo:
        """Describe all shards in `score_maps.json`: from here on the folder counts as complete.

        Raises:
          ValueError: shards are missing or one of them has not as many records as the source.
        """
        lengths = self.source.shard_lengths
        absent = sorted(set(range(len(lengths))) - self.done_shards())
        if absent:
            raise ValueError(
                f"{len(absent)} of {len(lengths)} score-map shards are not written yet: {absent[:10]}"
            )
        shards = tuple(describe_shard(self.shard_path(i)) for i in range(len(lengths)))
        for shard, length in zip(shards, lengths, strict=True):
            if shard.records != length:
                raise ValueError(f"{shard.file} has {shard.records} records, its image shard has {length}")
        info = dataclasses.replace(self.info, shards=shards)
        write_json(os.path.join(self.path, INFO_FILE), {"format": FORMAT} | dataclasses.asdict(info))
        started = os.path.join(self.path, STARTED_FILE)
        if tf.io.gfile.exists(started):
            tf.io.gfile.remove(started)
        return info

    def _check_folder(self) -> None:
        """Note what this writer was told, or refuse a folder whose maps were made with something else."""
        mine = {"format": FORMAT} | dataclasses.asdict(dataclasses.replace(self.info, shards=()))
        mine = json.loads(json.dumps(mine))
        for name in (INFO_FILE, STARTED_FILE):
            path = os.path.join(self.path, name)
            if tf.io.gfile.exists(path):
                with tf.io.gfile.GFile(path) as file:
                    theirs = {"center_share": 1.0} | json.load(file) | {"shards": []}
                differing = [k for k in mine if mine[k] != theirs.get(k)]
                if differing:
                    listing = ", ".join(f"{k} {theirs.get(k)!r} instead of {mine[k]!r}" for k in differing)
                    raise ValueError(
                        f"{self.path} already holds score maps with {listing}: use another folder"
                    )
                return
        if self.done_shards():
            raise ValueError(f"{self.path} holds score-map shards but no description: use another folder")
        write_json(os.path.join(self.path, STARTED_FILE), mine)

    def _checked(self, shard_index, keys, values, indices, missing) -> tuple[np.ndarray, np.ndarray]:
        """values and indices in the types of the format, or a ValueError."""
        length = self.source.shard_lengths[shard_index]
        shape = (length, self.info.top_k, *self.info.grid)
        if len(keys) != length or values.shape != shape or indices.shape != shape or len(missing) != length:
            raise ValueError(
                f"shard {shard_index} needs {length} keys and arrays of shape {shape}, not {len(keys)} keys, "
                f"values {values.shape} and indices {indices.shape}"
            )
        if len(set(keys)) != length:
            raise ValueError(
                f"shard {shard_index} has {length} records but only {len(set(keys))} different keys"
            )
        if not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"class indices are {indices.dtype}, which is not exact: give integers")
        used_values, used_indices = values[~missing], indices[~missing]
        classes = self.info.num_classes
        if used_indices.size and not 0 <= used_indices.min() <= used_indices.max() < classes:
            low, high = used_indices.min(), used_indices.max()
            raise ValueError(f"class indices from {low} to {high} do not fit {classes} classes")
        with np.errstate(over="ignore"):
            halves = used_values.astype("<f2")
        if not np.isfinite(halves).all():
            bad = int((~np.isfinite(halves)).sum())
            raise ValueError(
                f"{bad} logits of shard {shard_index} are not finite in float16 (largest: 65504)"
            )
        with np.errstate(over="ignore"):
            return values.astype("<f2"), indices.astype(index_dtype(classes).newbyteorder("<"))


def _encode(fields: dict[str, bytes]) -> bytes:
    feature = {k: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])) for k, v in fields.items()}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
