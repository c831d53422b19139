"""Class folders, ROOT/SPLIT/CLASS/…, as a source whose records are image files."""

import collections
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tlvit.data.sources.source import Origin, Records, Source

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")  # in any case
CLASSES_FILE = "classes.txt"  # in ROOT, one class a line: the order of the labels
SHARD = 1000  # most images of a shard; score maps have one file for each shard
RECORD_BYTES = 64.0  # size of a raw record, which is the index of a file
ORDER_SEED = 0

log = logging.getLogger("tlvit")


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The image files of one split.

    Attributes:
      paths: relative to the split's folder, with "/", in the natural order of their names.
      labels: int64 [n], the class of each file.
      classes: names of the classes, in the order of their labels.
    """

    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]


def open_folder(root: str, split: str) -> Source:
    """Opens ROOT/SPLIT, a folder with one folder for each class.

    The first folder below the split is the class. Images may lie deeper. The shards are blocks of a fixed
    random permutation of the files, so every shard has images of all classes: training mixes well with a
    small shuffle buffer, and a part of a split is a fair sample. The key of an image is its path in the
    split's folder without the last suffix, or with it where two files differ in their suffix only.

    Args:
      root: a local folder.
      split: a folder in it, or a part of that folder: "train", "val", "train[:90%]", "train[500:]".

    Raises:
      ValueError: there is no such folder, it has no images, or it has a class that training does not have.
    """
    folder_name, start, stop = _parse_split(split)
    root = os.path.expanduser(root)
    folder = os.path.join(root, folder_name)
    files = list_images(root, folder_name)
    count = len(files.paths)
    first, last = _bound(start, count, default=0), _bound(stop, count, default=count)
    if first >= last:
        raise ValueError(f"Split {split!r} of {root} is empty: {folder_name} has {count} images.")
    origin, lengths = _cut(_identity(files, folder_name), count, first, last)
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
        records=_file_numbers(lengths),
        parse=_file_reader(folder, files, picks),
    )


def list_images(root: str, split: str) -> ImageFiles:
    """Finds the images of ROOT/SPLIT and their classes. The log says what is left out.

    The classes are those of ROOT/classes.txt. Without that file they are the class folders of ROOT/train that
    have images, or of the split where there is no ROOT/train, in natural order: a2 before a10.

    Raises:
      ValueError: as `open_folder`.
    """
    if not os.path.isdir(root):
        raise ValueError(f"There is no folder {root}.")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        found = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
        raise ValueError(f"{root} has no folder {split!r}; it has {found[:20] if found else 'no folders'}.")
    by_class, ignored, empty = _walk(folder)
    if not by_class:
        raise ValueError(
            f"{folder} has no images in class folders (CLASS/NAME with a suffix of {', '.join(SUFFIXES)}), "
            f"but {sum(ignored.values())} other files and {len(empty)} folders without an image."
        )
    if ignored:
        listing = ", ".join(f"{ignored[s]} {s or 'without suffix'}" for s in sorted(ignored)[:9])
        log.warning("%s: skipped %d files that are not images: %s", folder, sum(ignored.values()), listing)
    if empty:
        log.warning("%s: %d class folders without an image: %s", folder, len(empty), ", ".join(empty[:10]))
    classes = _class_names(root, split, by_class)
    _check_classes(root, split, by_class, classes)
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(by_class.get(name, ()), key=natural_key)
        paths += found
        labels += [label] * len(found)
    return ImageFiles(tuple(paths), np.array(labels, np.int64), tuple(classes))


def natural_key(name: str) -> tuple[tuple[int | str, ...], str]:
    """Returns a sorting key that compares numbers in names by value and ignores the case of letters."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name.lower())), name


def write_class_names(path: str, names: tuple[str, ...]) -> None:
    """Writes one class a line in the order of the labels, the format of ROOT/classes.txt."""
    temporary = f"{path}.tmp-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in names))
    os.replace(temporary, path)


def _parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Splits "train[10%:]" into the folder's name and the texts of its first and last bound."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise ValueError(
            f"{split!r} is not a split of class folders: write FOLDER or FOLDER[FROM:TO], in images or %."
        )
    folder, first, last = match.groups()
    return folder, first, last


def _bound(text: str | None, count: int, *, default: int) -> int:
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


def _cut(identity: str, count: int, first: int, last: int) -> tuple[Origin, tuple[int, ...]]:
    """The complete split of `count` images, and the lengths of the shards of its part [first, last)."""
    blocks = _block_lengths(count)
    starts = np.concatenate([[0], np.cumsum(blocks)])
    shards = tuple(s for s in range(len(blocks)) if starts[s] < last and starts[s + 1] > first)
    offsets = tuple(int(max(first - starts[s], 0)) for s in shards)
    lengths = tuple(int(min(starts[s + 1], last) - max(starts[s], first)) for s in shards)
    return Origin(identity, blocks, shards, offsets), lengths


def _walk(folder: str) -> tuple[dict[str, list[str]], collections.Counter, list[str]]:
    """Images of the class folders, numbers of other files by suffix, and class folders without an image."""
    by_class: dict[str, list[str]] = {}
    ignored, empty = collections.Counter(), []
    with os.scandir(folder) as entries:
        classes = [e for e in entries if not e.name.startswith(".")]
    for entry in classes:
        if not entry.is_dir():
            ignored[os.path.splitext(entry.name)[1].lower()] += 1
            continue
        found = []
        for parent, folders, names in os.walk(entry.path):
            folders[:] = [f for f in folders if not f.startswith(".")]
            below = os.path.relpath(parent, folder).replace(os.sep, "/")
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                if name.startswith("."):
                    continue
                if suffix in SUFFIXES:
                    found.append(f"{below}/{name}")
                else:
                    ignored[suffix] += 1
        if found:
            by_class[entry.name] = found
        else:
            empty.append(entry.name)
    return by_class, ignored, sorted(empty, key=natural_key)


def _class_names(root: str, split: str, by_class: dict[str, list[str]]) -> list[str]:
    """The classes in the order of their labels, see `list_images`."""
    listed = os.path.join(root, CLASSES_FILE)
    if os.path.isfile(listed):
        with open(listed, encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
        if len(set(names)) < len(names):
            raise ValueError(f"{listed} lists a class twice.")
        return names
    train = os.path.join(root, "train")
    if split != "train" and os.path.isdir(train):
        with os.scandir(train) as entries:
            folders = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
        return sorted((e.name for e in folders if _has_image(e.path)), key=natural_key)
    return sorted(by_class, key=natural_key)


def _check_classes(root: str, split: str, by_class: dict[str, list[str]], classes: list[str]) -> None:
    """Raises ValueError if the split has a class that is not one of `classes`."""
    folder = os.path.join(root, split)
    unknown = sorted(set(by_class) - set(classes), key=natural_key)
    if unknown:
        listed = os.path.join(root, CLASSES_FILE)
        origin = listed if os.path.isfile(listed) else os.path.join(root, "train")
        raise ValueError(
            f"{folder} has {len(unknown)} classes that training does not have: {', '.join(unknown[:10])}. "
            f"The {len(classes)} classes are those of {origin}."
        )
    if len(classes) == 1:
        log.warning("%s has only one class, %s", folder, classes[0])


def _has_image(folder: str) -> bool:
    """Whether there is an image in a folder or below it."""
    for _, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        if any(os.path.splitext(n)[1].lower() in SUFFIXES and not n.startswith(".") for n in names):
            return True
    return False


def _block_lengths(count: int) -> tuple[int, ...]:
    """Lengths of equal blocks of at most SHARD images."""
    blocks = -(-count // SHARD)
    return tuple(count * (i + 1) // blocks - count * i // blocks for i in range(blocks))


def _keys(paths: tuple[str, ...]) -> list[str]:
    """Paths without their suffix, or with it where two paths differ in their suffix only."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = collections.Counter(stems)
    return [stem if counts[stem] == 1 else path for stem, path in zip(stems, paths, strict=True)]


def _file_numbers(lengths: tuple[int, ...]) -> Records:
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
