"""What all commands share: flags, quiet libraries, and one boundary where errors become one sentence."""

import argparse
import errno
import hashlib
import logging
import os
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import jax

from tlvit.error_text import tensorflow_sentence
from tlvit.version import __version__

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
REASONS = {
    errno.ENOENT: "does not exist",
    errno.EACCES: "cannot be opened: permission denied",
    errno.EPERM: "cannot be changed: operation not permitted",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTDIR: "is not possible: a part of the path is a file",
    errno.EEXIST: "exists already",
    errno.ENOSPC: "cannot be written: the disk is full",
    errno.EDQUOT: "cannot be written: the disk quota is used up",
    errno.EROFS: "cannot be written: the file system is read-only",
    errno.ELOOP: "cannot be opened: its symbolic links form a circle",
    errno.ENAMETOOLONG: "is not possible: the name is too long",
    errno.EMFILE: "cannot be opened: this process has too many open files (ulimit -n)",
}

log = logging.getLogger("tlvit")


def run(body: Callable[[], int], *, debug: bool = False, interrupted: int = EXIT_INTERRUPTED) -> int:
    """Runs the body of a command.

    An expected error, such as a missing file or a wrong value, is printed as one sentence. Its traceback goes
    to the log file of a run, and with `debug` to the terminal. Anything else is a bug and is raised.

    Args:
      body: the command; returns its exit status.
      debug: print the traceback of an expected error.
      interrupted: exit status after Ctrl-C.

    Returns:
      The exit status.
    """
    logging.raiseExceptions = False  # a log file that cannot be written does not end a run
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # "building the font cache"
    use_compilation_cache()
    try:
        status = body()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has what it wants: tlvit predict … | head
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return interrupted
    except Exception as error:
        text = sentence(error)
        _log(text or "this is a bug", error)
        if text is None:
            error.add_note(f"This is a bug in tlvit {__version__}. Please report it with the lines above.")
            raise
        if debug:
            traceback.print_exception(error)
        print(f"error: {text}", file=sys.stderr)
        return 1


def sentence(error: BaseException) -> str | None:
    """What an expected error says to the user; None for a bug."""
    text = str(error)
    if isinstance(error, OSError):
        return _describe_os_error(error)
    if isinstance(error, MemoryError):
        return f"There is not enough memory{f': {text}' if text else ''}."
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text:
        return f"The device does not have enough memory: {text.splitlines()[0]} Try a smaller batch."
    if isinstance(error, jax.errors.JaxRuntimeError) and re.match("UNAVAILABLE|DEADLINE_EXCEEDED", text):
        return f"Another process of this run does not answer: {text.splitlines()[0]}"
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return text.splitlines()[0]
    if any(cls.__name__ == "OpError" for cls in type(error).__mro__):  # TensorFlow's, without importing it
        return tensorflow_sentence(text)
    return text if isinstance(error, ValueError | FloatingPointError | ImportError) else None


def parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of `tlvit NAME`, with the flag --debug. Its --help shows the defaults of all flags."""
    result = argparse.ArgumentParser(
        prog=f"tlvit {name}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=_HelpFormatter,
    )
    result.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return result


def integer(low: int, high: int) -> Callable[[str], int]:
    """The type of a flag: an integer in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer from {low} to {high}, not {text!r}")
        return value

    return parse


def fraction(text: str) -> float:
    """The type of a flag: a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}")
    return value


def parsed(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of a flag that `convert` reads. argparse hides the message of a ValueError otherwise."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def check_new(path: pathlib.Path) -> None:
    """Raises ValueError if a file or a folder that is not empty exists at `path`."""
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists already; choose another name or remove it.")


def check_writable(path: str | os.PathLike, *, folder: bool) -> None:
    """Checks, before any work is done, that an output can be written.

    Args:
      path: the output.
      folder: whether it is a folder.

    Raises:
      OSError: something else is in its place, or files cannot be created there.
    """
    if "://" in str(path):
        return
    path = pathlib.Path(path).absolute()
    if path.exists() and path.is_dir() != folder:
        words = ("a folder", "not a file") if path.is_dir() else ("a file", "not a folder")
        raise OSError(f"{path} is {', '.join(words)}.")
    parent = path if path.is_dir() else path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {parent} is not a folder.")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from error


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that only a first start waits for XLA.

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR chooses the folder and
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.
    """
    chosen = jax.config.values["jax_compilation_cache_dir"] is not None
    if chosen or not jax.config.values["jax_enable_compilation_cache"]:
        return
    # Programs for a CPU use the instructions of this very CPU, and a home folder may serve several machines.
    try:
        cpu = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        flags = [line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features"))]
        machine = hashlib.sha256("\n".join(flags).encode()).hexdigest()[:12]
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        folder = cache / "tlvit" / "compiled" / machine
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no such folder, no home: compile every time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default once, and none where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == []  # 0 is shown
        if none or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _describe_os_error(error: OSError) -> str:
    """The path and the reason of an error of the operating system."""
    if error.errno is None or not error.strerror:
        return str(error)
    path = error.filename2 or error.filename
    reason = REASONS.get(error.errno)
    if path is None:
        return (reason or error.strerror).rpartition(": ")[2] + "."
    path = os.fsdecode(path) if isinstance(path, bytes) else path
    return f"{path} {reason}." if reason else f"{path}: {error.strerror}."


def _log(text: str, error: Exception) -> None:
    """Logs an error with its traceback: to log.txt, and to other logs that are not shown in the terminal."""
    info = (type(error), error, error.__traceback__)
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "error: %s", (text,), info)
    for handler in log.handlers + (logging.getLogger().handlers if log.propagate else []):
        if getattr(handler, "stream", None) not in (sys.stderr, sys.stdout):
            handler.handle(record)
