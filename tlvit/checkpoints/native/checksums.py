"""SHA-256 checksums of the files of a checkpoint. checksums.json in the same folder has them."""

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Collection, Mapping

from tlvit.files import write_text
from tlvit.records import read_json

FILE = "checksums.json"
# Orbax writes these when a checkpoint is complete. They hold times, no data.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write_checksums(folder: pathlib.Path) -> None:
    """Writes checksums.json for all files of a folder, atomically."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (FILE, *LATER)]
    _write(folder, _hash(folder, sorted(str(path.relative_to(folder)) for path in files)))


def check_files(folder: pathlib.Path, part: str | tuple[str, ...] = "") -> None:
    """Compares the files of a folder with its checksums. A folder without checksums.json is not checked.

    Args:
      folder: of the files.
      part: the subfolder or subfolders to check. Default: all files.

    Raises:
      OSError: checksums.json cannot be read.
      ValueError: a file is missing or differs, which the message names, or checksums.json is damaged.
    """
    sums = _read(folder) or {}
    names = [name for name in sums if name.startswith(part)]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
    for name, found in _hash(folder, names).items():
        if found != sums[name]:
            raise ValueError(f"{folder / name} is damaged: its checksum differs")


def replace_files(folder: pathlib.Path, texts: Mapping[str, str]) -> None:
    """Replaces small text files of a folder and their checksums. At any moment the folder can be read.

    Args:
      folder: of the files.
      texts: name in the folder -> new contents.
    """
    sums = _read(folder)
    if sums is not None:  # files without a checksum are not checked
        _write(folder, {name: value for name, value in sums.items() if name not in texts})
    for name, text in texts.items():
        write_text(folder / name, text)
    if sums is not None:
        _write(folder, {**sums, **_hash(folder, texts)})


def _read(folder: pathlib.Path) -> dict[str, str] | None:
    """Name -> checksum; None if there is no checksums.json, as in checkpoints of version 0.1."""
    path = folder / FILE
    if not path.exists():
        return None
    sums = read_json(path).get("sha256")
    if not isinstance(sums, dict):
        raise ValueError(f"{path} has no checksums")
    return sums


def _write(folder: pathlib.Path, sums: Mapping[str, str]) -> None:
    write_text(folder / FILE, json.dumps({"sha256": dict(sorted(sums.items()))}, indent=1) + "\n")


def _hash(folder: pathlib.Path, names: Collection[str]) -> dict[str, str]:
    """Name -> checksum, several files at a time: hashing releases Python's global lock."""

    def sha256(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(sha256, names), strict=True))
