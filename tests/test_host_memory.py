"""tlvit.host_memory: the limit of a container counts, and batches that do not fit are refused."""

import pytest

from tlvit import host_memory


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "LIMIT_FILES", ())
    machine = host_memory.host_memory()
    assert machine > 2**28
    for text, expected in (("max\n", machine), ("1048576\n", 2**20), (str(2**62), machine)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(host_memory, "LIMIT_FILES", (str(tmp_path / "none"), str(tmp_path / "limit")))
        assert host_memory.host_memory() == expected


def test_batches_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(host_memory, "host_memory", lambda: 2**30)
    host_memory.check_batch(1000, (224, 224), "eval.batch_size")
    message = (
        r"4 batches of 2000 images of 224 x 224 pixels take 1.1 GiB, and this host has 1.0 GiB. "
        "Choose a smaller eval.batch_size or image size"
    )
    with pytest.raises(ValueError, match=message):
        host_memory.check_batch(2000, (224, 224), "eval.batch_size")
