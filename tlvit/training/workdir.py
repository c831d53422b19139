"""A workdir: whether a run can write its files, and a lock, so that two runs do not share one."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax

from tlvit.files import is_local, is_running
from tlvit.records import parse_json

FILES = ("log.txt", "config.json", "classes.txt", "metrics.jsonl", "lock.json")

log = logging.getLogger("tlvit")


def make_workdir(workdir: pathlib.Path) -> None:
    """Creates a workdir, or checks that files and folders have no other's name.

    Raises:
      OSError: it cannot be created, or something has the name of one of its files.
    """
    if not is_local(workdir):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # of TensorFlow, which has its own kinds
            raise OSError(f"The workdir {workdir} cannot be made: {error}") from error
        return
    if (workdir.exists() or workdir.is_symlink()) and not workdir.is_dir():
        raise NotADirectoryError(f"The workdir {workdir} is not a folder.")
    workdir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (workdir / name).is_dir():
            raise IsADirectoryError(f"{workdir / name} is a folder, but a run writes this file: rename it.")
    checkpoints = workdir / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise NotADirectoryError(f"{checkpoints} is a file, but a run needs this folder: rename it.")


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir. Of several processes, the first holds the lock.

    The operating system releases the lock when the process ends, however it ends. On a file system without
    locks the holder's host and process number decide. A bucket has no locks, so nothing is checked there.

    Raises:
      ValueError: another run has the workdir.
      OSError: the lock cannot be written.
    """
    if jax.process_index() > 0:
        yield
        return
    if not is_local(workdir):
        log.info("%s cannot be locked: make sure that no other run has this workdir", workdir)
        yield
        return
    path = workdir / "lock.json"
    with path.open("a+") as file:
        holder = _read(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            abandoned = True
        except BlockingIOError:
            raise ValueError(f"{workdir} is in use by {_describe(holder)}. {ADVICE}") from None
        except OSError:  # the file system has no locks
            here = holder.get("host") == socket.gethostname()
            abandoned = here and isinstance(holder.get("pid"), int) and not is_running(holder["pid"])
        if holder and not abandoned:
            advice = f"{ADVICE} If that process has ended, remove {path}."
            raise ValueError(f"{workdir} is in use by {_describe(holder)}. {advice}")
        if holder:
            log.info("the last run in this workdir, %s, did not end by itself", _describe(holder))
        _write(file)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


ADVICE = "Two runs must not share a workdir: wait for it, stop it, or choose another --workdir."


def _read(file: TextIO) -> Mapping[str, Any]:
    """Who has the lock; empty if nobody has, or if the file is damaged."""
    file.seek(0)
    try:
        return parse_json(file.read(1000), file.name)
    except ValueError:
        return {}


def _write(file: TextIO) -> None:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    record = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    try:
        file.truncate(0)
        file.write(json.dumps(record) + "\n")
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def _describe(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another run"
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('since')}"
