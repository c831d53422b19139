"""Images in class folders, ROOT/SPLIT/CLASS/…, as a source whose records are files."""

import collections
import dataclasses
import hashlib
import logging
import os
import re

import numpy as np
import tensorflow as tf

from tlvit.data.sources.source import Origin, Source

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")  # in capitals too
CLASSES_FILE = "classes.txt"  # in ROOT, one class a line: the order of the labels, where it is another
SHARD = 1000  # images of a shard, which score maps are written by
RECORD_BYTES = 64.0  # of a raw record, which is no more than a file's number
ORDER_SEED = 0

log = logging.getLogger("tlvit")


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The image files of one split.

    Attributes:
      paths: relative to the split's folder, with "/", in the natural order of their names.
      labels: int64, the class of each.
      classes: names of the classes, by label.
    """

    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]


def open_folder(root: str, split: str) -> Source:
    """Open ROOT/SPLIT, a folder with one folder for each class.

    The first folder below the split is the class; images may lie deeper. The shards are blocks of a fixed
    random order of the files, not of the sorted one: a stretch of a shard then holds all classes, so training
    mixes well with a small window and a part of a split is a fair sample. An image's key is its path in the
    split's folder without the last suffix (with it, where two files differ in nothing else).

    Args:
      root: a local folder.
      split: a folder in it, or a part of that: "train", "val", "train[:90%]", "train[500:]".

    Raises:
      ValueError: there is no such folder, no image in it, or a class that is not a class of training.
    """
    folder_name, first, last = _parse_split(split)
    root = os.path.expanduser(root)
    folder = os.path.join(root, folder_name)
    files = list_images(root, folder_name)
    count = len(files.paths)
    picks = np.random.RandomState(ORDER_SEED).permutation(count)
    first, last = first(count), last(count)
    if first >= last:
        raise ValueError(f"split {split!r} of {root} is empty: {folder_name} has {count} images")

    digest = hashlib.sha256("\n".join((*files.paths, "", *files.classes)).encode("utf-8", "surrogateescape"))
    whole = f"class_folders/{count}-images-{digest.hexdigest()[:12]}:{folder_name}"
    whole_lengths = _block_lengths(count)
    starts = np.concatenate([[0], np.cumsum(whole_lengths)])
    touched = [s for s in range(len(whole_lengths)) if starts[s] < last and starts[s + 1] > first]
    lengths = tuple(int(min(starts[s + 1], last) - max(starts[s], first)) for s in touched)
    offsets = tuple(int(max(first - starts[s], 0)) for s in touched)
    return Source(
        name=root,
        split=split,
        identity=f"{whole}{split[len(folder_name) :]}",
        num_examples=last - first,
        num_classes=len(files.classes),
        class_names=files.classes,
        shard_lengths=lengths,
        record_bytes=RECORD_BYTES,
        key_kind="path",
        files=(folder,) * len(lengths),
        origin=Origin(whole, whole_lengths, tuple(touched), offsets),
        records=_file_numbers(lengths),
        parse=_file_reader(folder, files, picks[first:last]),
    )


def list_images(root: str, split: str) -> ImageFiles:
    """Find the images of ROOT/SPLIT and their classes; say in the log what is left out.

    The classes are those of ROOT/classes.txt, or else the class folders of ROOT/train that hold images (of
    the split itself where there is no such folder), sorted as people sort numbered names: a2 before a10.

    Raises:
      ValueError: as `open_folder`.
    """
    if not os.path.isdir(root):
        raise ValueError(f"there is no folder {root}")
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        there = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
        raise ValueError(f"{root} has no folder {split!r}; it has {there[:20] if there else 'no folders'}")
    by_class, ignored, empty = _walk(folder)
    if not by_class:
        raise ValueError(
            f"{folder} has no images in class folders (CLASS/NAME with a suffix of {', '.join(SUFFIXES)}), "
            f"but {sum(ignored.values())} other files and {len(empty)} folders without an image"
        )
    if ignored:
        listing = ", ".join(f"{ignored[s]} {s or 'without suffix'}" for s in sorted(ignored)[:9])
        log.warning("%s: %d files are no images of a class: %s", folder, sum(ignored.values()), listing)
    if empty:
        log.warning("%s: %d class folders without an image: %s", folder, len(empty), ", ".join(empty[:10]))
    classes = _class_names(root, split, by_class)
    unknown = sorted(set(by_class) - set(classes), key=natural_key)
    if unknown:
        raise ValueError(
            f"{folder} has {len(unknown)} classes that training has not: {', '.join(unknown[:10])}; "
            f"the {len(classes)} classes are those of {_classes_origin(root, split)}"
        )
    if len(classes) == 1:
        log.warning("%s has a single class, %s: there is nothing to tell apart", folder, classes[0])
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(by_class.get(name, ()), key=natural_key)
        paths += found
        labels += [label] * len(found)
    return ImageFiles(tuple(paths), np.array(labels, np.int64), tuple(classes))


def natural_key(name: str) -> tuple:
    """Sorting key that compares the numbers in names as numbers, and letters whatever their case."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name.lower())), name


def write_class_names(path: str, names: tuple[str, ...]) -> None:
    """Write one class a line, by label: as ROOT/classes.txt, `list_images` takes the classes from it."""
    temporary = f"{path}.tmp-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in names))
    os.replace(temporary, path)


def _parse_split(split: str):
    """ "train[10%:]" -> the folder's name, and (number of images -> place) of the part's first and last."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise ValueError(
            f"{split!r} is no split of class folders: write FOLDER or FOLDER[FROM:TO] (images or %)"
        )
    name, *bounds = match.groups()

    def place(text: str | None, default: int):
        def of(count: int) -> int:
            if text is None:
                return count * default
            number = round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)
            return min(max(number + count if text.startswith("-") else number, 0), count)

        return of

    return name, place(bounds[0], 0), place(bounds[1], 1)


def _walk(folder: str) -> tuple[dict[str, list[str]], collections.Counter, list[str]]:
    """Images of each class folder that has any, other files by suffix, and class folders without an image."""
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
    listed = os.path.join(root, CLASSES_FILE)
    if os.path.isfile(listed):
        with open(listed, encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
        if len(set(names)) < len(names):
            raise ValueError(f"{listed} lists a class twice")
        return names
    train = os.path.join(root, "train")
    if split != "train" and os.path.isdir(train):
        with os.scandir(train) as entries:
            folders = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
        by_class = {e.name: True for e in folders if _holds_image(e.path)}
    return sorted(by_class, key=natural_key)


def _classes_origin(root: str, split: str) -> str:
    listed = os.path.join(root, CLASSES_FILE)
    return listed if os.path.isfile(listed) else os.path.join(root, "train")


def _holds_image(folder: str) -> bool:
    for _, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        if any(os.path.splitext(n)[1].lower() in SUFFIXES and not n.startswith(".") for n in names):
            return True
    return False


def _block_lengths(count: int) -> tuple[int, ...]:
    """Equal blocks of at most SHARD images."""
    blocks = -(-count // SHARD)
    return tuple(count * (i + 1) // blocks - count * i // blocks for i in range(blocks))


def _keys(paths: tuple[str, ...]) -> list[str]:
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = collections.Counter(stems)
    return [stem if counts[stem] == 1 else path for stem, path in zip(stems, paths, strict=True)]


def _file_numbers(lengths: tuple[int, ...]):
    """(shard, offset) -> Dataset of {"file": place of the image in the source}: nothing is read."""
    starts = tf.constant(np.concatenate([[0], np.cumsum(lengths)]), tf.int64)

    def records(shard, offset):
        shard = tf.cast(shard, tf.int64)
        first = tf.gather(starts, shard) + tf.cast(offset, tf.int64)
        data = tf.data.Dataset.range(first, tf.gather(starts, shard + 1))
        return data.map(lambda number: {"file": number})

    return records


def _file_reader(folder: str, files: ImageFiles, picks: np.ndarray):
    """{"file"} -> {"image", "label", "key"}; the file is read here, in the threads that decode."""
    keys = _keys(files.paths)
    with tf.device("CPU"):
        # Made outside of any graph, so that a data set refers to them and does not copy them.
        names = tf.constant([os.fsencode(files.paths[i]) for i in picks])
        keys = tf.constant([os.fsencode(keys[i]) for i in picks])
        labels = tf.constant(files.labels[picks], tf.int64)

    def parse(raw):
        path = tf.strings.join([folder + os.sep, tf.gather(names, raw["file"])])
        label, key = tf.gather(labels, raw["file"]), tf.gather(keys, raw["file"])
        return {"image": tf.io.read_file(path), "label": label, "key": key}

    return parse
