"""The mesh and what lies where on it: batches split over the `data` axis, the state on every device."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """One axis, `data`, over the given devices (all of all processes by default)."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_batch_size(batch_size: int, mesh: Mesh) -> int:
    """This process's share of a global batch.

    Raises:
      ValueError: the batch cannot be split evenly over the devices.
    """
    devices = mesh.devices.size
    if batch_size % devices:
        raise ValueError(f"A batch of {batch_size} images cannot be split evenly over {devices} devices.")
    return batch_size // jax.process_count()
