"""Reads classes maps: files that say which class of the images each class of an annotator is."""

import csv
import io
import os
from collections.abc import Mapping, Sequence

from tlvit.annotators.scoring import DROPPED, SHARED
from tlvit.files import as_path
from tlvit.records import closest, read_json

COLUMNS = ["annotator", "own"]
EVERY = "*"  # the own class of a class that is shared


def read_classes_map(
    path: str | os.PathLike,
    annotator_classes: int | Sequence[str],
    own_classes: int | Sequence[str],
) -> tuple[int, ...]:
    """Reads a classes map.

    The file is a JSON object {"annotator class": "own class", …}, or CSV text with the first line
    annotator,own and a class of the annotator with a class of the images in every further line. A class is
    its name, or its index from 0. Several classes of the annotator may be one of the images. A class that is
    not in the file, or whose own class is null (JSON) or empty (CSV), is dropped. The own class "*" stands
    for all: the probability of such a class is shared evenly, which suits backgrounds.

    Args:
      path: the file, named .json or .csv.
      annotator_classes: names of the annotator's classes, or their number if they have no names.
      own_classes: names of the images' classes, or their number.

    Returns:
      The images' class of each class of the annotator, -1 for those that are dropped and -2 for those that
      are shared: `Scoring.classes`.

    Raises:
      OSError: the file does not exist or cannot be read.
      ValueError: it has another format, a class does not exist, two classes have one name, or a class of
        the annotator occurs twice.
    """
    pairs = _read_pairs(path)
    annotator = _Classes("the annotator", annotator_classes)
    own = _Classes("the images", own_classes)
    result: list[int | None] = [None] * annotator.count
    for where, name, target in pairs:
        try:
            index = annotator.index(name)
            if target in (None, ""):
                value = DROPPED
            else:
                value = SHARED if target == EVERY else own.index(target)
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from None
        if result[index] is not None:
            raise ValueError(f"{path}, {where}: the class {name!r} of the annotator occurs a second time.")
        result[index] = value
    return tuple(DROPPED if value is None else value for value in result)


class _Classes:
    """The classes of the annotator or of the images, found by name or by index."""

    def __init__(self, owner: str, classes: int | Sequence[str]):
        self.owner = owner
        self.count = classes if isinstance(classes, int) else len(classes)
        names = () if isinstance(classes, int) else classes
        self.indices: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            self.indices.setdefault(name, []).append(index)

    def index(self, name: str | int) -> int:
        """The index of a class. Raises ValueError for a class that does not exist."""
        found = self.indices.get(str(name), [])
        if len(found) > 1:
            raise ValueError(
                f"{len(found)} classes of {self.owner} are called {name!r}: write the index, "
                f"{' or '.join(map(str, found))}."
            )
        if found:
            return found[0]
        text = str(name)
        if text.isascii() and text.isdigit() and int(text) < self.count:
            return int(text)
        if not self.indices:
            raise ValueError(
                f"{name!r} is not a class of {self.owner}, which have no names: write an index from 0 to "
                f"{self.count - 1}."
            )
        shown = closest(text, self.indices) if len(self.indices) <= 30 else _near(text, self.indices)
        raise ValueError(f"{name!r} is not a class of {self.owner}; {shown}")


def _near(name: str, known: Mapping[str, object]) -> str:
    """The end of a message about an unknown name, where there are too many to list."""
    text = closest(name, known)
    return text if text.startswith("did") else f"there are {len(known)} names."


def _read_pairs(path: str | os.PathLike) -> list[tuple[str, str, str | int | None]]:
    """(place in the file, annotator class, own class) of every entry."""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending == ".json":
        entries: list[tuple[str, str, str | int | None]] = []
        for name, target in read_json(path).items():
            if not (target is None or isinstance(target, str | int)) or isinstance(target, bool):
                raise ValueError(f"{path}: the class of {name!r} must be text, an index or null.")
            entries.append((f"entry {name!r}", name, target))
        return entries
    if ending != ".csv":
        raise ValueError(f"{path} must be named .json or .csv.")
    file = as_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} does not exist." if not file.exists() else f"{path} is not a file.")
    try:
        text = file.read_bytes().decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is invalid.") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV text: {error}.") from None
    if not rows or [cell.strip() for cell in rows[0]] != COLUMNS:
        raise ValueError(f"The first line of {path} must be annotator,own.")
    pairs: list[tuple[str, str, str | int | None]] = []
    for number, row in enumerate(rows[1:], 2):
        if len(row) not in (0, 2):
            raise ValueError(
                f"{path}, line {number}: {len(row)} columns instead of 2; quote names with commas."
            )
        if row:
            pairs.append((f"line {number}", row[0].strip(), row[1].strip()))
    return pairs
