"""Targets from score maps: the published values, and geometries the published code does not have."""

import functools

import jax
import numpy as np
import pytest

from tlvit.ops import geometry
from tlvit.ops.geometry import compose
from tlvit.ops.losses import token_label_loss
from tlvit.ops.targets import make_online_targets, make_targets, smooth_one_hot
from tlvit.types import ModelOutput, ScoreMaps

IDENTITY, FLIP = geometry.identity(), geometry.flip()
QUARTER_TURN = geometry.rotation(np.pi / 2, (1, 1))  # of fractions; numpy's rot90, counterclockwise


def crop(left, top, width, height):
    """The matrix of a crop given in fractions of the image."""
    return np.array([[width, 0, left], [0, height, top]], np.float32)


def random_maps(seed, batch, top_k, grid, classes, dtype=np.int32):
    rng = np.random.RandomState(seed)
    index = np.argsort(rng.rand(batch, classes, *grid), axis=1)[:, :top_k].astype(dtype)
    return ScoreMaps(value=(4 * rng.standard_normal(index.shape)).astype(np.float16), index=index)


def targets_of(maps, matrix, *, grid, classes, smoothing=0.1, label=None):
    batch = maps.value.shape[0]
    matrix = np.broadcast_to(np.asarray(matrix, np.float32), (batch, 2, 3))
    label = np.zeros(batch, np.int32) if label is None else label
    run = jax.jit(functools.partial(make_targets, grid=grid, num_classes=classes, smoothing=smoothing))
    return run(maps, label, matrix)


def spatial(maps, change):
    """The maps with `change` applied to each [h, w] plane."""
    move = lambda x: np.stack([[change(plane) for plane in planes] for planes in x])
    return ScoreMaps(value=move(maps.value), index=move(maps.index))


@pytest.mark.parametrize("case", ["a_18to14", "b_18to24", "c_7to4", "d_18to1"])
def test_targets_equal_the_published_ones(golden, case):
    """The published code takes x from top and height, y from left and width: so does this geometry."""
    z = golden("target_visible.npz")
    part = lambda key: z[f"{case}/{key}"]
    expected = part("target")
    classes = expected.shape[1]
    top, left, height, width = part("crop_ijhw_relative").T
    zero = np.zeros_like(top)
    geometry = np.stack([np.stack([height, zero, top], 1), np.stack([zero, width, left], 1)], 1)
    side = max(round((expected.shape[2] - 2) ** 0.5), 1)
    assert side == int(case.split("to")[1])
    out = targets_of(
        ScoreMaps(part("value"), part("index")), geometry, grid=(side, side), classes=classes,
        smoothing=float(part("smoothing")), label=part("class").astype(np.int32),
    )  # fmt: skip
    np.testing.assert_allclose(out.label, expected[:, :, 0], atol=1e-5)
    np.testing.assert_allclose(out.cls, expected[:, :, 1], atol=1e-5)
    if expected.shape[2] > 2:
        np.testing.assert_allclose(out.tokens.swapaxes(1, 2), expected[:, :, 2:], atol=1e-5)
    else:  # published without tokens; one token over the crop is the class token's target
        np.testing.assert_allclose(out.tokens[:, 0], expected[:, :, 1], atol=1e-5)


def test_one_cell_by_hand():
    """Logits (2, 1) for classes 3 and 0 of 4, the others 0, smoothing 0.2."""
    maps = ScoreMaps(np.array([2, 1], np.float16).reshape(1, 2, 1, 1), np.array([3, 0]).reshape(1, 2, 1, 1))
    out = targets_of(maps, IDENTITY, grid=(1, 1), classes=4, smoothing=0.2, label=np.array([1], np.int32))
    p = np.exp([1, 0, 0, 2]) / np.exp([1, 0, 0, 2]).sum()
    expected = p * (1 - 0.2 + 0.05) + 0.05
    np.testing.assert_allclose(out.cls[0], expected, atol=1e-6)
    np.testing.assert_allclose(out.tokens[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(out.label[0], [0.05, 0.85, 0.05, 0.05], atol=1e-6)


def test_rows_sum_to_what_was_published():
    maps = random_maps(0, 3, 5, (9, 9), 30)
    out = targets_of(maps, crop(0.1, 0.2, 0.7, 0.6), grid=(6, 6), classes=30, smoothing=0.1)
    for rows in (out.cls, out.tokens):
        np.testing.assert_allclose(rows.sum(-1), 1 + 0.1 / 30, atol=1e-5)
    np.testing.assert_allclose(out.label.sum(-1), 1, atol=1e-6)
    assert {str(x.dtype) for x in jax.tree.leaves(out)} == {"float32"}


@pytest.mark.parametrize(
    "window", [crop(0, 0, 1, 1), crop(0.13, 0.31, 0.62, 0.45), crop(0.4, 0.1, 0.05, 0.04)]
)
@pytest.mark.parametrize(
    ("move", "change"), [(FLIP, np.fliplr), (QUARTER_TURN, np.rot90), (compose(QUARTER_TURN, FLIP), None)]
)
def test_flips_and_quarter_turns_equal_moved_maps(move, change, window):
    """Targets from the original map equal those from the moved map, for the same crop of the moved image."""
    change = change or (lambda x: np.fliplr(np.rot90(x)))
    maps = random_maps(1, 2, 3, (8, 12), 10)
    expected = targets_of(spatial(maps, change), window, grid=(4, 6), classes=10)
    out = targets_of(maps, compose(move, window), grid=(4, 6), classes=10)
    np.testing.assert_allclose(out.tokens, expected.tokens, atol=2e-5)
    np.testing.assert_allclose(out.cls, expected.cls, atol=2e-5)


@pytest.mark.parametrize(("move", "change"), [(FLIP, np.fliplr), (QUARTER_TURN, np.rot90)])
def test_these_geometries_move_an_image_the_same_way(move, change):
    """The matrices of the test above also describe how the pixels of an image move, point by point."""
    image = np.random.RandomState(2).rand(8, 12)
    moved = change(image)
    for i in range(moved.shape[0]):
        for j in range(moved.shape[1]):
            x, y = move @ [(j + 0.5) / moved.shape[1], (i + 0.5) / moved.shape[0], 1]
            assert image[int(y * 8), int(x * 12)] == moved[i, j]


def test_rows_and_columns_stay_rows_and_columns():
    """Classes that encode row and column: the targets of the top half of an image have rows 0 to 3."""
    rows, columns = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    index = np.stack([rows, 8 + columns])[None].astype(np.uint16)
    maps = ScoreMaps(np.full(index.shape, 40, np.float16), index)
    top_half = targets_of(maps, crop(0, 0, 1, 0.5), grid=(4, 8), classes=16, smoothing=0.0).tokens.reshape(
        4, 8, 16
    )
    for i in range(4):
        for j in range(8):
            assert set(np.flatnonzero(top_half[i, j] > 0.4)) == {i, 8 + j}
    published = targets_of(maps, [[0.5, 0, 0], [0, 1, 0]], grid=(8, 4), classes=16, smoothing=0.0)
    assert set(np.flatnonzero(published.tokens.reshape(8, 4, 16)[7, 3] > 0.4)) == {7, 11}


@pytest.mark.parametrize(("map_grid", "grid"), [((12, 12), (5, 5)), ((9, 16), (4, 7))])
def test_a_map_linear_in_position_keeps_its_values_under_rotation_and_shear(map_grid, grid):
    c, s = 0.45 * np.cos(0.6), 0.45 * np.sin(0.6)
    geometry = np.array([[c, -s + 0.1, 0.35], [s, c, 0.15]], np.float32)
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in map_grid), indexing="ij")
    value = np.stack([4 * x, 2 - 3 * y])[None].astype(np.float32)
    index = np.broadcast_to(np.array([5, 2]).reshape(1, 2, 1, 1), value.shape)
    out = targets_of(ScoreMaps(value, index), geometry, grid=grid, classes=7, smoothing=0.0)
    ty, tx = np.meshgrid(*((np.arange(n) + 0.5) / n for n in grid), indexing="ij")
    px, py = geometry @ np.stack([tx.ravel(), ty.ravel(), np.ones(tx.size)])
    log_p = np.log(out.tokens[0])  # class 0 has logit 0
    np.testing.assert_allclose(log_p[:, 5] - log_p[:, 0], 4 * px, atol=5e-5)
    np.testing.assert_allclose(log_p[:, 2] - log_p[:, 0], 2 - 3 * py, atol=5e-5)
    px, py = geometry @ [0.5, 0.5, 1]
    log_p = np.log(out.cls[0])
    np.testing.assert_allclose([log_p[5] - log_p[0], log_p[2] - log_p[0]], [4 * px, 2 - 3 * py], atol=5e-5)


def test_tokens_outside_of_the_map_have_uniform_targets():
    """Zero logits for all classes: the uniform distribution; the other tokens are not touched."""
    maps = random_maps(3, 1, 3, (8, 8), 10)
    out = targets_of(maps, crop(0.5, 0, 1, 1), grid=(8, 8), classes=10, smoothing=0.0).tokens.reshape(
        8, 8, 10
    )
    np.testing.assert_allclose(out[:, 5:], 0.1, atol=1e-6)
    inside = targets_of(maps, crop(0, 0, 1, 1), grid=(8, 8), classes=10, smoothing=0.0).tokens.reshape(
        8, 8, 10
    )
    np.testing.assert_allclose(out[:, :4], inside[:, 4:], atol=1e-5)


def test_a_tiny_crop_counts_as_one_cell():
    """Published RoIAlign never lets a box shrink below a cell: the last token lies most of a cell further."""
    value = np.broadcast_to(np.arange(10, dtype=np.float32), (1, 1, 10, 10))
    maps = ScoreMaps(value, np.full((1, 1, 10, 10), 1))
    out = targets_of(maps, crop(0.45, 0.45, 0.001, 0.001), grid=(4, 4), classes=3, smoothing=0.0)
    log_p = np.log(out.tokens[0].reshape(4, 4, 3))
    logits = log_p[..., 1] - log_p[..., 0]
    np.testing.assert_allclose(logits, np.broadcast_to(4 + np.array([1, 3, 5, 7]) / 8, (4, 4)), atol=1e-4)


def test_index_types_are_equal_and_wide():
    """uint16 and int32 mean the same, also beyond float16's 2,048 and int16's 32,767."""
    index = np.array([40000, 2049], np.uint16).reshape(1, 2, 1, 1)
    value = np.array([8, 7], np.float16).reshape(1, 2, 1, 1)
    outs = [
        targets_of(ScoreMaps(value, index.astype(t)), IDENTITY, grid=(1, 1), classes=50000).cls[0]
        for t in (np.uint16, np.int32)
    ]
    np.testing.assert_array_equal(*outs)
    assert list(np.argsort(outs[0])[::-1][:2]) == [40000, 2049]


def test_smooth_one_hot():
    np.testing.assert_allclose(
        smooth_one_hot(np.array([2, 0]), 4, 0.2),
        [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]],
        atol=1e-7,
    )
    np.testing.assert_array_equal(smooth_one_hot(np.array([1]), 3), [[0, 1, 0]])


def test_shapes_that_do_not_fit_raise_with_the_numbers(unchecked_shapes):
    maps = random_maps(0, 2, 3, (4, 4), 5)
    label, matrix = np.zeros(2, np.int32), np.broadcast_to(IDENTITY, (2, 2, 3))
    options = {"grid": (2, 2), "num_classes": 5}
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(2, 2, 4, 4\)"):
        make_targets(ScoreMaps(maps.value, maps.index[:, :2]), label, matrix, **options)
    with pytest.raises(ValueError, match=r"2 score maps.*\(3,\)"):
        make_targets(maps, np.zeros(3, np.int32), matrix, **options)
    with pytest.raises(ValueError, match=r"\[2, 2, 3\].*\(2, 3, 3\)"):
        make_targets(maps, label, np.zeros((2, 3, 3), np.float32), **options)


def test_labels_and_indices_are_integers(unchecked_shapes):
    maps, matrix = random_maps(0, 2, 3, (4, 4), 5), np.broadcast_to(IDENTITY, (2, 2, 3))
    options = {"grid": (2, 2), "num_classes": 5}
    with pytest.raises(ValueError, match="Labels must be class indices of an integer type, not float32"):
        make_targets(maps, np.zeros(2, np.float32), matrix, **options)
    floats = ScoreMaps(maps.value, maps.index.astype(np.float32))
    with pytest.raises(ValueError, match="class indices of score maps must be integers, not float32"):
        make_targets(floats, np.zeros(2, np.int32), matrix, **options)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\], not"):
        smooth_one_hot(np.array([1]), 3, smoothing)


def test_only_what_the_map_covers_is_sampled():
    """A map of the left 5/8 of an image: of 4 columns of tokens, the third is half covered."""
    maps = ScoreMaps(np.full((1, 1, 8, 8), 5, np.float16), np.full((1, 1, 8, 8), 3, np.int32))
    left_part = np.array([[1.6, 0, 0], [0, 1, 0]], np.float32)  # image -> map
    out = targets_of(maps, left_part, grid=(4, 4), classes=10, label=np.array([7], np.int32))
    whole = targets_of(maps, IDENTITY, grid=(4, 4), classes=10)
    np.testing.assert_allclose(out.weight.reshape(4, 4), [[1, 1, 0.5, 0]] * 4, atol=1e-6)
    tokens, expected = (x.tokens.reshape(4, 4, 10)[:, :3] for x in (out, whole))
    np.testing.assert_allclose(tokens, expected, atol=1e-6)
    np.testing.assert_allclose(out.cls, whole.cls, atol=1e-6)
    np.testing.assert_array_equal(whole.weight, 1)


def test_an_image_without_coverage_learns_its_label():
    maps = random_maps(3, 2, 3, (6, 6), 10)
    beside = np.stack([crop(2, 0, 1, 1), IDENTITY])
    out = targets_of(maps, beside, grid=(4, 4), classes=10, label=np.array([7, 2], np.int32))
    np.testing.assert_array_equal(out.weight, np.repeat([[0.0], [1.0]], 16, 1))
    np.testing.assert_array_equal(out.cls[0], out.label[0])
    assert np.abs(out.cls[1] - out.label[1]).max() > 0.1
    logits = jax.numpy.asarray(np.random.RandomState(0).standard_normal((2, 16, 10)), "float32")
    output = ModelOutput(logits=logits[:, 0], cls=logits[:, 0], tokens=logits)
    second = jax.tree.map(lambda x: x[1:], (output, out))
    dense = token_label_loss(output, out, cls_weight=0.0)
    np.testing.assert_allclose(dense, token_label_loss(*second, cls_weight=0.0) / 2, rtol=1e-5)


@pytest.mark.parametrize("window", [crop(0, 0, 1, 1), crop(0.6, 0.7, 0.4, 0.3)])
@pytest.mark.parametrize("move", [IDENTITY, FLIP, QUARTER_TURN])
@pytest.mark.parametrize(("map_grid", "grid"), [((18, 18), (14, 14)), ((5, 9), (7, 3)), ((33, 32), (1, 2))])
def test_crops_of_the_map_are_covered(window, move, map_grid, grid):
    out = targets_of(random_maps(4, 1, 1, map_grid, 5), compose(move, window), grid=grid, classes=5)
    np.testing.assert_array_equal(out.weight, 1)


def online(logits, matrix, *, grid, label=None):
    batch = logits.shape[0]
    matrix = np.broadcast_to(np.asarray(matrix, np.float32), (batch, 2, 3))
    label = np.zeros(batch, np.int32) if label is None else label
    return jax.jit(functools.partial(make_online_targets, grid=grid))(logits, label, matrix)


@pytest.mark.parametrize(("map_grid", "grid"), [((18, 18), (14, 14)), ((5, 9), (7, 3))])
def test_logits_of_the_image_itself_make_the_targets_of_maps_with_all_classes(map_grid, grid):
    """The same target, and no difference but that of float16."""
    logits = (4 * np.random.RandomState(5).standard_normal((2, *map_grid, 11))).astype(np.float32)
    value = np.moveaxis(logits, -1, 1).astype(np.float16)
    index = np.broadcast_to(np.arange(11, dtype=np.int32).reshape(1, 11, 1, 1), value.shape)
    label = np.array([3, 8], np.int32)
    expected = targets_of(ScoreMaps(value, index), IDENTITY, grid=grid, classes=11, label=label)
    found = online(logits, IDENTITY, grid=grid, label=label)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    np.testing.assert_array_equal(found.weight, 1)
    np.testing.assert_array_equal(found.label, expected.label)
    np.testing.assert_array_equal(online(logits, FLIP, grid=grid).weight, 1)


def test_padding_of_the_augmentation_has_no_weight():
    """The image is shifted by 3/8 to the left: the right column of tokens and half of the third are padding.

    The annotator scores the padding too. Its scores do not enter the class target.
    """
    shifted = np.array([[1, 0, 0.375], [0, 1, 0]], np.float32)
    logits = np.random.RandomState(6).standard_normal((1, 8, 8, 10)).astype(np.float32)
    found = online(logits, shifted, grid=(4, 4))
    np.testing.assert_allclose(found.weight.reshape(4, 4), [[1, 1, 0.5, 0]] * 4, atol=1e-6)
    visible = online(logits[:, :, :5], IDENTITY, grid=(4, 4))
    np.testing.assert_allclose(found.cls, visible.cls, atol=1e-6)
    gone = online(logits, crop(2, 0, 1, 1), grid=(4, 4), label=np.array([7], np.int32))
    np.testing.assert_array_equal(gone.cls, gone.label)
    np.testing.assert_array_equal(gone.weight, 0)
