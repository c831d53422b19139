"""Finds, replaces and counts corrupt images, retries lost files, and locates damaged shards."""

import glob
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tlvit.data.score_maps.reader import ScoreMapReader
from tlvit.data.score_maps.verification import verify_shard
from tlvit.data.shuffle import Order, window_segments
from tlvit.data.sources.annotated_folders import annotation_path
from tlvit.data.sources.source import Source
from tlvit.data.transforms.annotation import decode_annotation
from tlvit.error_text import tensorflow_sentence
from tlvit.images import decode_annotation as decode_with_pillow
from tlvit.images import printable, read_image

RETRY_SECONDS = (1.0, 5.0, 25.0)  # pauses before a file that cannot be opened or read is tried again
REPLACEMENTS = 4  # images that are tried one after the other in place of a corrupt one
FALLBACK_BATCHES = 16  # first window of batches in fallback mode; every further window is twice as long
LOST = (
    tf.errors.NotFoundError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
)

log = logging.getLogger("tlvit")


class CorruptImages:
    """Counts the corrupt images of a source, logs each of them once, and raises when there are too many.

    Args:
      source: the images.
      max_corrupt: largest fraction of corrupt images.
      setting: name of the setting of this fraction, for messages.
      replaced: whether another image replaces a corrupt one. Otherwise it is left out.

    Attributes:
      keys: keys of the corrupt images found so far.

    Raises:
      ValueError: max_corrupt is not in [0, 1].
    """

    def __init__(self, source: Source, *, max_corrupt: float, setting: str, replaced: bool):
        if not 0 <= max_corrupt <= 1:
            raise ValueError(f"{setting} must be in [0, 1], not {max_corrupt}.")
        self.source, self.max_corrupt, self.setting, self.replaced = source, max_corrupt, setting, replaced
        self.keys: set[str] = set()

    def add(self, keys: np.ndarray) -> None:
        """Adds the corrupt images of a batch.

        Args:
          keys: byte strings [B, n], the keys of the corrupt images that were tried for each image of the
            batch, then empty strings; [B] where images are not replaced.

        Raises:
          ValueError: more than the allowed fraction is corrupt, or all images tried for one of the batch.
        """
        action = "is replaced by the next one" if self.replaced else "is left out"
        total = self.source.num_examples
        for key in sorted({os.fsdecode(key) for key in np.ravel(keys) if key} - self.keys):
            self.keys.add(key)
            path, reason = self._path_and_reason(key)
            if len(self.keys) > self.max_corrupt * total:
                raise ValueError(
                    f"{len(self.keys)} of {total} images of {self.source.identity} cannot be read, more than "
                    f"{self.setting} = {self.max_corrupt:g} allows. The last one is {path}{reason}."
                )
            allowed = int(self.max_corrupt * total)
            log.warning(
                "image %s cannot be read and %s (%d so far, %d allowed)%s",
                path, action, len(self.keys), allowed, reason,
            )  # fmt: skip
        for row in keys if self.replaced else ():
            if all(row):
                names = ", ".join(printable(key) for key in row)
                raise ValueError(
                    f"{len(row)} images in a row of {self.source.identity} cannot be read: {names}."
                )

    def _path_and_reason(self, key: str) -> tuple[str, str]:
        """The path of an image or its annotation and ": REASON", why it cannot be read; the key for sources
        without files."""
        if not self.source.is_folder:
            return printable(key), ""
        path = os.path.join(self.source.files[0], key)
        for file in (path, *glob.glob(glob.escape(path) + ".*")):
            if os.path.exists(file):
                try:
                    read_image(file, exif=self.source.exif)
                except ValueError as error:
                    return printable(file), f": {error}"
        if self.source.annotation_folder:
            file = os.path.join(self.source.annotation_folder, annotation_path(key))
            try:
                content = pathlib.Path(file).read_bytes()
                decode_with_pillow(content)  # its errors are the clearer ones
                decode_annotation(tf.constant(content))
            except OSError as error:
                return printable(file), f": {error.strerror or error}"
            except ValueError as error:
                return printable(file), f": {error}"
            except tf.errors.OpError as error:
                return printable(file), f": {tensorflow_sentence(error.message)}"
        return printable(path), ""


def read_batches(
    make: Callable[[int, bool], tf.data.Dataset],
    *,
    threads: int,
    corrupt: CorruptImages,
    locate: Callable[[int], str],
) -> Iterator[dict[str, Any]]:
    """The batches of a dataset as NumPy arrays. Continues after corrupt images and lost files.

    Images are read at full speed until one cannot be decoded. A window of batches is then read in fallback
    mode, which finds the corrupt images (see `first_success`) and is about a third slower. After the window,
    reading returns to full speed. The batches are the same in both modes.

    Args:
      make: maps (number of batches to skip, fallback mode) to a Dataset of dictionaries. In fallback mode
        they have the field "corrupt", the keys of corrupt images. Otherwise they must not try an image again
        that is in `corrupt.keys`.
      threads: number of threads for all work of the dataset.
      corrupt: counts the corrupt images.
      locate: maps the number of batches before an error to a sentence that says which file is damaged.

    Raises:
      ValueError: too many images are corrupt, a file is damaged or stays lost, or a check in the graph fails.
    """
    done, fallback_until, window, failures = 0, 0, FALLBACK_BATCHES, 0
    make = tf.autograph.experimental.do_not_convert(make)  # no Python control flow depends on a tensor
    # Local copies: when Python exits, it clears the names of modules before it closes an open iterator.
    damaged, lost, any_error = tf.errors.DataLossError, LOST, tf.errors.OpError
    while True:
        fallback = done < fallback_until
        try:
            for element in make(done, fallback).with_options(_options(threads)).as_numpy_iterator():
                corrupt.add(element.pop("corrupt", ()))
                yield element
                done, failures = done + 1, 0
                if fallback and done == fallback_until:
                    break
            else:
                return
        except damaged as error:
            raise ValueError(locate(done)) from error
        except lost as error:
            if failures < len(RETRY_SECONDS):
                pause = RETRY_SECONDS[failures]
                log.warning("%s; trying again in %g s", error_sentence(error.message), pause)
                time.sleep(pause)
                failures += 1
            elif corrupt.source.is_folder and not fallback:  # the lost file is a single image
                fallback_until, window = done + window, 2 * window
            else:
                raise ValueError(error_sentence(error.message)) from error
        except (any_error, UnicodeDecodeError) as error:
            # TensorFlow raises the latter in place of any error whose message is not UTF-8.
            message = getattr(error, "message", "the error names a file whose name is not UTF-8")
            if fallback or "assertion failed" in message:
                raise ValueError(error_sentence(message)) from error
            sentence = error_sentence(message)
            log.warning("%s; reading the next %d batches in fallback mode", sentence, window)
            fallback_until, window = done + window, 2 * window


def replace_corrupt(
    data: tf.data.Dataset, prepare: Callable, key_of: Callable[[Any], tf.Tensor], *, threads: int
) -> tf.data.Dataset:
    """Prepares every record, or its first replacement that can be prepared.

    Args:
      data: Dataset of (record stacked with its REPLACEMENTS, counter), from `ordered_records`.
      prepare: maps (record, counter) to a dictionary; may fail.
      key_of: maps a record to its key; must not fail.
      threads: number of records that are prepared in parallel.

    Returns:
      Dataset of the dictionaries with the further field "corrupt", string [1 + REPLACEMENTS]: the keys of the
      records that failed, then empty strings. If all failed, the other fields are zero.
    """
    keys = lambda group, count: tf.stack(
        [tf.where(i < count, key_of(_nth(group, i)), "") for i in range(1 + REPLACEMENTS)]
    )

    def attempt(i: tf.Tensor, group: Any, counter: tf.Tensor) -> dict[str, tf.Tensor]:
        none_failed = lambda: tf.zeros([1 + REPLACEMENTS], tf.string)
        failed = tf.cond(i > 0, lambda: keys(group, i), none_failed)
        return prepare(_nth(group, i), counter) | {"corrupt": failed}

    def all_failed(spec: Any, group: Any, counter: tf.Tensor) -> dict[str, tf.Tensor]:
        zeros = tf.nest.map_structure(lambda part: tf.zeros(part.shape, part.dtype), spec)
        return zeros | {"corrupt": keys(group, 1 + REPLACEMENTS)}

    return first_success(data, attempt, all_failed, count=1 + REPLACEMENTS, threads=threads)


def skip_corrupt(group: Any, known: frozenset[str], key_of: Callable[[Any], tf.Tensor]) -> Any:
    """The first record of a group that is not `known` to be corrupt, or the last one if all are.

    Args:
      group: a record stacked with its REPLACEMENTS.
      known: keys of corrupt images.
      key_of: maps a record to its key.
    """
    keys = tf.constant([os.fsencode(key) for key in sorted(known)])
    is_corrupt = lambda i: tf.reduce_any(tf.equal(key_of(_nth(group, i)), keys))
    step = lambda i: (i + 1,)
    (first,) = tf.while_loop(lambda i: (i < REPLACEMENTS) & is_corrupt(i), step, (tf.constant(0),))
    return _nth(group, first)


def first_success(
    data: tf.data.Dataset, attempt: Callable, fallback: Callable, *, count: int, threads: int
) -> tf.data.Dataset:
    """The first of several attempts that succeeds, for every element of a dataset, in order and in parallel.

    Args:
      data: Dataset of elements.
      attempt: maps (i, *element) to any structure; may fail, for i in [0, count).
      fallback: maps (element specification of `attempt`, *element) to the same structure; used if all
        attempts fail.
      count: number of attempts.
      threads: number of elements that are tried in parallel.
    """

    def attempts(*element: Any) -> tf.data.Dataset:
        tried = tf.data.Dataset.range(count).map(lambda i: attempt(i, *element)).ignore_errors()
        last = tf.data.Dataset.range(1).map(lambda _: fallback(tried.element_spec, *element))
        return tried.concatenate(last).take(1)

    return data.interleave(
        attempts, cycle_length=threads, block_length=1, num_parallel_calls=threads, deterministic=True
    )


def error_sentence(message: str) -> str:
    """The sentence in an error message of TensorFlow, without the names of graph nodes."""
    _, found, text = message.partition("assertion failed: ")
    if found:
        return " ".join(text.splitlines()[0].strip()[1:-1].split("] ["))
    return f"reading images failed: {tensorflow_sentence(message)}"


def locate_damage(source: Source, maps: ScoreMapReader | None, order: Order | None, step: int) -> str:
    """Says which file is damaged.

    Args:
      source: the images.
      maps: the score maps that are read with them.
      order: the order of training, or None to read all of the source's files.
      step: the step at which the damage was found.
    """
    shards = range(len(source.shard_lengths)) if order is None else _shards_near(order, step)
    for shard in shards if not source.is_folder else ():
        try:
            for _ in tf.data.TFRecordDataset(source.files[shard]):
                pass
        except tf.errors.DataLossError as error:
            return f"image shard {source.files[shard]} is damaged: {error_sentence(error.message)}"
    if maps is not None:
        for number in range(len(maps.files)):
            try:
                verify_shard(maps, number)
            except ValueError as error:
                return str(error)
    return f"a shard of {source.identity} is damaged"


def _shards_near(order: Order, step: int) -> list[int]:
    """The shards that are read while batch `step` is made: those of its windows and of the next two."""
    number = order.window_at(step)
    found = set()
    for stream in range(order.streams):
        for n in range(number, number + 3):
            epoch, window = (tf.constant(x, tf.int64) for x in divmod(n, order.windows_per_epoch))
            found.update(window_segments(order, stream, epoch, window)[0].numpy().tolist())
    return sorted(found)


def _nth(group: Any, i: int | tf.Tensor) -> Any:
    """Record i of a group of stacked records."""
    return tf.nest.map_structure(lambda x: tf.gather(x, i), group)


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.experimental_optimization.inject_prefetch = False
    options.autotune.enabled = False  # nothing is left to tune; its thread delays the end of one-core runs
    return options
