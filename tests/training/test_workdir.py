"""A workdir that cannot be written is refused with its path, and two runs do not share one."""

import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from tlvit.files import as_path
from tlvit.training.workdir import lock_workdir, make_workdir

HOLD = """
import pathlib, sys
from tlvit.files import as_path
from tlvit.training.workdir import lock_workdir
with lock_workdir(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the workdir until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_kept_out_until_the_first_one_ends(tmp_path, other, caplog):
    message = rf"{tmp_path} is in use by process {other.pid} on {socket.gethostname()}, started 20.*--workdir"
    with pytest.raises(ValueError, match=message), lock_workdir(tmp_path):
        pytest.fail("two runs")
    other.send_signal(signal.SIGKILL)  # the lock does not survive its process
    other.wait()
    with caplog.at_level("INFO", "tlvit"), lock_workdir(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert f"the last run in this workdir, process {other.pid} on " in caplog.text
    assert (tmp_path / "lock.json").read_text() == ""


def test_a_run_that_ends_by_itself_leaves_no_trace(tmp_path, caplog):
    for _ in range(2):
        with caplog.at_level("INFO", "tlvit"), lock_workdir(tmp_path):
            pass
    with pytest.raises(RuntimeError), lock_workdir(tmp_path):
        raise RuntimeError
    with lock_workdir(tmp_path):
        pass
    assert caplog.text == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "é\n", '{"pid": "x"}'])
def test_a_damaged_lock_file_does_not_matter(tmp_path, text):
    (tmp_path / "lock.json").write_text(text, "latin-1")
    with lock_workdir(tmp_path):
        pass


@pytest.mark.parametrize(
    ("host", "running", "free"),
    [(socket.gethostname(), False, True), (socket.gethostname(), True, False), ("elsewhere", False, False)],
)
def test_without_locks_of_the_file_system_the_holder_decides(tmp_path, monkeypatch, host, running, free):
    """A process of this host that has ended has left its lock; another host's may still run."""

    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    record = {"host": host, "pid": os.getpid() if running else ended.pid, "since": "2026-11-01"}
    (tmp_path / "lock.json").write_text(json.dumps(record))
    if free:
        with lock_workdir(tmp_path):
            pass
        return
    advice = rf"in use by .* on {host}.*If that process has ended, remove {tmp_path}/lock.json"
    with pytest.raises(ValueError, match=advice), lock_workdir(tmp_path):
        pytest.fail("two runs")


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / "lock.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"lock.json"), lock_workdir(tmp_path):
        pytest.fail("no lock")


@pytest.mark.parametrize("name", ["log.txt", "config.json", "classes.txt", "metrics.jsonl", "lock.json"])
def test_a_folder_in_place_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"{tmp_path}/{name} is a folder, but a run writes this file"):
        make_workdir(tmp_path)


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "w").write_text("x")
    with pytest.raises(OSError, match=r"The workdir .*w is not a folder"):
        make_workdir(tmp_path / "w")
    with pytest.raises(OSError, match=r"Not a directory: .*w/below"):
        make_workdir(tmp_path / "w" / "below")
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(OSError, match=r"checkpoints is a file, but a run needs this folder"):
        make_workdir(tmp_path)


def test_a_parent_that_cannot_be_written():
    with pytest.raises(OSError, match=r"/proc/none"):
        make_workdir(pathlib.Path("/proc/none/below"))


def test_a_workdir_in_a_bucket_is_made_and_not_locked(bucket, caplog):
    workdir = as_path("gs://bucket/runs/1")
    make_workdir(workdir)
    assert (bucket / "runs/1").is_dir()
    with caplog.at_level("INFO", "tlvit"), lock_workdir(workdir), lock_workdir(workdir):
        pass
    assert "gs://bucket/runs/1 cannot be locked: make sure that no other run has this workdir" in caplog.text
    (bucket / "file").write_text("")
    with pytest.raises(OSError, match="The workdir gs://bucket/file/1 cannot be made"):
        make_workdir(as_path("gs://bucket/file/1"))
