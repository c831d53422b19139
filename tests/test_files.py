"""Files are replaced at once or not at all, and temporary files say whose they are."""

import os
import subprocess
import sys

import pytest

from tlvit import files


def test_a_text_file_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    files.write_text(path, "old é")
    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_bytes() == "old é".encode()
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def killed(*_):
    raise KeyboardInterrupt


def test_an_error_names_the_file(tmp_path):
    """/dev/full has no space for a single byte."""
    (tmp_path / ".x.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*/x'"):
        files.write_text(tmp_path / "x", "text")


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_files_of_ended_processes_of_this_host_are_abandoned():
    ours = files.temporary_name("/data/maps-0.tfrecord")
    host = ours.removeprefix("/data/maps-0.tfrecord.tmp-").removesuffix(f"-{os.getpid()}")
    assert not files.is_abandoned(ours)
    ended = ended_process()
    assert files.is_abandoned(f"maps-0.tfrecord.tmp-{host}-{ended}")
    assert not files.is_abandoned(f"maps-0.tfrecord.tmp-other-{ended}")
    assert not files.is_abandoned(f"maps-0.tfrecord.tmp-{ended}")  # of version 0.1, without a host
    assert not files.is_abandoned("maps-0.tfrecord")
    assert not files.is_abandoned(f"maps-0.tfrecord.tmp-{host}-{10**30}")
