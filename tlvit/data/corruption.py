"""What happens when files break: broken images are replaced, lost files tried again, damage named."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tlvit.data.score_maps.reader import ScoreMapReader, verify_shard
from tlvit.data.shuffle import Order, window_segments
from tlvit.data.sources.source import Source

RETRY_SECONDS = (1.0, 5.0, 25.0)  # pauses before a file that cannot be opened or read is tried again
SPARES = 4  # images that are tried in turn where one is broken
GUARDED = 16  # batches made under guard after an image failed; twice as many each next time
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


class BrokenImages:
    """Counts the images of a source that cannot be read, names each of them once in the log, and says when
    there are too many.

    Args:
      source: the images.
      max_bad: largest share of them that may be broken.
      limit: what to call this share in messages: how the caller sets it.
      replaced: whether another image takes a broken one's place, or it is left out.
    """

    def __init__(self, source: Source, *, max_bad: float, limit: str, replaced: bool):
        if not 0 <= max_bad <= 1:
            raise ValueError(f"{limit} is a share of the images between 0 and 1, not {max_bad}")
        self.source, self.max_bad, self.limit, self.replaced = source, max_bad, limit, replaced
        self.keys: set[str] = set()

    def note(self, keys: np.ndarray) -> None:
        """Take note of broken images: keys [B, n] of those tried for each place, empty for sound ones.

        Raises:
          ValueError: more than the allowed share is broken, or all that were tried for one place.
        """
        remedy = "the next one takes its place" if self.replaced else "it is left out"
        for key in sorted({key.decode() for key in np.ravel(keys) if key} - self.keys):
            self.keys.add(key)
            count, total = len(self.keys), self.source.num_examples
            where = f"{self.source.files[0]}/{key}" if self.source.is_folder else key
            if count > self.max_bad * total:
                raise ValueError(
                    f"{count} of {total} images of {self.source.identity} cannot be read, more than "
                    f"{self.limit} = {self.max_bad:g} allows; the last one is {where}"
                )
            allowed = int(self.max_bad * total)
            log.warning("image %s cannot be read; %s (%d so far, %d allowed)", where, remedy, count, allowed)
        for row in keys if self.replaced else ():
            if all(row):
                names = ", ".join(key.decode() for key in row)
                raise ValueError(
                    f"{len(row)} images in a row of {self.source.identity} cannot be read: {names}"
                )


def run(
    make: Callable[[int, bool], tf.data.Dataset],
    *,
    threads: int,
    broken: BrokenImages,
    blame: Callable[[int], str],
) -> Iterator[dict[str, Any]]:
    """The batches of a data set in numpy, whatever happens to its files on the way, or a ValueError.

    Reading goes at full speed until an image cannot be decoded. Then a stretch of batches is made under
    guard, see `first_good`, which finds out which images are broken and costs a third of the speed; after it
    reading goes on at full speed. What comes out is the same.

    Args:
      make: (number of batches to leave out, whether to guard) -> Dataset of dictionaries; guarded ones have
        "broken", the keys of broken images; others must not try an image again that `broken` has noted.
      threads: for all of the data set's work.
      broken: takes note of the broken images.
      blame: number of batches before the damage -> which file is damaged.

    Raises:
      ValueError: too many images are broken, a file is damaged or lost for good, or a record is not what it
        should be.
    """
    done, guard_until, stretch, failures = 0, 0, GUARDED, 0
    # Local names, as the module's own are gone when Python ends and closes an iterator that is still open.
    damaged, lost, any_error = tf.errors.DataLossError, LOST, tf.errors.OpError
    while True:
        guarded = done < guard_until
        try:
            for element in make(done, guarded).with_options(_options(threads)).as_numpy_iterator():
                broken.note(element.pop("broken", ()))
                yield element
                done, failures = done + 1, 0
                if guarded and done == guard_until:
                    break
            else:
                return
        except damaged as error:
            raise ValueError(blame(done)) from error
        except lost as error:
            if failures < len(RETRY_SECONDS):
                pause = RETRY_SECONDS[failures]
                log.warning("%s; trying again in %g s", plain(error.message), pause)
                time.sleep(pause)
                failures += 1
            elif broken.source.is_folder and not guarded:  # a single file is gone, and it is an image
                guard_until, stretch = done + stretch, 2 * stretch
            else:
                raise ValueError(plain(error.message)) from error
        except any_error as error:
            if guarded or "assertion failed" in error.message:
                raise ValueError(plain(error.message)) from error
            log.warning("%s; the next %d batches are made under guard", plain(error.message), stretch)
            guard_until, stretch = done + stretch, 2 * stretch


def replace_broken(
    data: tf.data.Dataset, prepare: Callable, key_of: Callable[[Any], tf.Tensor], *, threads: int
) -> tf.data.Dataset:
    """Every record prepared, or the first of its spares that can be.

    Args:
      data: Dataset of (record with SPARES others behind it, counter), from `ordered_records`.
      prepare: (record, counter) -> dictionary; may fail.
      key_of: record -> its key; must not fail.
      threads: records prepared at the same time.

    Returns:
      Dataset of the dictionaries with "broken", string [1 + SPARES]: the keys of the records that failed,
      empty behind them. Where all failed, everything else is zero.
    """
    keys = lambda group, count: tf.stack(
        [tf.where(i < count, key_of(_nth(group, i)), "") for i in range(1 + SPARES)]
    )

    def attempt(i, group, counter):
        sound = lambda: tf.zeros([1 + SPARES], tf.string)
        return prepare(_nth(group, i), counter) | {"broken": tf.cond(i > 0, lambda: keys(group, i), sound)}

    def none(spec, group, counter):
        blank = tf.nest.map_structure(lambda part: tf.zeros(part.shape, part.dtype), spec)
        return blank | {"broken": keys(group, 1 + SPARES)}

    return first_good(data, attempt, none, count=1 + SPARES, threads=threads)


def avoid_broken(group: Any, known: set[str], key_of: Callable[[Any], tf.Tensor]) -> Any:
    """Of a record with SPARES others behind it, the first that is not `known` to be broken; if all are, the
    last."""
    known = tf.constant(sorted(known))
    is_broken = lambda i: tf.reduce_any(tf.equal(key_of(_nth(group, i)), known))
    first = tf.while_loop(lambda i: (i < SPARES) & is_broken(i), lambda i: (i + 1,), (tf.constant(0),))[0]
    return _nth(group, first)


def first_good(
    data: tf.data.Dataset, attempt: Callable, fallback: Callable, *, count: int, threads: int
) -> tf.data.Dataset:
    """The first of several attempts that works, for every element of a data set, in order and in parallel.

    Args:
      data: Dataset of elements.
      attempt: (i, *element) -> anything; may fail for i = 0 … count - 1.
      fallback: (specification, *element) -> the same structure, taken when all attempts fail.
      count: number of attempts.
      threads: elements tried at the same time.
    """

    def attempts(*element):
        tried = tf.data.Dataset.range(count).map(lambda i: attempt(i, *element)).ignore_errors()
        last = tf.data.Dataset.range(1).map(lambda _: fallback(tried.element_spec, *element))
        return tried.concatenate(last).take(1)

    return data.interleave(
        attempts, cycle_length=threads, block_length=1, num_parallel_calls=threads, deterministic=True
    )


def whole_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    """The encoded image itself, or an error if it is a JPEG that ends early.

    Decoding a crop stops below the crop and would notice or not, as the crop falls. A file that ends with the
    end marker costs nothing; others, which may have only something behind it, are decoded once in full.
    """
    ended = tf.strings.substr(encoded, -2, 2) == b"\xff\xd9"

    def decode():
        # The result has to depend on the pixels: a graph drops what nothing is made of.
        return tf.where(tf.size(tf.io.decode_jpeg(encoded, channels=3)) > 0, encoded, "")

    return tf.cond(tf.io.is_jpeg(encoded) & ~ended, decode, lambda: encoded)


def plain(message: str) -> str:
    """The sentence in an error of TensorFlow, without the names of its graph's nodes."""
    _, found, said = message.partition("assertion failed: ")
    if found:
        words = said.splitlines()[0].strip()[1:-1].split("] [")
        return " ".join(words)
    line = message.splitlines()[0]
    return "reading images failed: " + line.rpartition("}} ")[2].replace(" [Op:IteratorGetNext] name: ", "")


def name_damage(source: Source, maps: ScoreMapReader | None, order: Order | None, step: int) -> str:
    """Which file near a step of training is damaged; without an order, all of the source's files are read."""
    shards = range(len(source.shard_lengths)) if order is None else _shards_near(order, step)
    for shard in shards if not source.is_folder else ():
        try:
            for _ in tf.data.TFRecordDataset(source.files[shard]):
                pass
        except tf.errors.DataLossError as error:
            return f"image shard {source.files[shard]} is damaged: {plain(error.message)}"
    for number in range(len(maps.files)) if maps else ():
        try:
            verify_shard(maps, number)
        except ValueError as error:
            return str(error)
    return f"a shard of {source.identity} is damaged"


def _shards_near(order: Order, step: int) -> list[int]:
    """Shards that are being read while batch `step` is made: those of its windows and of the next two."""
    number = order.window_of(step)
    found = set()
    for lane in range(order.lanes):
        for n in range(number, number + 3):
            epoch, window = (tf.constant(x, tf.int64) for x in divmod(n, order.windows_per_epoch))
            found.update(window_segments(order, lane, epoch, window)[0].numpy().tolist())
    return sorted(found)


def _nth(group: Any, i: int | tf.Tensor) -> Any:
    """Record i of some that are stacked."""
    return tf.nest.map_structure(lambda x: tf.gather(x, i), group)


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    options.experimental_optimization.inject_prefetch = False
    return options
