"""Batches reach the devices in order, split over them, some steps ahead."""

import jax
import numpy as np
import pytest

from tlvit.training import prefetch
from tlvit.training.mesh import make_mesh, replicated
from tlvit.training.prefetch import Prefetch, to_global
from tlvit.types import Batch


def batch(size, start=0):
    return Batch(
        image=np.full((size, 4, 4, 3), start, np.uint8),
        label=np.arange(start, start + size, dtype=np.int32),
        mask=np.ones(size, bool),
        maps=None,
        geometry=np.zeros((size, 2, 3), np.float32),
    )


def test_batches_are_split_in_order():
    mesh = make_mesh()
    moved = to_global(batch(16), mesh)
    for i, shard in enumerate(sorted(moved.label.addressable_shards, key=lambda s: s.device.id)):
        np.testing.assert_array_equal(shard.data, [2 * i, 2 * i + 1])
    assert moved.image.dtype == np.uint8
    assert moved.maps is None
    copied = jax.device_put(np.arange(3), replicated(mesh))
    assert [shard.data.shape for shard in copied.addressable_shards] == [(3,)] * 8


@pytest.mark.parametrize("depth", [1, 2, 10])
def test_prefetch_keeps_order_and_content_and_ends(depth):
    batches = [batch(8, start=10 * i) for i in range(5)]
    got = list(Prefetch(iter(batches), make_mesh(), depth=depth))
    assert [int(b.label[0]) for b in got] == [0, 10, 20, 30, 40]
    for ours, theirs in zip(got, batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_prefetch_reads_ahead_and_measures_waiting(monkeypatch):
    now, read = [0.0], []
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: now[0])

    def slow():
        for i in range(4):
            now[0] += 0.5
            read.append(i)
            yield batch(8, i)

    stream = Prefetch(slow(), make_mesh(), depth=2)
    assert read == []
    next(stream)
    assert read == [0, 1]
    assert stream.wait_s == 1.0
    stream.wait_s = 0.0
    next(stream)
    assert read == [0, 1, 2]
    assert stream.wait_s == 0.5


def test_an_error_of_the_pipeline_reaches_the_caller():
    def failing():
        yield batch(8)
        raise RuntimeError("shard 3 is damaged")

    stream = Prefetch(failing(), make_mesh(), depth=1)
    next(stream)
    with pytest.raises(RuntimeError, match="shard 3"):
        next(stream)
