"""Score maps are verified in the background: each shard once, and all before the second epoch."""

import itertools
import logging
import threading

import numpy as np
import pytest
import tensorflow as tf

from tlvit.data.score_maps import verification
from tlvit.data.score_maps.verification import verified
from tlvit.data.score_maps.writer import ScoreMapWriter


@pytest.fixture
def order(monkeypatch):
    """What happens, in order: shards that are verified, batches that are given."""
    happened = []
    verify_shard = verification.verify_shard

    def note(reader, number):
        verify_shard(reader, number)
        happened.append(f"shard {number}")

    monkeypatch.setattr(verification, "verify_shard", note)
    return happened


def names():
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("first_step", "last_before"), [(0, 3), (2, 3), (9, 11)])
def test_all_shards_are_verified_before_the_second_epoch(maps, order, first_step, last_before, caplog):
    """Epochs of four steps; a run that resumes reads the rest of an epoch first."""
    steps = itertools.count(first_step)
    with caplog.at_level(logging.INFO, "tlvit"):
        for batch in verified(steps, maps, range(3), first_step=first_step, steps_per_epoch=4):
            order.append(f"batch {batch}")
            if batch == last_before + 1:
                break
    assert set(order[: order.index(f"batch {last_before + 1}")]) >= {"shard 0", "shard 1", "shard 2"}
    assert [x for x in order if "shard" in x] == ["shard 0", "shard 1", "shard 2"]  # each once
    assert "verified the checksums and contents of 3 score-map shards" in caplog.text
    assert "verify score maps" not in names()


def test_only_the_shards_of_this_process_are_verified(maps, order):
    batches = verified(itertools.count(), maps, range(1, 3, 2), first_step=0, steps_per_epoch=1)
    assert next(batches) == 0
    assert next(batches) == 1
    batches.close()
    assert order == ["shard 1"]


def test_damage_ends_the_iteration_at_the_latest_before_the_second_epoch(source, maps):
    """Sizes, records and keys are right: reading alone does not find it."""
    records = list(maps.read(2).as_numpy_iterator())
    keys = [record["key"].decode() for record in records]
    values, indices = (np.stack([record[name] for record in records]) for name in ("value", "index"))
    ScoreMapWriter(maps.path, source, maps.info).write_shard(2, keys, -values, indices)
    batches = verified(itertools.count(), maps, range(3), first_step=0, steps_per_epoch=5)
    with pytest.raises(ValueError, match=r"score-map shard .*-00002-of-00003.tfrecord is damaged: SHA-256"):
        list(itertools.islice(batches, 6))
    assert "verify score maps" not in names()


def test_an_error_of_the_file_system_ends_the_iteration_too(maps, monkeypatch):
    def fail(*_):
        raise tf.errors.UnavailableError(None, None, "the bucket is gone")

    monkeypatch.setattr(verification, "verify_shard", fail)
    with pytest.raises(OSError, match=r"A score map of .*: the bucket is gone"):
        list(verified(iter(range(9)), maps, range(3), first_step=0, steps_per_epoch=4))


def test_an_iteration_that_ends_early_ends_the_verification(maps, monkeypatch):
    started, proceed, seen = threading.Event(), threading.Event(), []

    def wait(reader, number):
        seen.append(number)
        started.set()
        proceed.wait(60)

    monkeypatch.setattr(verification, "verify_shard", wait)
    batches = verified(itertools.count(), maps, range(3), first_step=0, steps_per_epoch=5)
    assert next(batches) == 0
    assert started.wait(60)
    threading.Timer(0, proceed.set).start()
    batches.close()
    assert seen == [0]
    assert "verify score maps" not in names()
