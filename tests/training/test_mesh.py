"""The mesh, and where arrays are placed on it."""

import jax
import pytest

from tlvit.training.mesh import local_batch_size, make_mesh


def test_the_mesh_has_one_automatic_axis_over_all_devices():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 8}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert list(mesh.devices.flat) == jax.devices()
    assert list(make_mesh(jax.devices()[2:4]).devices.flat) == jax.devices()[2:4]


def test_the_mesh_may_use_some_of_the_devices():
    assert list(make_mesh(data=2).devices.flat) == jax.devices()[:2]
    for count in (9, 0):
        with pytest.raises(ValueError, match=f"over {count} devices is not possible: there are 8"):
            make_mesh(data=count)


def test_local_batch_size():
    mesh = make_mesh()
    assert local_batch_size(24, mesh) == 24
    with pytest.raises(ValueError, match=r"20 images.*8 devices"):
        local_batch_size(20, mesh)
    with pytest.raises(ValueError, match=r"20 images cannot .* 8 devices; 16 or 24 images can\."):
        local_batch_size(20, mesh)
    with pytest.raises(ValueError, match=r"4 images cannot .*; 8 images can\."):
        local_batch_size(4, mesh)
    assert local_batch_size(48, mesh, parts=3) == 48
    with pytest.raises(ValueError, match=r"40 images .* 8 devices in 3 accumulated parts; 24 or 48 images"):
        local_batch_size(40, mesh, parts=3)
