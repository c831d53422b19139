"""The device mesh, and which axis of which array is split over it.

The axes are `data` and `fsdp`, which share a batch, and `model`, which shares attention heads, hidden
channels and classes. Parameters, their optimizer state and their average are split over `fsdp` and `model`.
Axes of one device are left out, so that plain data parallelism is a mesh of the one axis `data`.
"""

import contextlib
import math
import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tlvit import config
from tlvit.types import Array, PyTree

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

# The axis of the mesh over which each axis of an array is split: the first row with as many axes whose
# expression is found in the path of the array. An array that is in no row is replicated, and an axis that the
# devices do not divide is not split. The paths of moments and averages end with those of their parameters.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # The model computes with the columns of some heads (`Attention`), which are not adjacent. An all-to-all
    # makes them of rows.
    (r"(^|/)blocks/\d+/attn/qkv/kernel$", ("model", "fsdp")),
    (r"(^|/)blocks/\d+/attn/proj/kernel$", ("model", "fsdp")),  # rows, whose products are summed
    (r"(^|/)blocks/\d+/mlp/fc1/kernel$", ("fsdp", "model")),  # columns
    (r"(^|/)blocks/\d+/mlp/fc2/kernel$", ("model", "fsdp")),
    (r"(^|/)(head|head_dist|aux_head)/kernel$", ("fsdp", "model")),  # columns: classes
    (r"(^|/)kernel$", (None, None, None, "fsdp")),  # convolutions [h, w, in, out]
    (r"(^|/)kernel$", (None, "fsdp")),  # other linear layers [in, out]
)


def make_mesh(
    devices: Sequence[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1, model: int = 1
) -> Mesh:
    """A mesh with the axes of `AXES` that have more than one device, and always `data`.

    Args:
      devices: the devices to use; None: all devices of all processes.
      data: number of devices that share a batch and have copies of the state, see `config.Mesh`.
      fsdp: number of devices that share a batch and the state.
      model: number of devices that share attention heads and hidden channels. One of the three may be -1,
        the rest of the devices.

    Raises:
      ValueError: there are fewer devices, the rest cannot be divided, or the mesh leaves out devices of a job
        with several processes.
    """
    devices = jax.devices() if devices is None else list(devices)
    config.Mesh(data=data, fsdp=fsdp, model=model)  # checks the numbers
    sizes = dict(zip(AXES, (data, fsdp, model), strict=True))
    described = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1 or axis == "data")
    given = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            if len(devices) % given:
                raise ValueError(
                    f"config.mesh: {described}: {given} does not divide the {len(devices)} devices."
                )
            sizes[axis] = len(devices) // given
    count = math.prod(sizes.values())
    if count > len(devices):
        raise ValueError(f"config.mesh: {described} = {count} devices, but there are {len(devices)}.")
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"config.mesh: {described} = {count} devices, but a job of {jax.process_count()} processes uses "
            f"all of its {len(devices)} devices: set one of data, fsdp and model to -1."
        )
    used = {axis: size for axis, size in sizes.items() if size > 1 or axis == "data"}
    return jax.make_mesh(
        tuple(used.values()), tuple(used), axis_types=(AxisType.Auto,) * len(used), devices=devices[:count]
    )


def describe_mesh(mesh: Mesh) -> str:
    """The axes and their sizes: "data 4 x fsdp 2"."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Number of parts into which a batch is split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis, over `data` and `fsdp`."""
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(axes if len(axes) > 1 else axes[0]))


def shares_state(mesh: Mesh) -> bool:
    """Whether arrays of the state are split. If not, every device has a copy: data parallelism."""
    return set(mesh.axis_names) != {"data"}


def state_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every array of a state, or of a part of one, by `RULES`.

    Args:
      tree: arrays or their shapes. The paths of its parameters end with their names in the model.
      mesh: the devices.
    """
    return _shardings(tree, mesh, AXES)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts arrays that every process has on the devices of a mesh.

    They go through the host: JAX cannot copy an array from a device to those of other processes everywhere.
    """
    return jax.device_put(jax.device_get(tree), shardings)


def gather(params: PyTree, mesh: Mesh) -> PyTree:
    """Parameters as the model computes with them, inside a compiled program: not split over `fsdp`.

    XLA gathers each of them before the layer that needs it, and sums its gradient into the parts.
    """
    if not shares_state(mesh):
        return params
    return jax.lax.with_sharding_constraint(params, _shardings(params, mesh, ("model",)))


def map_devices(
    score: Callable[[PyTree, Array], PyTree], mesh: Mesh, axes: str | Sequence[str]
) -> Callable[[PyTree, Array], PyTree]:
    """Inference in which every device computes its images alone.

    XLA does not split grouped convolutions, which NFNet and RegNetY have, by images: without this, each
    device gathers all images of the others before such a layer.

    Args:
      score: (arrays, images [B, ...]) -> arrays [B, ...] of the images.
      mesh: the devices.
      axes: axes of the mesh that divide the images.
    """
    images = PartitionSpec(axes if isinstance(axes, str) else tuple(axes))
    specs = {"in_specs": (PartitionSpec(), images), "out_specs": images}
    return jax.shard_map(score, mesh=mesh, check_vma=False, **specs)


def mesh_context(mesh: Mesh) -> contextlib.AbstractContextManager[object]:
    """The models that are called in its `with` block know the mesh.

    They split their attention heads over the axis `model` and run kernels on the images of each device.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain_state(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places a new state, or gradients, inside a compiled program: as `state_shardings`."""
    return jax.lax.with_sharding_constraint(tree, state_shardings(tree, mesh)) if shares_state(mesh) else tree


def state_bytes(tree: PyTree) -> tuple[int, int]:
    """Bytes of the arrays of a state on one device, and of the whole state."""
    leaves = jax.tree.leaves(tree)
    on_device = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return on_device, sum(x.size * x.dtype.itemsize for x in leaves)


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count) of the part of a batch that this process provides.

    Processes whose devices have the same images, because they share a model, provide the same part.

    Raises:
      ValueError: the images of two processes overlap in part.
    """
    rows = mesh.devices.reshape(batch_shards(mesh), -1)
    of_process: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            of_process.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(found)) for found in of_process.values()})
    if sum(map(len, parts)) != len(rows) or len({len(part) for part in parts}) != 1:
        raise ValueError(
            f"config.mesh: {describe_mesh(mesh)} divides the images unevenly among {len(of_process)} "
            "processes: the devices of a process must be a multiple or a divisor of config.mesh.model."
        )
    own = tuple(sorted(of_process[jax.process_index()]))
    return parts.index(own), len(parts)


def local_batch_size(batch_size: int, mesh: Mesh, *, parts: int = 1, mixed: bool = False) -> int:
    """Images of a global batch that this process provides.

    Args:
      batch_size: images of the global batch.
      mesh: the devices.
      parts: parts in which the batch is run, each over all devices.
      mixed: whether the images of a device are mixed in pairs, with MixToken, mixup or cutmix.

    Raises:
      ValueError: the batch cannot be split evenly over the devices, or leaves an image of a device without a
        partner.
    """
    shards = batch_shards(mesh)
    over = f"{shards} device{'s' if shards > 1 else ''}"
    if mesh.devices.size > shards:
        over = f"{shards} group{'s' if shards > 1 else ''} of {mesh.devices.size // shards} devices"
    over += f" in {parts} accumulated parts" if parts > 1 else ""
    fitting = multiples_near(batch_size, shards * parts * (2 if mixed else 1))
    if batch_size % (shards * parts):
        raise ValueError(
            f"A batch of {batch_size} images cannot be split evenly over {over}; {fitting} images can."
        )
    images = batch_size // (shards * parts)
    if mixed and images % 2:
        alone = "an image would be mixed with itself" if images == 1 else "the middle one would not be mixed"
        raise ValueError(
            f"A batch of {batch_size} images over {over} is {images} for each: MixToken, mixup and cutmix "
            f"mix the images of a device in pairs, and {alone}. {fitting} images can be mixed."
        )
    return batch_size // batch_part(mesh)[1]


def multiples_near(number: int, divisor: int) -> str:
    """The multiples of a divisor around a number, in words: (30, 8) -> "24 or 32"."""
    lower = number // divisor * divisor
    return f"{lower} or {lower + divisor}" if lower > 0 else str(divisor)


def _shardings(tree: PyTree, mesh: Mesh, axes: Sequence[str]) -> PyTree:
    """The shardings of `RULES` over some axes of the mesh."""

    def sharding(path: tuple, x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next((rule for found, rule in RULES if len(rule) == x.ndim and re.search(found, name)), ())
        divides = lambda axis, size: axis in axes and axis in mesh.shape and size % mesh.shape[axis] == 0
        spec = [axis if divides(axis, size) else None for axis, size in zip(rule, x.shape, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*spec) if any(spec) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)
