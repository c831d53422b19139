"""The boundary of the commands: an expected error is one sentence, a bug keeps its traceback."""

import errno
import logging
import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

from tlvit import command
from tlvit.training.run_log import start_logging


def failing(error):
    def body():
        raise error

    return body


class OpError(Exception):
    """Like TensorFlow's."""


class NotFoundError(OpError):
    pass


EXPECTED = [
    (ValueError("config.x must be 1."), "config.x must be 1."),
    (FloatingPointError("The loss is nan."), "The loss is nan."),
    (
        ModuleNotFoundError('TensorFlow is missing: pip install "tlvit[tf]"'),
        "TensorFlow is missing: pip install",
    ),
    (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/a/b"), "/a/b does not exist."),
    (IsADirectoryError(errno.EISDIR, "", b"/a/b"), ""),
    (IsADirectoryError(errno.EISDIR, "Is a directory", b"/a/b"), "/a/b is a folder, not a file."),
    (PermissionError(errno.EACCES, "x", "/a/b"), "/a/b cannot be opened: permission denied."),
    (OSError(errno.ENOSPC, "x", "/a", None, "/b"), "/b cannot be written: the disk is full."),
    (OSError(errno.ENOSPC, "x"), "the disk is full."),
    (OSError(errno.EIO, "Input/output error", "/a"), "/a: Input/output error."),
    (OSError("The stream ended."), "The stream ended."),
    (MemoryError(), "There is not enough memory."),
    (MemoryError("Unable to allocate 14 GiB"), "There is not enough memory: Unable to allocate 14 GiB."),
    (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
        "The device does not have enough memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes. Try",
    ),
    (
        jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses\nmore"),
        "Another process of this run does not answer: UNAVAILABLE: failed to connect to all addresses\n",
    ),
    (
        RuntimeError("Unable to initialize backend 'tpu': no device\nmore"),
        "Unable to initialize backend 'tpu'",
    ),
    (NotFoundError("{{function_node __x}} /a/b; No such file\n\t [[{{node R}}]]"), "/a/b; No such file\n"),
]


@pytest.mark.parametrize(("error", "text"), EXPECTED)
def test_an_expected_error_is_one_sentence(error, text, capsys):
    assert command.run(failing(error)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {text}")
    assert printed.count("\n") == 1


def test_debug_prints_the_traceback(capsys):
    assert command.run(failing(ValueError("wrong")), debug=True) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("error: wrong\n")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), jax.errors.JaxRuntimeError("INTERNAL: x")])
def test_a_bug_is_raised_with_a_request_to_report_it(error):
    with pytest.raises(type(error)) as raised:
        command.run(failing(error))
    assert any("Please report it" in note for note in raised.value.__notes__)


def test_the_traceback_is_in_the_log_file(tmp_path, capsys):
    def body():
        start_logging(tmp_path)
        raise ValueError("wrong")

    assert command.run(body) == 1
    assert capsys.readouterr().err == "error: wrong\n"
    text = (tmp_path / "log.txt").read_text()
    assert "error: wrong" in text
    assert "Traceback (most recent call last)" in text
    with pytest.raises(KeyError):
        command.run(failing(KeyError("bug")))
    assert "KeyError: 'bug'" in (tmp_path / "log.txt").read_text()


def test_a_log_file_that_cannot_be_written_is_no_error(capsys):
    logging.getLogger("tlvit").handlers = [logging.FileHandler("/dev/full")]
    assert command.run(failing(ValueError("wrong"))) == 1
    assert capsys.readouterr().err == "error: wrong\n"


def test_interrupts_and_closed_pipes(capsys, monkeypatch):
    assert command.run(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    stopped = KeyboardInterrupt("stopped by SIGTERM: step 3 is kept")
    assert command.run(failing(stopped), interrupted=75) == 75
    assert capsys.readouterr().err == "stopped by SIGTERM: step 3 is kept\n"
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert command.run(failing(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 1
    assert capsys.readouterr().err == ""


def test_the_status_of_the_body_is_returned():
    assert command.run(lambda: 75) == 75


def test_outputs_are_checked_before_the_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    command.check_writable(tmp_path / "a" / "b" / "out", folder=True)
    command.check_writable(tmp_path, folder=True)
    command.check_writable(file, folder=False)
    command.check_writable("gs://bucket/out", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for path, folder, message in (
        (file, True, "file is a file, not a folder"),
        (tmp_path, False, "is a folder, not a file"),
        (file / "a" / "b", True, "file/a/b cannot be written: .*file is not a folder"),
        ("/proc/out", True, "/proc/out"),
    ):
        with pytest.raises(OSError, match=message):
            command.check_writable(path, folder=folder)


def test_types_of_flags():
    assert command.integer(1, 9)("9") == 9
    assert command.fraction("0.5") == 0.5
    parse = command.parser("x", "", "").parse_args
    assert parse([]).debug is False
    count = command.integer(1, 9)
    wrong = ((count, "0"), (count, "1e1"), (command.fraction, "nan"), (command.fraction, "x"))
    for function, text in (*wrong, (command.parsed(int), "x")):
        with pytest.raises(command.argparse.ArgumentTypeError):
            function(text)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "predict",
            ["--checkpoint=w", "a.jpg", "--top=0"],
            "--top: must be an integer from 1 to 1000000, not '0'",
        ),
        (
            "predict",
            ["--checkpoint=w", "a.jpg", "--batch-size=-1"],
            "--batch-size: must be an integer from 1",
        ),
        ("predict", ["--checkpoint=w", "a.jpg", "--image-size=80000"], "is at most 4096 pixels, not 80000"),
        (
            "annotate",
            ["--checkpoint=w", "--data=d", "--out=o", "--batch-size=0"],
            "from 1 to 131072, not '0'",
        ),
        (
            "annotate",
            ["--checkpoint=w", "--data=d", "--out=o", "--top-k=-3"],
            "--top-k: must be an integer from 1",
        ),
        (
            "annotate",
            ["--checkpoint=w", "--data=d", "--out=o", "--max-missing=2"],
            "must be a number from 0 to 1",
        ),
        ("annotate", ["--checkpoint=w", "--data=d", "--out=o", "--threads=100000"], "from 0 to 1024"),
        ("maps", ["d", "--center-fraction=nan"], "must be a number from 0 to 1, not 'nan'"),
        (
            "convert",
            ["--checkpoint=w", "--out=o", "--num-classes=0"],
            "--num-classes: must be an integer from 1",
        ),
        ("convert", ["--checkpoint=w", "--out=o", "--pos-grid=0x3"], "An image size is one number"),
        ("summary", ["lvvit_t", "--num-classes=-1"], "--num-classes: must be an integer from 1"),
        ("visualize", ["--checkpoint=w", "--count=0"], "--count: must be an integer from 1 to 100, not '0'"),
    ],
)
def test_flags_out_of_range_are_refused_by_name(name, arguments, message, capsys):
    from tlvit.__main__ import main

    with pytest.raises(SystemExit) as end:
        main([name, *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_each_default_once(capsys):
    from tlvit.__main__ import main

    with pytest.raises(SystemExit):
        main(["annotate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "classes kept for each cell (default: 5)" in text
    assert "height and width in pixels, 384 or 384x256 (default: the annotator's)" in text
    assert "largest fraction of images without a map (default: 0.0)" in text
    assert "None" not in text


@pytest.mark.slow
def test_the_compilation_cache_is_in_the_users_cache_folder(tmp_path):
    code = (
        "import jax; from tlvit.command import use_compilation_cache as use; use(); "
        "print(jax.config.jax_compilation_cache_dir)"
    )

    def folder(**variables):
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    assert folder(XDG_CACHE_HOME=str(tmp_path)).startswith(f"{tmp_path}/tlvit/compiled/")
    assert folder(JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
    assert folder(XDG_CACHE_HOME="/dev/null") == "None"
    assert folder(JAX_ENABLE_COMPILATION_CACHE="0", XDG_CACHE_HOME=str(tmp_path)) == "None"
