"""Verifies score maps: a whole folder, or each shard in the background while a run reads its first epoch."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import tensorflow as tf

from tlvit.data.score_maps.format import ScoreMapInfo, describe_shard
from tlvit.data.score_maps.reader import ScoreMapReader, open_score_maps
from tlvit.data.sources.source import Source
from tlvit.error_text import tensorflow_sentence
from tlvit.images import printable

CHECKED_TOGETHER = 256  # maps

T = TypeVar("T")

log = logging.getLogger("tlvit")


def verify(path: str | os.PathLike, source: Source | None = None) -> ScoreMapInfo:
    """Reads and checks everything in a folder of score maps.

    Args:
      path: the folder.
      source: the images that the maps were made for, or a part of them. Their keys are compared with those of
        the maps. None: the images are not read.

    Returns:
      The description of the maps.

    Raises:
      ValueError: as `open_score_maps`, or a checksum, count, key, logit or index is wrong.
    """
    reader = open_score_maps(path)
    if source is not None:
        reader.check_against(source)
    seen: set[str] = set()
    for number, file in enumerate(reader.files):
        verify_shard(reader, number)
        for key in verify_contents(reader, number):
            if key in seen:
                raise ValueError(f"{file} has a second map for {printable(key)!r}")
            seen.add(key)
    if len(seen) != reader.info.num_images:
        raise ValueError(f"{path} has {len(seen)} maps instead of {reader.info.num_images}")
    if source is not None:
        verify_keys(reader, source)
    return reader.info


def verify_keys(reader: ScoreMapReader, source: Source) -> None:
    """Raises ValueError unless the map of every image has the image's key."""
    records = reader.records_of(source)
    for shard, length in enumerate(source.shard_lengths):
        keys = source.records(shard, 0).map(lambda raw: source.parse(raw)["key"])
        owners = records(shard, 0).take(length).map(lambda record: reader.parse(record)["key"])
        for key, owner in tf.data.Dataset.zip(keys, owners).as_numpy_iterator():
            if key != owner:
                raise ValueError(
                    f"score map of another image: the image is {printable(key)} but its map in {reader.path} "
                    f"belongs to {printable(owner)}"
                )


def verify_shard(reader: ScoreMapReader, number: int) -> None:
    """Raises ValueError unless the checksum and the number of records of a shard are as described."""
    file, expected = reader.files[number], reader.info.shards[number]
    found = describe_shard(file)
    if found.sha256 != expected.sha256:
        raise ValueError(
            f"score-map shard {file} is damaged: SHA-256 {found.sha256[:12]}… "
            f"instead of {expected.sha256[:12]}…"
        )
    if (found.records, found.missing) != (expected.records, expected.missing):
        raise ValueError(
            f"score-map shard {file} has {found.records} records, {found.missing} of them without a map, "
            f"instead of {expected.records} and {expected.missing}"
        )


def verify_contents(reader: ScoreMapReader, number: int) -> list[str]:
    """The keys of a shard, after a check of every map.

    Raises:
      ValueError: a map has another number of values than described, logits that are not finite, a class that
        does not exist, or a class twice in a cell.
    """
    file, classes, keys = reader.files[number], reader.info.num_classes, []
    for maps in reader.read(number).batch(CHECKED_TOGETHER).as_numpy_iterator():
        keys += [os.fsdecode(key) for key in maps["key"]]
        value, index, present = maps["value"], maps["index"], ~maps["missing"]
        ordered = np.sort(index, axis=1)
        wrong = {
            "has another size than described": maps["problem"] != b"",
            "has logits that are not finite": ~np.isfinite(value).all((1, 2, 3)),
            f"has a class that is not in [0, {classes})": (index >= classes).any((1, 2, 3))
            | (index < 0).any((1, 2, 3)),
            "has a class twice in a cell": present & (ordered[:, 1:] == ordered[:, :-1]).any((1, 2, 3)),
        }
        for what, found in wrong.items():
            if found.any():
                key = keys[len(keys) - len(found) + int(found.argmax())]
                raise ValueError(f"the map of {printable(key)!r} in {file} {what}")
    return keys


def verified(
    batches: Iterator[T],
    reader: ScoreMapReader,
    shards: Iterable[int],
    *,
    first_step: int,
    steps_per_epoch: int,
) -> Iterator[T]:
    """The same batches, while a thread verifies shards of their score maps, each once.

    Args:
      batches: batches of training, in order.
      reader: their score maps.
      shards: indices of the shards to verify.
      first_step: the step of the first batch.
      steps_per_epoch: the first batch of a second epoch is given when all shards are verified.

    Raises:
      ValueError: a shard is damaged or its contents are wrong. Raised at the next batch.
    """
    check = _Verification(reader, list(shards))
    check.thread.start()
    try:
        for step, batch in enumerate(batches, first_step):
            if step // steps_per_epoch > first_step // steps_per_epoch:
                check.thread.join()
            if check.error is not None:
                raise check.error
            yield batch
    finally:
        check.stopped.set()
        check.thread.join()


class _Verification:
    """A thread that verifies shards until one is wrong, it is stopped, or Python exits."""

    def __init__(self, reader: ScoreMapReader, shards: list[int]):
        self.reader, self.shards = reader, shards
        self.error: Exception | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="verify score maps")

    def _run(self) -> None:
        try:
            for shard in self.shards:
                if self.stopped.is_set() or not threading.main_thread().is_alive():
                    return
                verify_shard(self.reader, shard)
                verify_contents(self.reader, shard)
            log.info("verified the checksums and contents of %d score-map shards", len(self.shards))
        except (ValueError, OSError) as error:  # raised where the batches are read
            self.error = error
        except tf.errors.OpError as error:
            self.error = OSError(f"A score map of {self.reader.path}: {tensorflow_sentence(error.message)}.")
