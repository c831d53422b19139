"""Class folders, ROOT/SPLIT/CLASS/…, as a source whose records are image files."""

import collections
import hashlib
import os
import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tlvit.data.sources.image_files import ImageFiles, find_split, list_images
from tlvit.data.sources.source import Origin, Records, Source
from tlvit.images import printable

SHARD = 1000  # most images of a shard; score maps have one file for each shard
RECORD_BYTES = 64.0  # size of a raw record, which is the index of a file
ORDER_SEED = 0


def open_folder(root: str, split: str, *, exif: bool = True) -> Source:
    """Opens ROOT/SPLIT, a folder with one folder for each class.

    The first folder below the split is the class. Images may lie deeper. The shards are blocks of a fixed
    random permutation of the files, so every shard has images of all classes: training mixes well with a
    small shuffle buffer, and a part of a split is a fair sample. The key of an image is its path in the
    split's folder without the last suffix, or with it where two files differ in their suffix only.

    Args:
      root: a local folder.
      split: a folder in it, or a part of that folder: "train", "val", "train[:90%]", "train[500:]". Where
        only one of "val" and "validation" exists, both names mean that folder.
      exif: whether images are turned as their EXIF orientation says.

    Raises:
      ValueError: there is no such folder, or as `list_images`.
    """
    root = os.path.expanduser(root)
    asked, start, stop = parse_split(split)
    folder_name = find_split(root, asked)
    split = folder_name + split[len(asked) :]
    folder = os.path.join(root, folder_name)
    files = list_images(root, folder_name)
    count = len(files.paths)
    first, last = bound(start, count, default=0), bound(stop, count, default=count)
    if first >= last:
        raise ValueError(f"Split {split!r} of {printable(root)} is empty: {folder_name} has {count} images.")
    origin, lengths = cut(_identity(files, folder_name), count, first, last)
    picks = np.random.RandomState(ORDER_SEED).permutation(count)[first:last]
    return Source(
        name=root,
        split=split,
        identity=f"{origin.identity}{split[len(folder_name) :]}",
        num_examples=last - first,
        num_classes=len(files.classes),
        class_names=files.classes,
        shard_lengths=lengths,
        record_bytes=RECORD_BYTES,
        key_kind="path",
        files=(folder,) * len(lengths),
        origin=origin,
        records=file_numbers(lengths),
        parse=_file_reader(folder, files, picks),
        exif=exif,
    )


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Splits "train[10%:]" into the folder's name and the texts of its first and last bound."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise ValueError(
            f"{split!r} is not a split of class folders: write FOLDER or FOLDER[FROM:TO], in images or %."
        )
    folder, first, last = match.groups()
    return folder, first, last


def bound(text: str | None, count: int, *, default: int) -> int:
    """The index of a bound like "10%", "500" or "-9" among `count` images."""
    if text is None:
        return default
    number = round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)
    return min(max(number + count if text.startswith("-") else number, 0), count)


def _identity(files: ImageFiles, folder_name: str) -> str:
    """Identity of a complete split. It depends on the files' names and the classes, not on their folder."""
    text = "\n".join((*files.paths, "", *files.classes))
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return f"class_folders/{len(files.paths)}-images-{digest[:12]}:{folder_name}"


def cut(identity: str, count: int, first: int, last: int) -> tuple[Origin, tuple[int, ...]]:
    """The complete split of `count` images, and the lengths of the shards of its part [first, last)."""
    blocks = _block_lengths(count)
    starts = np.concatenate([[0], np.cumsum(blocks)])
    shards = tuple(s for s in range(len(blocks)) if starts[s] < last and starts[s + 1] > first)
    offsets = tuple(int(max(first - starts[s], 0)) for s in shards)
    lengths = tuple(int(min(starts[s + 1], last) - max(starts[s], first)) for s in shards)
    return Origin(identity, blocks, shards, offsets), lengths


def _block_lengths(count: int) -> tuple[int, ...]:
    """Lengths of equal blocks of at most SHARD images."""
    blocks = -(-count // SHARD)
    return tuple(count * (i + 1) // blocks - count * i // blocks for i in range(blocks))


def _keys(paths: tuple[str, ...]) -> list[str]:
    """Paths without their suffix, or with it where two paths differ in their suffix only."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = collections.Counter(stems)
    return [stem if counts[stem] == 1 else path for stem, path in zip(stems, paths, strict=True)]


def file_numbers(lengths: tuple[int, ...]) -> Records:
    """(shard, offset) -> Dataset of {"file": index of the image in the source}. No file is read."""
    starts = tf.constant(np.concatenate([[0], np.cumsum(lengths)]), tf.int64)

    def records(shard: int | tf.Tensor, offset: int | tf.Tensor) -> tf.data.Dataset:
        shard = tf.cast(shard, tf.int64)
        first = tf.gather(starts, shard) + tf.cast(offset, tf.int64)
        data = tf.data.Dataset.range(first, tf.gather(starts, shard + 1))
        return data.map(lambda number: {"file": number})

    return records


def _file_reader(
    folder: str, files: ImageFiles, picks: np.ndarray
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """{"file"} -> {"image", "label", "key"}. The returned function reads the file."""
    keys = _keys(files.paths)
    with tf.device("CPU"):
        # Created outside of a graph, so that data sets refer to these tensors instead of copying them.
        names = tf.constant([os.fsencode(files.paths[i]) for i in picks])
        keys = tf.constant([os.fsencode(keys[i]) for i in picks])
        labels = tf.constant(files.labels[picks], tf.int64)

    def parse(raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        path = tf.strings.join([folder + os.sep, tf.gather(names, raw["file"])])
        label, key = tf.gather(labels, raw["file"]), tf.gather(keys, raw["file"])
        return {"image": tf.io.read_file(path), "label": label, "key": key}

    return parse
