"""Files of class names, one a line in the order of the labels: classes.txt of a run or of a data set."""

import os
from collections.abc import Sequence

from tlvit.files import as_path, write_text


def read_class_names(path: str | os.PathLike, count: int | None = None) -> tuple[str, ...]:
    """Reads a file of class names. Blank lines and spaces around a name are left out.

    A name may occur twice: two classes of ImageNet are called "crane". With `count`, the file must hold
    that many names.

    Raises:
      OSError: the file does not exist, is a folder, or cannot be read.
      ValueError: it is not UTF-8 text, has no names, or not `count` of them.
    """
    path = as_path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file of class names.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_file():
        raise OSError(f"{path} is not a regular file.")
    try:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is invalid.") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ValueError(f"{path} has no class names; it needs one a line.")
    if count not in (None, len(names)):
        raise ValueError(f"{path} has {len(names)} class names for {count} classes.")
    return names


def write_class_names(path: str | os.PathLike, names: Sequence[str]) -> None:
    """Writes a file of class names atomically, local or in a bucket.

    Raises:
      ValueError: a name does not fit on a line, see `check_class_name`.
    """
    for name in names:
        check_class_name(name)
    write_text(as_path(path), "".join(f"{name}\n" for name in names))


def check_class_name(name: str) -> None:
    """Raises ValueError unless a name is one line of text without spaces around it."""
    if name != name.strip() or not name or "\n" in name or "\r" in name:
        raise ValueError(f"{name!r} cannot be a class name: it has a line break, or spaces around it.")
    if any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        raise ValueError(f"{name!r} cannot be a class name: it is not UTF-8 text.")
