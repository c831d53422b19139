"""The device mesh: batches are split over its `data` axis, the training state is replicated."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tlvit.config import multiples_near


def make_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = -1) -> Mesh:
    """A mesh with one axis, `data`.

    Args:
      devices: the devices to use; None: all devices of all processes.
      data: how many of them share a batch; -1: all.

    Raises:
      ValueError: there are fewer devices, or `data` leaves out devices of a job with several processes.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise ValueError(f"A mesh over {count} devices is not possible: there are {len(devices)}.")
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"A job of {jax.process_count()} processes uses all of its {len(devices)} devices, not {count}: "
            "set config.mesh.data=-1."
        )
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_batch_size(batch_size: int, mesh: Mesh, *, parts: int = 1) -> int:
    """Images of a global batch that this process provides.

    Args:
      batch_size: images of the global batch.
      mesh: the devices.
      parts: parts in which the batch is run, each over all devices.

    Raises:
      ValueError: the batch cannot be split evenly over the devices.
    """
    devices = mesh.devices.size
    if batch_size % (devices * parts):
        over = f"{devices} devices" + (f" in {parts} accumulated parts" if parts > 1 else "")
        raise ValueError(
            f"A batch of {batch_size} images cannot be split evenly over {over}; "
            f"{multiples_near(batch_size, devices * parts)} images can."
        )
    return batch_size // jax.process_count()
