"""Annotation does not wait: order, reading ahead, errors, the devices' clock, and the choice of a batch."""

import threading
import types

import jax
import numpy as np
import pytest

from tlvit.training import annotation_batch, annotation_stream
from tlvit.training.annotation_batch import choose_batch, fitting_batch
from tlvit.training.annotation_stream import DEPTH, DeviceClock, read_ahead, scored_batches
from tlvit.training.mesh import make_mesh

SHARDS = {4: ["a", "b", "c"], 7: ["d"], 9: ["e", "f"]}
ORDER = [(shard, item) for shard, items in SHARDS.items() for item in items]


def scores_of(item):
    return tuple(np.array([ord(item), i]) for i in range(3))


def test_every_batch_comes_once_and_in_order():
    clock = DeviceClock()
    found = list(scored_batches(list(SHARDS), SHARDS.__getitem__, scores_of, clock))
    assert [(shard, item) for shard, item, _ in found] == ORDER
    for _, item, scores in found:
        np.testing.assert_array_equal(scores, scores_of(item))
    assert clock.batches == len(ORDER)
    assert list(scored_batches([], SHARDS.__getitem__, scores_of, clock)) == []


def test_the_next_batches_are_started_before_scores_are_fetched(monkeypatch):
    """The devices have DEPTH batches when the first scores are asked for."""
    started, released = [], threading.Event()
    monkeypatch.setattr(annotation_stream.jax, "block_until_ready", lambda scores: released.wait(60))

    def score(item):
        started.append(item)
        if len(started) == DEPTH:
            released.set()
        return scores_of(item)

    stream = scored_batches(list(SHARDS), SHARDS.__getitem__, score, DeviceClock())
    assert next(stream)[1] == "a"
    assert started == ["a", "b", "c"]
    assert next(stream)[1] == "b"
    assert started == ["a", "b", "c", "d"]


def test_the_next_shard_is_opened_while_one_is_read():
    opened = {shard: threading.Event() for shard in SHARDS}

    def open_shard(shard):
        opened[shard].set()
        yield from SHARDS[shard]

    stream = read_ahead(list(SHARDS), open_shard)
    assert next(stream) == (4, "a")
    assert opened[7].wait(60)
    assert not opened[9].is_set()
    assert list(stream) == ORDER[1:]
    assert list(read_ahead([1, 2], lambda shard: iter(()))) == []


@pytest.mark.parametrize("broken", ["read", "score"])
def test_the_scores_before_an_error_are_not_lost(broken):
    def open_shard(shard):
        yield from SHARDS[shard]
        if broken == "read" and shard == 7:
            raise ValueError("image shard 7 is damaged")

    def score(item):
        if broken == "score" and item == "e":
            raise ValueError("no memory")
        return scores_of(item)

    found = []
    with pytest.raises(ValueError, match=r"damaged|no memory"):
        found += (item for _, item, _ in scored_batches(list(SHARDS), open_shard, score, DeviceClock()))
    assert found == ["a", "b", "c", "d"]


def test_the_clock_counts_the_seconds_without_a_batch(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(annotation_stream.time, "perf_counter", lambda: now[0])
    clock = DeviceClock()
    assert (clock.seconds, clock.idle_fraction) == (0.0, 0.0)

    def at(second, event):
        now[0] = 100.0 + second
        event()

    at(0, clock.started)
    at(1, clock.started)
    at(4, clock.finished)  # the second batch is still running
    at(6, clock.finished)
    at(7, clock.started)  # nothing ran for a second
    at(10, clock.finished)
    assert (clock.seconds, clock.idle_s, clock.batches) == (10.0, 1.0, 3)
    assert clock.idle_fraction == 0.1


# The batch


def compiler(per_image, weights=1000, most=10**9):
    """(compile, what was compiled): programs that need `per_image` bytes an image, in the three parts."""
    compiled = []

    def program(images):
        compiled.append(images)
        if images > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ran out of memory in memory space hbm")
        sizes = {"argument_size_in_bytes": weights + images, "output_size_in_bytes": images}
        sizes["temp_size_in_bytes"] = images * (per_image - 2 * DEPTH)
        return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes))

    return program, compiled


@pytest.mark.parametrize(
    ("limit", "most", "images", "tried"),
    [
        (1000 + 100 * 70, 10**9, 64, [8, 64]),  # 70 images fit
        (10**9, 10**9, 128, [8, 128]),
        (10**9, 48, 32, [8, 128, 64, 32]),  # the compiler needs more than predicted
        (1000 + 100 * 9, 10**9, 8, [8]),
        (1000 + 100 * 3, 10**9, 2, [8, 4, 2]),
    ],
)
def test_the_largest_batch_that_fits(limit, most, images, tried):
    program, compiled = compiler(100, most=most)
    assert fitting_batch(program, 1000, limit)[0] == images
    assert compiled == tried


def test_an_annotator_that_does_not_fit():
    with pytest.raises(ValueError, match=r"does not fit into 1.0 GiB of a device with one image"):
        fitting_batch(compiler(2**31)[0], 1000, 2**30)

    def failing(images):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fitting_batch(failing, 1000, 2**30)


def test_cpus_have_a_fixed_batch():
    program, compiled = compiler(100)
    assert choose_batch(program, make_mesh(), 1000)[0] == annotation_batch.CPU_BATCH
    assert choose_batch(program, make_mesh(jax.devices()[:3]), 1000)[0] == 66
    assert compiled == [64, 66]
