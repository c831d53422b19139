"""Writes score maps shard by shard, so that an interrupted run can continue."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tlvit.data.score_maps.format import (
    INFO_FILE,
    STARTED_FILE,
    MapDescription,
    ScoreMapInfo,
    describe_shard,
)
from tlvit.data.sources.source import Source
from tlvit.error_text import tensorflow_sentence
from tlvit.files import check_url, is_abandoned, temporary_name


class ScoreMapWriter:
    """Writes a folder of score maps. A second writer with the same arguments continues an unfinished folder.

    Several processes may write different shards of one folder. One of them calls `finalize` when all shards
    are written.

    Example:
      >>> description = tlvit.MapDescription(
      ...     annotator="my_model", annotator_hash="3f2a", top_k=5, grid=(18, 18), num_classes=1000)
      >>> writer = tlvit.ScoreMapWriter("/data/score_maps", source, description)
      >>> for shard in range(len(source.shard_lengths)):
      ...     if shard not in writer.done_shards():
      ...         keys, values, indices = score(shard)  # n keys, arrays [n, 5, 18, 18]
      ...         writer.write_shard(shard, keys, values, indices)
      >>> writer.finalize()

    Args:
      path: the folder; created if it does not exist.
      source: the images. One map shard is written for each of its shards.
      description: what the maps are.

    Attributes:
      path: the folder.
      source: the images.
      info: the complete description. Its shards are empty before `finalize`.

    Raises:
      ValueError: the annotator and the source differ in their number of classes, or the folder has maps with
        another description.
    """

    def __init__(self, path: str | os.PathLike, source: Source, description: MapDescription):
        if description.num_classes != source.num_classes:
            raise ValueError(
                f"The annotator has {description.num_classes} classes, {source.identity} has "
                f"{source.num_classes}. A classes map says which of them are the same (--classes-map)."
            )
        check_url(path)
        self.path = os.path.expanduser(os.fspath(path))
        self.source = source
        fields = {f.name: getattr(description, f.name) for f in dataclasses.fields(MapDescription)}
        fields["grid"] = tuple(description.grid)
        self.info = ScoreMapInfo(
            dataset=source.identity, num_images=source.num_examples, exif=source.exif, **fields
        )
        tf.io.gfile.makedirs(self.path)
        self._remove_abandoned()
        self._start()

    def shard_path(self, shard_index: int) -> str:
        """Returns the path of a finished shard."""
        count = len(self.source.shard_lengths)
        return os.path.join(self.path, f"maps-{shard_index:05d}-of-{count:05d}.tfrecord")

    def done_shards(self) -> set[int]:
        """Returns the indices of the shards that are written completely."""
        return {i for i in range(len(self.source.shard_lengths)) if tf.io.gfile.exists(self.shard_path(i))}

    def write_shard(
        self,
        shard_index: int,
        keys: Sequence[str],
        values: np.ndarray,
        indices: np.ndarray,
        missing: np.ndarray | None = None,
    ) -> None:
        """Writes one shard, under a temporary name that is then renamed.

        Args:
          shard_index: index of the shard in the source.
          keys: the keys of its n images, in the source's order.
          values: floats [n, K, h, w], raw logits. They are stored as float16.
          indices: integers [n, K, h, w], class indices.
          missing: bool [n], True for images without a map; their values and indices are ignored. None: every
            image has a map.

        Raises:
          OSError: the file cannot be written. Finished shards are kept.
          ValueError: a length or shape does not match the source or the description, two keys are equal, a
            logit is not finite in float16, an index is not an integer or not a class, or a cell has a class
            twice.
        """
        missing = np.zeros(len(keys), bool) if missing is None else np.asarray(missing, bool)
        values, indices = self._checked(shard_index, keys, np.asarray(values), np.asarray(indices), missing)
        final = self.shard_path(shard_index)
        temporary = temporary_name(final)
        try:
            with tf.io.TFRecordWriter(temporary) as writer:
                for i, key in enumerate(keys):
                    value, index = (b"", b"") if missing[i] else (values[i].tobytes(), indices[i].tobytes())
                    writer.write(_encode({"key": os.fsencode(key), "value": value, "index": index}))
            tf.io.gfile.rename(temporary, final, overwrite=True)
        except tf.errors.OpError as error:
            with contextlib.suppress(tf.errors.OpError):
                tf.io.gfile.remove(temporary)
            reason = tensorflow_sentence(error.message).removeprefix(f"{temporary}; ")
            done = len(self.done_shards())
            raise OSError(
                f"{final} cannot be written: {reason}. The {done} finished shards are kept, and the same "
                "command continues."
            ) from error

    def finalize(self, *, max_missing: float = 1.0, setting: str = "max_missing") -> ScoreMapInfo:
        """Writes score_maps.json, which completes the folder, and returns its contents.

        Args:
          max_missing: largest fraction of images without a map, in [0, 1].
          setting: name of the setting of this fraction, for the message.

        Raises:
          ValueError: a shard is not written, or has another number of records than the source's shard, or too
            many images have no map.
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
                raise ValueError(f"{shard.file} has {shard.records} records, its image shard has {length}.")
        info = dataclasses.replace(self.info, shards=shards)
        if info.num_missing > max_missing * info.num_images:
            raise ValueError(
                f"{info.num_missing} of {info.num_images} images of {info.dataset} have no map, more than "
                f"{setting} = {max_missing:g} allows. {self.path} has the maps of all others; the same "
                "command with a larger limit completes it."
            )
        self.info = info
        self.info.write(os.path.join(self.path, INFO_FILE))
        started = os.path.join(self.path, STARTED_FILE)
        if tf.io.gfile.exists(started):
            tf.io.gfile.remove(started)
        return self.info

    def _remove_abandoned(self) -> None:
        """Removes the unfinished shards of killed processes of this host, and nobody else's."""
        for name in tf.io.gfile.listdir(self.path):
            if is_abandoned(name):
                with contextlib.suppress(tf.errors.NotFoundError):  # another process of this job was faster
                    tf.io.gfile.remove(os.path.join(self.path, name))

    def _start(self) -> None:
        """Writes the description of a new folder, or compares it with the folder's.

        A description without any shard, which a run leaves that failed at once, is replaced.
        """
        done = self.done_shards()
        for name in (INFO_FILE, STARTED_FILE):
            path = os.path.join(self.path, name)
            if tf.io.gfile.exists(path) and (done or name == INFO_FILE):
                self._check_same(ScoreMapInfo.read(path))
                return
        if done:
            raise ValueError(f"{self.path} has score-map shards but no description. Use another folder.")
        self.info.write(os.path.join(self.path, STARTED_FILE))

    def _check_same(self, found: ScoreMapInfo) -> None:
        """Raises ValueError if the folder has maps with another description."""
        names = [f.name for f in dataclasses.fields(ScoreMapInfo) if f.name != "shards"]
        differing = [
            f"{name} {getattr(found, name)!r} instead of {getattr(self.info, name)!r}"
            for name in names
            if getattr(found, name) != getattr(self.info, name)
        ]
        if differing:
            raise ValueError(
                f"{self.path} already has score maps with {', '.join(differing)}. Use another folder."
            )

    def _checked(
        self,
        shard_index: int,
        keys: Sequence[str],
        values: np.ndarray,
        indices: np.ndarray,
        missing: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns values and indices in the types of the format. Raises ValueError, see `write_shard`."""
        length = self.source.shard_lengths[shard_index]
        shape = (length, self.info.top_k, *self.info.grid)
        if len(keys) != length or values.shape != shape or indices.shape != shape or len(missing) != length:
            raise ValueError(
                f"Shard {shard_index} needs {length} keys and arrays of shape {shape}, not {len(keys)} keys, "
                f"values {values.shape} and indices {indices.shape}."
            )
        if len(set(keys)) != length:
            raise ValueError(
                f"Shard {shard_index} has {length} records but only {len(set(keys))} different keys."
            )
        if not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"Class indices must be integers, not {indices.dtype}.")
        used_values, used_indices = values[~missing], indices[~missing]
        classes = self.info.num_classes
        if used_indices.size and not 0 <= used_indices.min() <= used_indices.max() < classes:
            low, high = used_indices.min(), used_indices.max()
            raise ValueError(f"Class indices must be from 0 to {classes - 1}, not from {low} to {high}.")
        ordered = np.sort(used_indices, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(
                f"Shard {shard_index} has cells with a class twice among their {self.info.top_k}."
            )
        with np.errstate(over="ignore"):
            finite = np.isfinite(used_values.astype("<f2"))
            if not finite.all():
                raise ValueError(
                    f"{int((~finite).sum())} logits of shard {shard_index} are not finite in float16 "
                    "(largest: 65504)."
                )
            return values.astype("<f2"), indices.astype(self.info.index_dtype.newbyteorder("<"))


def _encode(fields: dict[str, bytes]) -> bytes:
    """A serialized tf.train.Example, its features in the order of their names."""
    feature = {k: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])) for k, v in fields.items()}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)
