"""The mesh, and where arrays are placed on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import tlvit
from tlvit.config import Mesh
from tlvit.training import mesh as sharding
from tlvit.training.mesh import describe_mesh, local_batch_size, make_mesh, multiples_near, state_shardings
from tlvit.training.optimizer import make_optimizer
from tlvit.training.state import abstract_model, abstract_state

TINY = {"dim": 16, "depth": 2, "num_heads": 4, "num_classes": 5, "image_size": 32}


def test_the_mesh_has_one_automatic_axis_over_all_devices():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 8}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert list(mesh.devices.flat) == jax.devices()
    assert list(make_mesh(jax.devices()[2:4]).devices.flat) == jax.devices()[2:4]


@pytest.mark.parametrize(
    ("sizes", "described", "shards"),
    [
        ({}, "data 8", 8),
        ({"fsdp": 8}, "data 1 x fsdp 8", 8),
        ({"fsdp": 2}, "data 4 x fsdp 2", 8),
        ({"data": 1, "fsdp": -1}, "data 1 x fsdp 8", 8),
        ({"data": 2, "fsdp": 2, "model": -1}, "data 2 x fsdp 2 x model 2", 4),
        ({"data": 1, "model": 4}, "data 1 x model 4", 1),
    ],
)
def test_axes_and_sizes(sizes, described, shards):
    mesh = make_mesh(**sizes)
    assert describe_mesh(mesh) == described
    assert sharding.batch_shards(mesh) == shards
    rows = sharding.batch_sharding(mesh).devices_indices_map((64,))
    assert len({index[0].start for index in rows.values()}) == shards or shards == 1


def test_the_mesh_may_use_some_of_the_devices():
    assert list(make_mesh(data=2).devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 9}, "config.mesh: data 9 = 9 devices, but there are 8"),
        ({"data": 4, "fsdp": 3}, "config.mesh: data 4 x fsdp 3 = 12 devices, but there are 8"),
        ({"fsdp": 3}, "config.mesh: data -1 x fsdp 3: 3 does not divide the 8 devices"),
        ({"data": 0}, "data 0 x fsdp 1 x model 1: sizes are at least 1, and one of them may be -1"),
        ({"fsdp": -1}, "data -1 x fsdp -1 x model 1: sizes are at least 1, and one of them may be -1"),
        ({"model": -2}, "config.mesh.model must be at least -1, not -2"),
    ],
)
def test_meshes_that_are_not_possible(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)
    if -1 not in sizes.values() or len(sizes) > 1:
        return
    if "must be" in message or "sizes are" in message:  # the settings refuse it too
        with pytest.raises(ValueError, match=message):
            Mesh(**sizes)


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
    shared = make_mesh(model=2)
    assert local_batch_size(20, shared) == 20  # two devices have the same images
    with pytest.raises(ValueError, match=r"18 images .* over 4 groups of 2 devices; 16 or 20 images can\."):
        local_batch_size(18, shared)


def test_images_that_are_mixed_need_a_partner_on_their_device():
    mesh = make_mesh()
    assert local_batch_size(32, mesh, mixed=True) == 32
    assert local_batch_size(24, mesh) == 24
    with pytest.raises(ValueError, match=r"8 images over 8 devices is 1 for each.* itself\. 16 images can"):
        local_batch_size(8, mesh, mixed=True)
    with pytest.raises(ValueError, match=r"24 images .* is 3 for each.* middle one .*\. 16 or 32 images can"):
        local_batch_size(24, mesh, mixed=True)
    with pytest.raises(
        ValueError, match=r"16 images .* in 2 accumulated parts is 1 for each.* 32 images can"
    ):
        local_batch_size(16, mesh, parts=2, mixed=True)
    with pytest.raises(ValueError, match=r"20 images cannot be split evenly .*; 16 or 32 images can"):
        local_batch_size(20, mesh, mixed=True)
    with pytest.raises(ValueError, match=r"9 images over 1 device is 9 for .*\. 8 or 10 images can be mixed"):
        local_batch_size(9, make_mesh(jax.devices()[:1]), mixed=True)


def specs(name, mesh, **options):
    """Path -> PartitionSpec of the arrays that are split, for the state of a small model."""
    make = lambda: tlvit.create_model(name, **{**TINY, **options})
    tx = make_optimizer(abstract_model(make)[1], learning_rate=1e-3)
    leaves = jax.tree_util.tree_flatten_with_path(abstract_state(make, tx, mesh=mesh))[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x.sharding.spec for path, x in leaves}
    return {path: spec for path, spec in named.items() if spec != PartitionSpec()}


def test_data_parallel_states_are_replicated():
    assert specs("lvvit_s", make_mesh(), stem_width=8) == {}


def test_parameters_moments_and_average_are_split_by_the_table():
    found = specs("lvvit_s", make_mesh(data=2, fsdp=2, model=2), stem_width=8, num_classes=6)
    block = {
        "blocks/0/attn/qkv/kernel": PartitionSpec("model", "fsdp"),
        "blocks/0/attn/proj/kernel": PartitionSpec("model", "fsdp"),
        "blocks/1/mlp/fc1/kernel": PartitionSpec("fsdp", "model"),
        "blocks/1/mlp/fc2/kernel": PartitionSpec("model", "fsdp"),
        "head/kernel": PartitionSpec("fsdp", "model"),
        "patch_embed/conv1/kernel": PartitionSpec(None, None, None, "fsdp"),
    }
    for path, spec in block.items():
        owners = [name for name in found if name.endswith("/" + path)]
        assert owners == [
            f"{owner}/{path}" for owner in ("params", "opt_state/0/mu", "opt_state/0/nu", "ema/params")
        ]
        assert {found[name] for name in owners} == {spec}
    assert all(path.endswith("/kernel") for path in found)  # no vectors, tokens, positions


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "t2t_vit_7", "t2t_vit_16_ghost"])
def test_most_of_every_family_is_split(name):
    options = {"mlp_ratio": 3.0} if "ghost" in name else {}
    make = lambda: tlvit.create_model(name, **{**TINY, "dim": 64, **options})
    params = abstract_model(make)[1]
    mesh = make_mesh(data=1, fsdp=4, model=2)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    on_device, whole = sharding.state_bytes(jax.tree.map(place, params, state_shardings(params, mesh)))
    assert whole == 4 * sum(x.size for x in jax.tree.leaves(params))
    assert on_device < 0.35 * whole


def test_what_the_devices_do_not_divide_stays_whole():
    found = specs("lvvit_s", make_mesh(jax.devices()[:3], fsdp=3, data=1), stem_width=8)
    assert {path.removeprefix("params/") for path in found if path.startswith("params/")} == {
        # 48 columns and rows; the widths 16, 8 and 5 are not multiples of 3
        f"blocks/{i}/{name}/kernel" for i in (0, 1) for name in ("attn/qkv",)
    }  # fmt: skip


def test_state_bytes():
    mesh = make_mesh(data=2, fsdp=4)
    tree = {"head": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}, "key": jax.random.key(0)}
    placed = jax.device_put(tree, state_shardings(tree, mesh))
    assert sharding.state_bytes(placed) == (4 * (2 * 6 + 6) + 8, 4 * (8 * 6 + 6) + 8)


@dataclasses.dataclass
class Device:
    """What `batch_part` reads of a device."""

    process_index: int


@dataclasses.dataclass
class Machine:
    """What `batch_part` reads of a mesh."""

    devices: np.ndarray
    shape: dict
    axis_names = ("data", "model")


def machine(processes, model, per_process=4):
    devices = np.array([Device(p) for p in range(processes) for _ in range(per_process)], object)
    count = len(devices) // model
    return Machine(devices.reshape(count, model), {"data": count, "model": model})


def test_processes_that_share_a_model_provide_the_same_images(monkeypatch):
    def parts(mesh):
        found = []
        for process in range(mesh.devices.size // 4):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            found.append(sharding.batch_part(mesh))
        return found

    assert parts(machine(2, 1)) == [(0, 2), (1, 2)]
    assert parts(machine(2, 4)) == [(0, 2), (1, 2)]
    assert parts(machine(2, 8)) == [(0, 1), (0, 1)]
    assert parts(machine(4, 8)) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(ValueError, match=r"data 2 x model 6 divides the images unevenly among 3 processes"):
        sharding.batch_part(machine(3, 6))


def test_multiples_near_a_number():
    assert [multiples_near(n, 8) for n in (30, 8, 3, 0)] == ["24 or 32", "8 or 16", "8", "8"]
