"""Checksums find every damaged, missing and replaced file, and files can be replaced at any moment."""

import hashlib
import json

import pytest

from tlvit.checkpoints.native import checksums


@pytest.fixture
def folder(tmp_path):
    """Two files of data, one that changes, and two that Orbax writes later."""
    for name in (
        "state/d/a",
        "state/b",
        "metrics/metrics",
        "_CHECKPOINT_METADATA",
        "state/commit_success.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 1000)
    checksums.write_checksums(tmp_path)
    return tmp_path


def recorded(folder):
    return json.loads((folder / "checksums.json").read_text())["sha256"]


def test_contents(folder):
    assert list(recorded(folder)) == ["metrics/metrics", "state/b", "state/d/a"]
    assert recorded(folder)["state/b"] == hashlib.sha256(b"state/b" * 1000).hexdigest()
    checksums.check_files(folder)
    (folder / "_CHECKPOINT_METADATA").write_text("later")
    checksums.check_files(folder)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "state/d/a is damaged: its checksum differs"),
        (lambda path: path.write_bytes(b""), "state/d/a is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "state/d/a is damaged"),
        (lambda path: path.unlink(), "state/d/a is missing"),
        (replace_by_folder, "state/d/a is missing"),
    ],
)
def test_damage_is_found_and_named(folder, damage, message):
    damage(folder / "state" / "d" / "a")
    with pytest.raises(ValueError, match=message):
        checksums.check_files(folder)
    with pytest.raises(ValueError, match=message):
        checksums.check_files(folder, ("extra/", "state/"))
    checksums.check_files(folder, "metrics/")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": 3}', '{"sha256": {"state/b": 1}}'])
def test_damaged_checksums_are_damage(folder, text):
    (folder / "checksums.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder)):
        checksums.check_files(folder)


def test_a_folder_without_checksums_is_not_checked(folder):
    (folder / "checksums.json").unlink()
    flip(folder / "state" / "b")
    checksums.check_files(folder)
    checksums.replace_files(folder, {"metrics/metrics": "new"})
    assert not (folder / "checksums.json").exists()


def test_replacing_a_file_keeps_the_folder_readable_at_any_moment(folder, monkeypatch):
    """After every single write the folder passes its check. Other files keep their old checksums."""
    flip_later = recorded(folder)["state/b"]
    write, texts = checksums.write_text, {"metrics/metrics": "new"}

    def write_and_check(path, text):
        write(path, text)
        checksums.check_files(folder)

    monkeypatch.setattr(checksums, "write_text", write_and_check)
    checksums.replace_files(folder, texts)
    assert (folder / "metrics" / "metrics").read_text() == "new"
    assert recorded(folder)["metrics/metrics"] == hashlib.sha256(b"new").hexdigest()
    assert recorded(folder)["state/b"] == flip_later
    assert len(recorded(folder)) == 3
