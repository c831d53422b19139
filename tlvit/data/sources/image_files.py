"""Finds the image files and the classes of ROOT/SPLIT/CLASS/…"""

import collections
import dataclasses
import logging
import os
import re
from collections.abc import Iterator

import numpy as np

from tlvit.class_names import check_class_name, read_class_names
from tlvit.images import SUFFIXES, printable

CLASSES_FILE = "classes.txt"  # in ROOT, one class a line: the order of the labels
MAP_FILES = ("score_maps.json", "score_maps.started.json")  # a folder with one of them has score maps

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


def list_images(root: str, split: str) -> ImageFiles:
    """Finds the images of ROOT/SPLIT and their classes. The log says what is left out.

    The classes are those of ROOT/classes.txt. Without that file they are the class folders of ROOT/train that
    have images, or of the split where there is no ROOT/train, in natural order: a2 before a10. Links to
    files are followed; links to folders are followed for classes only.

    Raises:
      ValueError: there is no such folder, it has no images, it has a class that training does not have, or
        the name of a class is not one line of text.
      OSError: a folder cannot be read.
    """
    by_class, skipped, empty = _walk(os.path.join(root, split))
    folder = printable(os.path.join(root, split))
    listing = ", ".join(f"{skipped[kind]} {kind}" for kind in sorted(skipped)[:9])
    if not by_class:
        raise ValueError(
            f"{folder} has no images in class folders (CLASS/NAME with a suffix of {', '.join(SUFFIXES)}), "
            f"but {sum(skipped.values())} other files and {len(empty)} folders without an image"
            f"{f' ({listing})' if listing else ''}."
        )
    if skipped:
        log.warning("%s: skipped %d files that are not images: %s", folder, sum(skipped.values()), listing)
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


def find_split(root: str, name: str) -> str:
    """The name of a split's folder in ROOT: `name`, where "val" and "validation" are the same.

    Raises:
      ValueError: there is no such folder; says which there are.
    """
    if not os.path.isdir(root):
        raise ValueError(f"There is no folder {printable(root)}.")
    if os.path.isdir(os.path.join(root, name)):
        return name
    other = {"validation": "val", "val": "validation"}.get(name)
    if other and os.path.isdir(os.path.join(root, other)):
        return other
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    splits = [
        printable(folder)
        for folder in folders
        if not any(os.path.isfile(os.path.join(root, folder, file)) for file in MAP_FILES)
    ]
    part = " A part of a split is written as 'train[:90%]' or 'train[90%:]'." if "train" in splits else ""
    found = (
        f"it has {splits[:20]}."
        if splits
        else "it has no folders of images: put them into ROOT/SPLIT/CLASS/."
    )
    raise ValueError(f"{printable(root)} has no folder {name!r}; {found}{part}")


def natural_key(name: str) -> tuple[tuple[int | str, ...], str]:
    """Returns a sorting key that compares numbers in names by value and ignores the case of letters."""
    parts = re.split(r"([0-9]+)", name.lower())
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def _walk(folder: str) -> tuple[dict[str, list[str]], collections.Counter, list[str]]:
    """Images of the class folders, numbers of other files by kind, and class folders without an image."""
    by_class: dict[str, list[str]] = {}
    skipped, empty = collections.Counter(), []
    with os.scandir(folder) as entries:
        top = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in top:
        if not _is_folder(entry):
            skipped[file_kind(entry)] += 1
            continue
        found = []
        for path, file in walk_files(entry.path, entry.name):
            kind = file_kind(file)
            if kind in SUFFIXES:
                found.append(path)
            else:
                skipped[kind] += 1
        if found:
            check_class_name(entry.name)
            by_class[entry.name] = found
        else:
            empty.append(printable(entry.name))
    return by_class, skipped, sorted(empty, key=natural_key)


def walk_files(folder: str, below: str) -> Iterator[tuple[str, os.DirEntry]]:
    """(path with `below` in place of `folder`, entry) of all files of a folder and the folders in it."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in found:
        path = f"{below}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(entry.path, path)
        elif not (entry.is_symlink() and _is_folder(entry)):
            yield path, entry


def file_kind(entry: os.DirEntry) -> str:
    """The suffix of a regular file, in lower case, or what it is instead."""
    try:
        regular = entry.is_file()
    except OSError:  # a loop of links
        regular = False
    if not regular:
        return "broken links" if entry.is_symlink() else "pipes or devices"
    return printable(os.path.splitext(entry.name)[1].lower()) or "without suffix"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _class_names(root: str, split: str, by_class: dict[str, list[str]]) -> list[str]:
    """The classes in the order of their labels, see `list_images`."""
    listed = os.path.join(root, CLASSES_FILE)
    if os.path.lexists(listed):
        names = list(read_class_names(listed))
        for number, name in enumerate(names):
            first = names.index(name)
            if first != number:
                raise ValueError(f"{listed} has the class {name!r} twice, as number {first} and {number}.")
        return names
    train = os.path.join(root, "train")
    if split != "train" and os.path.isdir(train):
        with os.scandir(train) as entries:
            folders = [entry for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
        names = [e.name for e in folders if any(file_kind(f) in SUFFIXES for _, f in walk_files(e.path, ""))]
        return sorted(names, key=natural_key)
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
