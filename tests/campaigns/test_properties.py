"""Statements that hold for all inputs, tried on inputs that Hypothesis draws, other ones every time."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import tiny_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tlvit import config
from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import save_model_folder
from tlvit.checkpoints.torch_files import export
from tlvit.checkpoints.torch_names import to_torch
from tlvit.data.score_maps.format import MapDescription
from tlvit.data.score_maps.reader import open_score_maps
from tlvit.data.score_maps.verification import verify
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.shuffle import Order, ordered_records
from tlvit.data.sources.tfds import open_tfds
from tlvit.data.transforms import geometry as tf_geometry
from tlvit.ops import geometry, mixing
from tlvit.ops.targets import make_targets
from tlvit.types import ScoreMaps

NAMES = ("identity", "flip", "crop", "rotation", "shear_x", "shear_y", "translation")
SEEDS = st.integers(0, 2**31 - 1)
pytestmark = pytest.mark.slow


def holds(examples: int, **inputs):
    """Turns a function that asserts a statement about `inputs` into a test with so many examples."""

    def declare(statement):
        def test():
            options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
            settings(max_examples=examples, **options)(given(**inputs)(statement))()

        return test

    return declare


# Geometry


@st.composite
def transforms(draw):
    """(name, arguments) of a function of the geometry modules."""
    number = lambda low, high: draw(st.floats(low, high, width=32))
    size = (draw(st.integers(8, 500)), draw(st.integers(8, 500)))
    name = draw(
        st.sampled_from(["identity", "flip", "crop", "rotation", "shear_x", "shear_y", "translation"])
    )
    if name == "crop":
        top, left = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
        height, width = draw(st.integers(1, size[0] - top)), draw(st.integers(1, size[1] - left))
        return name, ((top, left, height, width), size, draw(st.booleans()))
    if name in ("rotation", "shear_x", "shear_y"):
        return name, (np.float32(number(-3, 3)), size)
    return name, (np.float32(number(-1, 1)), np.float32(number(-1, 1))) if name == "translation" else ()


def apply(matrix, points):
    """The sources of points [2, n]."""
    return np.asarray(matrix, np.float64) @ np.concatenate([points, np.ones_like(points[:1])])


@holds(1000, chain=st.lists(transforms(), min_size=1, max_size=4))
def test_composed_matrices_map_points_in_turn_equally_in_numpy_jax_and_tensorflow(chain):
    points = np.array([[0.0, 1.0, 0.25, 0.5], [0.0, 1.0, 0.75, 0.5]])
    for name, arguments in reversed(chain):
        points = apply(getattr(geometry, name)(*arguments), points)
    scale = 1 + np.abs(points).max()
    matrices = [getattr(geometry, name)(*arguments) for name, arguments in chain]
    tensors = [getattr(tf_geometry, name)(*arguments) for name, arguments in chain]
    start = np.array([[0.0, 1.0, 0.25, 0.5], [0.0, 1.0, 0.75, 0.5]])
    for composed in (
        functools.reduce(geometry.compose, matrices),
        functools.reduce(geometry.compose, [jnp.asarray(m) for m in matrices]),
        functools.reduce(tf_geometry.compose, tensors).numpy(),
    ):
        np.testing.assert_allclose(apply(composed, start), points, atol=3e-4 * scale)


# Targets


@functools.cache
def targets_function(grid):
    return jax.jit(lambda *inputs: make_targets(*inputs, grid=grid, num_classes=7, smoothing=0.2))


@holds(
    300,
    seed=SEEDS,
    top_k=st.sampled_from([1, 3]),
    map_grid=st.sampled_from([(1, 1), (5, 3)]),
    grid=st.sampled_from([(2, 2), (3, 4)]),
    chain=st.lists(transforms(), max_size=2),
)
def test_targets_sum_to_the_published_sum_and_follow_classes_and_flips(seed, top_k, map_grid, grid, chain):
    rng = np.random.RandomState(seed)
    index = np.argsort(rng.rand(2, 7, *map_grid), axis=1)[:, :top_k].astype(np.int32)
    value = (5 * rng.standard_normal(index.shape)).astype(np.float16)
    label = rng.randint(7, size=2).astype(np.int32)
    # RoIAlign's value jumps where a side is a whole number of cells or a sample lies on the map's border.
    # This crop keeps simple transforms away from there.
    generic = np.array([[0.9713, 0, 0.0137], [0, 0.9617, 0.0191]], np.float32)
    matrix = functools.reduce(geometry.compose, [getattr(geometry, n)(*a) for n, a in chain], generic)
    many = np.broadcast_to(matrix, (2, 2, 3))
    targets = targets_function(grid)
    found = targets(ScoreMaps(value, index), label, many)
    np.testing.assert_allclose(found.tokens.sum(-1), 1 + 0.2 / 7, atol=1e-5)
    uncovered = (found.cls == found.label).all(-1)  # the crop is beside the map: the label is the target
    np.testing.assert_allclose(found.cls.sum(-1), np.where(uncovered, 1, 1 + 0.2 / 7), atol=1e-5)
    np.testing.assert_allclose(found.label.sum(-1), 1, atol=1e-6)

    other = rng.permutation(7).astype(np.int32)
    renamed = targets(ScoreMaps(value, other[index]), other[label], many)
    for part in ("cls", "tokens", "label"):
        np.testing.assert_allclose(getattr(renamed, part)[..., other], getattr(found, part), atol=1e-5)
    np.testing.assert_array_equal(renamed.weight, found.weight)
    assert 0 <= found.weight.min() <= found.weight.max() <= 1

    # RoIAlign extends a side shorter than a cell to one cell, beyond its end: the mirrored side's other end.
    sides = np.linalg.norm(matrix[:, :2] * np.array([[map_grid[1]], [map_grid[0]]]), axis=0)
    if sides.min() < 1:
        return
    mirrored = targets(ScoreMaps(value, index), label, geometry.compose(many, geometry.flip()))
    as_grid = lambda tokens: np.asarray(tokens).reshape(2, *grid, 7)
    np.testing.assert_allclose(as_grid(mirrored.tokens)[:, :, ::-1], as_grid(found.tokens), atol=1e-3)
    np.testing.assert_allclose(mirrored.cls, found.cls, atol=1e-3)


# Mixing


@holds(
    300,
    seed=SEEDS,
    grid=st.sampled_from([(1, 1), (4, 4), (3, 9)]),
    shards=st.sampled_from([1, 3]),
    size=st.sampled_from([2, 4]),
    alpha=st.sampled_from([0.2, 1.0, 4.0]),
)
def test_mixtoken_swaps_a_rectangle_with_the_partner_and_loses_nothing(seed, grid, shards, size, alpha):
    mix = mixing.draw_mixtoken_mask(jax.random.key(seed), grid, shards, alpha=alpha)
    mask = np.asarray(mix.mask)
    np.testing.assert_array_equal(mask, mask.any(2, keepdims=True) & mask.any(1, keepdims=True))
    np.testing.assert_allclose(mix.lam, 1 - mask.mean((1, 2)), atol=1e-6)
    tokens = np.arange(shards * size * grid[0] * grid[1], dtype=np.int32).reshape(shards * size, *grid)
    mixed = mixing.mix_tokens(tokens, mix)
    np.testing.assert_array_equal(mixing.mix_tokens(mixed, mix), tokens)
    np.testing.assert_array_equal(np.sort(np.ravel(mixed)), np.ravel(tokens))
    own = tokens.reshape(shards, size, *grid)
    np.testing.assert_array_equal(np.reshape(mixed, own.shape), np.where(mask[:, None], own[:, ::-1], own))
    values = np.random.RandomState(seed).rand(shards * size, 5).astype(np.float32)
    by_area = np.reshape(mixing.mix_by_area(values, mix), (shards, size, 5))
    np.testing.assert_allclose(by_area.sum(1), values.reshape(shards, size, 5).sum(1), atol=1e-5)


# Order of the training images


@st.composite
def orders(draw):
    lengths = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=5)))
    repeats, streams = draw(st.sampled_from([1, 1, 3])), draw(st.sampled_from([1, 2]))
    batch_size = 2 * repeats * draw(st.integers(1, 4))
    if sum(lengths) < batch_size:
        lengths = (batch_size, *lengths)
    return Order(lengths, draw(SEEDS), batch_size, streams, draw(st.integers(1, 40)), repeats)


def positions(order, steps, **options):
    """Numbers of the records of the first steps [steps, B / n]."""
    starts = tf.constant(np.cumsum((0, *order.shard_lengths)), tf.int64)
    ids = lambda shard, offset: tf.data.Dataset.range(starts[shard] + offset, starts[shard + 1])
    local = order.batch_size // options.get("process_count", 1)
    data = ordered_records(ids, order, **options).take(steps * local)
    return np.array([number for number, _ in data.as_numpy_iterator()]).reshape(steps, local)


@holds(60, order=orders(), start=st.integers(1, 7))
def test_an_epoch_repeats_no_record_and_every_process_and_restart_sees_the_same_order(order, start):
    steps = order.steps_per_epoch
    numbers = positions(order, 2 * steps)
    for epoch in numbers.reshape(2, -1):
        assert np.unique(epoch, return_counts=True)[1].max() <= order.repeats
        assert epoch.min() >= 0
        assert epoch.max() < sum(order.shard_lengths)
    start = min(start, 2 * steps - 1)
    np.testing.assert_array_equal(positions(order, 2 * steps - start, first_step=start), numbers[start:])
    halves = [positions(order, 2 * steps, process_index=i, process_count=2) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), numbers)


# Score maps


@functools.cache
def source():
    """20 images in 3 shards."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_images.prepare(folder, [tiny_images.position_image(i, 6, 8) for i in range(20)])
        opened = open_tfds("tiny_images", "train", data_dir=folder)
        keys = [[r["key"].decode() for r in opened.read(s).as_numpy_iterator()] for s in range(3)]
    return opened, keys


@holds(
    100,
    seed=SEEDS,
    classes=st.sampled_from([1, 5, 1000, 65_536, 70_000]),
    top_k=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    scale=st.sampled_from([1e-8, 1.0, 6e4]),
    absent=st.sets(st.integers(0, 19)),
)
def test_score_maps_are_read_as_they_were_written(seed, classes, top_k, grid, scale, absent):
    opened, keys = source()
    opened = dataclasses.replace(opened, num_classes=classes)
    top_k, rng = min(top_k, classes), np.random.RandomState(seed)
    description = MapDescription(
        annotator="net", annotator_hash="ab", top_k=top_k, grid=grid, num_classes=classes
    )
    written = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = ScoreMapWriter(folder, opened, description)
        for shard, names in enumerate(keys):
            shape = (len(names), top_k, *grid)
            values = np.clip(scale * rng.standard_normal(shape), -65_000, 65_000).astype(np.float16)
            first = rng.randint(classes, size=(len(names), 1, *grid))
            indices = (first + np.arange(top_k)[:, None, None]) % classes
            missing = np.array([sum(map(len, keys[:shard])) + i in absent for i in range(len(names))])
            writer.write_shard(shard, names, values, indices, missing)
            written |= {k: v for k, *v in zip(names, values, indices, missing, strict=True)}
        info = writer.finalize()
        assert verify(folder) == info
        assert info.num_missing == len(absent)
        reader = open_score_maps(folder)
        found = {r["key"].decode(): r for s in range(3) for r in reader.read(s).as_numpy_iterator()}
    assert found.keys() == written.keys()
    for key, (value, index, missing) in written.items():
        if not missing:
            np.testing.assert_array_equal(found[key]["value"], value)
            np.testing.assert_array_equal(found[key]["index"], index)


# Checkpoints


@st.composite
def models(draw):
    """A ModelInfo of a small model."""
    name = draw(st.sampled_from(["lvvit_s", "deit_tiny_distilled_patch16_224", "t2t_vit_7"]))
    heads = draw(st.integers(1, 3))
    options = {
        "num_heads": heads,
        "dim": heads * draw(st.sampled_from([4, 12])),
        "depth": draw(st.integers(0, 3)),
    }
    if name == "lvvit_s":
        options |= {
            "stem_width": draw(st.sampled_from([None, 8])),
            "rule": draw(st.sampled_from(["max", "mean"])),
        }
    classes = draw(st.integers(1, 12))
    names = draw(st.none() | st.just(tuple(f"class {i} – é" for i in range(classes))))
    fraction = st.floats(0.125, 1)
    look = Preprocessing(
        mean=draw(st.tuples(fraction, fraction, fraction)),
        crop_pct=draw(fraction),
        interpolation=draw(st.sampled_from(["bicubic", "bilinear"])),
    )
    size = (16 * draw(st.integers(1, 4)), 16 * draw(st.integers(1, 4)))
    return ModelInfo(name, classes, size, options, class_names=names, preprocessing=look)


@holds(40, info=models(), seed=SEEDS, name=st.sampled_from(["m", "m.safetensors"]))
def test_models_are_loaded_as_they_were_saved(info, seed, name):
    model = info.build(seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        if name == "m":
            save_model_folder(path, model, info)
        else:
            export(model, path, info=info)
        again, found = load(path)
    assert found == info == ModelInfo.from_json(json.loads(json.dumps(info.to_json())))
    tensors = to_torch(again)
    assert tensors.keys() == to_torch(model).keys()
    for key, array in to_torch(model).items():
        np.testing.assert_array_equal(tensors[key], array, err_msg=key)


# Settings


def nested(name, value):
    """{"optim": {"name": value}} of "optim.name"."""
    section, _, field = name.rpartition(".")
    return {section: {field: value}} if section else {field: value}


def limits(name):
    """The declared limits of a setting."""
    section, _, field = name.rpartition(".")
    owner = getattr(config.Config(), section) if section else config.Config()
    return next(f.metadata for f in dataclasses.fields(owner) if f.name == field)


NUMBERS = [n for n, default, *_ in config.settings() if type(default) in (int, float)]


@holds(2000, name=st.sampled_from(NUMBERS), data=st.data())
def test_numbers_within_their_range_are_kept_and_others_are_refused(name, data):
    bounds = limits(name)
    low = bounds["low"] if bounds["low"] is not None else bounds["above"]
    high = bounds["high"] if bounds["high"] is not None else bounds["below"]
    whole = config.setting_types()[name] is int
    numbers = (
        st.integers(int(low) - 10, int(high) + 10)
        if whole
        else st.floats(low - 10, high + 10) | st.sampled_from([float("nan"), float("inf"), -float("inf")])
    )
    value = data.draw(numbers)
    inside = (
        (bounds["low"] is None or value >= bounds["low"])
        and (bounds["above"] is None or value > bounds["above"])
        and (bounds["high"] is None or value <= bounds["high"])
        and (bounds["below"] is None or value < bounds["below"])
    )
    error = None
    try:
        resolved = config.resolve(nested(name, value))
    except ValueError as raised:
        error = str(raised)
    if error:
        assert name.rpartition(".")[2] in error
        assert not inside or " must be " not in error  # settings that exclude each other
    else:
        assert inside
        again = config.resolve(json.loads(json.dumps(config.to_dict(resolved))))
        assert again == resolved
        assert config.to_dict(again) == config.to_dict(resolved)
