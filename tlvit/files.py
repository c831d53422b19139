"""Files that a killed process must not leave half written, and what it leaves behind."""

import os
import pathlib
import re
import socket


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically: a killed process leaves either the old file or the new one."""
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
