"""The folders of the checkpoints of a run: which are complete, and their records and scores."""

import json

import pytest

from tlvit.checkpoints.native import step_folders
from tlvit.checkpoints.native.checksums import write_checksums
from tlvit.checkpoints.native.step_folders import NO_SCORE
from tlvit.files import as_path


@pytest.fixture
def step(tmp_path):
    """A step of score 50 with a record."""
    for name, record in (("extra/metadata", {"model": "vit"}), ("metrics/metrics", {"score": 50.0})):
        path = tmp_path / "8" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    write_checksums(tmp_path / "8")
    return tmp_path / "8"


def test_only_complete_checkpoints_count_and_incomplete_ones_are_removed(tmp_path, step):
    for name in ("16", "24.orbax-checkpoint-tmp", "12.unreadable", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "32").write_text("a file")
    (tmp_path / "40.orbax-checkpoint-tmp").write_text("a file")
    assert step_folders.complete_steps(tmp_path) == [8, 16]
    assert step_folders.complete_steps(tmp_path / "missing") == []
    step_folders.remove_incomplete(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["12.unreadable", "16", "32", "8", "notes"]


def test_records_are_replaced_with_their_checksums(step):
    assert step_folders.read_score(step) == 50
    assert step_folders.read_record(step) == {"model": "vit"}
    step_folders.replace_records(step, score=60.0, extra={"model": "deit"})
    assert step_folders.read_score(step) == 60
    assert step_folders.read_record(step) == {"model": "deit"}


@pytest.mark.parametrize(
    "text", ["", '{"score', '{"score": 51.0}', "[]", '{"score": "x"}', '{"score": NaN}', "é"]
)
@pytest.mark.parametrize("checked", [True, False])
def test_a_damaged_score_is_unknown(step, text, checked):
    """Checkpoints of version 0.1 have no checksums; there another number cannot be noticed."""
    (step / "metrics" / "metrics").write_text(text, "latin-1")
    if not checked:
        (step / "checksums.json").unlink()
    expected = 51 if "51" in text and not checked else NO_SCORE
    assert step_folders.read_score(step) == expected


def test_a_step_without_a_score(step):
    (step / "metrics" / "metrics").unlink()
    assert step_folders.read_score(step) == NO_SCORE


def test_a_damaged_record_names_its_file(step):
    (step / "extra" / "metadata").write_text('{"model": "vis"}')
    with pytest.raises(ValueError, match="extra/metadata is damaged"):
        step_folders.read_record(step)


def test_a_step_in_a_bucket_is_complete_when_it_is_committed(bucket):
    for step in ("2", "4", "4.unreadable"):
        (bucket / "run" / step).mkdir(parents=True)
    (bucket / "run" / "2" / "commit_success.txt").touch()
    assert step_folders.complete_steps(as_path("gs://bucket/run")) == [2]
    assert step_folders.complete_steps(as_path("gs://bucket/none")) == []
