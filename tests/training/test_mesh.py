"""The mesh, and what lies where on it."""

import time

import jax
import numpy as np
import pytest

from tlvit.training import mesh as sharding
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


def test_mesh_has_one_automatic_axis_over_all_devices():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 8}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert list(mesh.devices.flat) == jax.devices()
    assert list(sharding.make_mesh(jax.devices()[2:4]).devices.flat) == jax.devices()[2:4]


def test_batches_are_split_in_order_and_the_rest_is_copied():
    mesh = sharding.make_mesh()
    moved = to_global(batch(16), mesh)
    for i, shard in enumerate(sorted(moved.label.addressable_shards, key=lambda s: s.device.id)):
        np.testing.assert_array_equal(shard.data, [2 * i, 2 * i + 1])
    assert moved.image.dtype == np.uint8
    assert moved.maps is None
    copied = jax.device_put(np.arange(3), sharding.replicated(mesh))
    assert [shard.data.shape for shard in copied.addressable_shards] == [(3,)] * 8


def test_local_batch_size():
    mesh = sharding.make_mesh()
    assert sharding.local_batch_size(24, mesh) == 24
    with pytest.raises(ValueError, match=r"20 images.*8 devices"):
        sharding.local_batch_size(20, mesh)


@pytest.mark.parametrize("depth", [1, 2, 10])
def test_prefetch_keeps_order_and_content_and_ends(depth):
    batches = [batch(8, start=10 * i) for i in range(5)]
    got = list(Prefetch(iter(batches), sharding.make_mesh(), depth=depth))
    assert [int(b.label[0]) for b in got] == [0, 10, 20, 30, 40]
    for ours, theirs in zip(got, batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_prefetch_reads_ahead_and_measures_waiting():
    read = []

    def slow():
        for i in range(4):
            time.sleep(0.05)
            read.append(i)
            yield batch(8, i)

    stream = Prefetch(slow(), sharding.make_mesh(), depth=2)
    assert read == []
    next(stream)
    assert read == [0, 1]
    assert 0.1 <= stream.wait_s < 0.5
    stream.wait_s = 0.0
    next(stream)
    assert read == [0, 1, 2]
    assert 0.05 <= stream.wait_s < 0.4


def test_an_error_of_the_pipeline_reaches_the_caller():
    def broken():
        yield batch(8)
        raise RuntimeError("shard 3 is damaged")

    stream = Prefetch(broken(), sharding.make_mesh(), depth=1)
    next(stream)
    with pytest.raises(RuntimeError, match="shard 3"):
        next(stream)
