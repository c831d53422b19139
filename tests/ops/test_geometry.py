"""Geometry: known points of every transform, and composition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlvit.ops import geometry
from tlvit.ops.geometry import compose, crop, flip, identity, rotation, shear_x, shear_y, translation

SIZE = (100, 200)  # twice as wide as tall


def point(matrix, x, y):
    """The source of a point of the augmented image."""
    return np.asarray(matrix) @ np.array([x, y, 1.0])


@pytest.mark.parametrize(
    ("matrix", "start", "source"),
    [
        (identity(), (0.2, 0.7), (0.2, 0.7)),
        (flip(), (0.2, 0.7), (0.8, 0.7)),
        (flip(), (0.0, 0.0), (1.0, 0.0)),
        (crop((10, 40, 50, 100), SIZE), (0.0, 0.0), (0.2, 0.1)),
        (crop((10, 40, 50, 100), SIZE), (1.0, 1.0), (0.7, 0.6)),
        (crop((10, 40, 50, 100), SIZE), (0.5, 0.25), (0.45, 0.225)),
        (crop((10, 40, 25, 100), SIZE, transposed=True), (0.0, 0.0), (0.1, 0.2)),
        (crop((10, 40, 25, 100), SIZE, transposed=True), (1.0, 1.0), (0.35, 0.7)),
        (translation(0.25, -0.5), (0.5, 0.75), (0.75, 0.25)),
        (shear_x(0.3, SIZE), (0.5, 0.0), (0.5, 0.0)),
        (shear_x(0.3, SIZE), (0.5, 1.0), (0.65, 1.0)),  # 0.3 * 100 pixels of 200
        (shear_y(0.3, SIZE), (0.0, 0.5), (0.0, 0.5)),
        (shear_y(0.3, SIZE), (1.0, 0.2), (1.0, 0.8)),  # 0.3 * 200 pixels of 100
        (rotation(0.0, SIZE), (0.2, 0.7), (0.2, 0.7)),
        (rotation(1.0, SIZE), (0.5, 0.5), (0.5, 0.5)),
        # A quarter turn counterclockwise: the top of the result was 50 pixels to the right of the center.
        (rotation(math.pi / 2, SIZE), (0.5, 0.0), (0.75, 0.5)),
        (rotation(math.pi / 2, SIZE), (0.75, 0.5), (0.5, 1.0)),
        (rotation(math.pi / 2, (80, 80)), (0.0, 0.0), (1.0, 0.0)),
        (rotation(math.pi / 6, (80, 80)), (1.0, 0.5), (0.5 + math.sqrt(3) / 4, 0.75)),
    ],
)
def test_known_points(matrix, start, source):
    assert matrix.dtype == np.float32
    assert matrix.shape == (2, 3)
    np.testing.assert_allclose(point(matrix, *start), source, atol=1e-6)


def test_compose_applies_the_inner_matrix_first():
    """A flip, then a crop of the left half of the flipped image: the right half of the source, mirrored."""
    left_half = crop((0, 0, 100, 100), SIZE)
    np.testing.assert_allclose(compose(flip(), left_half), [[-0.5, 0, 1], [0, 1, 0]], atol=1e-7)
    np.testing.assert_allclose(compose(left_half, flip()), [[-0.5, 0, 0.5], [0, 1, 0]], atol=1e-7)
    outer, inner = rotation(0.3, SIZE), compose(shear_x(0.2, SIZE), translation(0.1, 0.2))
    expected = point(outer, *point(inner, 0.3, 0.6))
    np.testing.assert_allclose(point(compose(outer, inner), 0.3, 0.6), expected, atol=1e-6)


@pytest.mark.parametrize(
    "pair",
    [
        (flip(), flip()),
        (rotation(0.4, SIZE), rotation(-0.4, SIZE)),
        (shear_x(0.3, SIZE), shear_x(-0.3, SIZE)),
        (shear_y(0.3, SIZE), shear_y(-0.3, SIZE)),
        (translation(0.1, -0.2), translation(-0.1, 0.2)),
        (identity(), identity()),
    ],
)
def test_a_transform_and_its_inverse_give_the_identity(pair):
    np.testing.assert_allclose(compose(*pair), identity(), atol=1e-6)
    np.testing.assert_allclose(compose(*reversed(pair)), identity(), atol=1e-6)


def test_four_quarter_turns_of_any_image_give_the_identity():
    quarter = rotation(math.pi / 2, SIZE)
    half = compose(quarter, quarter)
    np.testing.assert_allclose(half, [[-1, 0, 1], [0, -1, 1]], atol=1e-6)
    np.testing.assert_allclose(compose(half, half), identity(), atol=1e-6)


def batch(xp):
    """Every function on [2, 3] batches."""
    angle = xp.asarray(np.linspace(-0.5, 0.5, 6).reshape(2, 3), xp.float32)
    box = xp.asarray(np.arange(24).reshape(2, 3, 4) + 1, xp.float32)
    size = xp.asarray(np.full((2, 3, 2), 50), xp.float32)
    return {
        "rotation": rotation(angle, SIZE),
        "shear_x": shear_x(angle, SIZE),
        "shear_y": shear_y(angle, SIZE),
        "translation": translation(angle, 0.25),
        "crop": crop(box, size),
        "transposed crop": crop(box, (50, 40), transposed=True),
        "compose": compose(rotation(angle, SIZE), shear_x(2 * angle, SIZE)),
        "compose with one": compose(flip(), shear_y(angle, SIZE)),
        "from_pixels": geometry.from_pixels(translation(angle, angle), SIZE),
    }


def test_batches_of_both_libraries_equal_the_single_matrices():
    arrays, on_device, traced = batch(np), batch(jnp), jax.jit(lambda: batch(jnp))()
    for name, matrix in arrays.items():
        assert isinstance(matrix, np.ndarray), name
        assert isinstance(on_device[name], jax.Array), name
        for other in (on_device[name], traced[name]):
            assert (other.shape, other.dtype) == ((2, 3, 2, 3), np.float32), name
            np.testing.assert_allclose(other, matrix, atol=2e-6, err_msg=name)
    angle = np.linspace(-0.5, 0.5, 6).astype(np.float32)
    np.testing.assert_allclose(arrays["rotation"][1, 2], rotation(float(angle[5]), SIZE), atol=1e-6)
    np.testing.assert_allclose(
        arrays["compose"][0, 1],
        compose(rotation(float(angle[1]), SIZE), shear_x(float(2 * angle[1]), SIZE)),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        arrays["transposed crop"][1, 0], crop((13, 14, 15, 16), (50, 40), transposed=True), atol=1e-6
    )
