"""Paths of files, local or in a bucket, and files that a killed process must not leave half written."""

import os
import pathlib
import re
import socket


def as_path(path: str | os.PathLike) -> pathlib.Path:
    """The path of a local file or folder, or of one in a bucket: gs://BUCKET/NAME.

    A path in a bucket has the methods of `pathlib.Path` that tlvit uses (`etils.epath`), but not its type.

    Raises:
      ValueError: another URL, such as s3://.
    """
    check_url(path)
    if "://" not in os.fspath(path):
        return pathlib.Path(path)
    from etils import epath  # imports TensorFlow at the first access

    return epath.Path(path)


def check_url(path: str | os.PathLike) -> None:
    """Raises ValueError for a URL that is not gs://, such as s3://."""
    scheme, is_url, _ = os.fspath(path).partition("://")
    if is_url and scheme != "gs":
        raise ValueError(
            f"{os.fspath(path)} cannot be opened: TensorFlow reads gs:// and local files, not {scheme}://. "
            "Mount the bucket and give the path of the mount."
        )


def is_local(path: pathlib.Path) -> bool:
    """Whether an `as_path` is a path of a file system, not of a bucket."""
    return isinstance(path, pathlib.Path)


def absolute_path(path: str | os.PathLike) -> pathlib.Path:
    """The absolute path of a local file or folder, or its path in a bucket."""
    found = as_path(path)
    return found.absolute() if is_local(found) else found  # epath would take gs:// as a relative path


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically: a killed process leaves either the old file or the new one."""
    if not is_local(path):  # an object of a bucket is always replaced as a whole
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:  # an error of a write names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def temporary_name(path: str) -> str:
    """A name beside a file that no other process uses. It says whose it is, see `is_abandoned`."""
    return f"{path}.tmp-{socket.gethostname()}-{os.getpid()}"


def is_abandoned(path: str) -> bool:
    """Whether a path is a `temporary_name` of a process of this host that has ended.

    What belongs to another host may be in use, so it is not abandoned.
    """
    found = re.search(r"\.tmp-(.+)-([0-9]+)$", path)
    return bool(found) and found[1] == socket.gethostname() and not is_running(int(found[2]))


def is_running(pid: int) -> bool:
    """Whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; a damaged number
        return True
    return True
