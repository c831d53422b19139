"""Files are replaced at once or not at all, and temporary files say whose they are."""

import os
import pathlib
import subprocess
import sys

import pytest

from tlvit import files, records


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


def test_paths_are_local_or_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.as_path("runs/x") == pathlib.Path("runs/x")
    assert files.absolute_path("runs/x") == tmp_path / "runs/x"
    assert files.is_local(files.as_path("runs/x"))
    for path in (files.as_path("gs://bucket/x"), files.absolute_path(files.as_path("gs://bucket/x"))):
        assert (str(path / "y"), path.name, files.is_local(path)) == ("gs://bucket/x/y", "x", False)
    with pytest.raises(ValueError, match=r"s3://bucket/x cannot be opened.*not s3://. Mount the bucket"):
        files.as_path("s3://bucket/x")


def test_files_of_a_bucket_are_written_and_read(bucket):
    path = files.as_path("gs://bucket/run/config.json")
    path.parent.mkdir(parents=True)
    files.write_text(path, '{"name": "é"}')
    assert records.read_json(path) == {"name": "é"}
    assert [p.name for p in (bucket / "run").iterdir()] == ["config.json"]
