"""The matrices in TensorFlow equal those of tlvit.ops.geometry, and points move as documented."""

import numpy as np
import pytest
import tensorflow as tf

from tlvit.data.transforms import geometry
from tlvit.ops import geometry as original

CASES = 50


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_sizes(rng):
    """(height, width) of random images, pixels."""
    return [tuple(int(n) for n in rng.integers(8, 600, 2)) for _ in range(CASES)]


def assert_same(found, expected):
    assert found.shape == (2, 3)
    assert found.dtype == tf.float32
    assert np.asarray(expected).dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_identity_and_flip_equal_the_original():
    assert_same(geometry.identity(), original.identity())
    assert_same(geometry.flip(), original.flip())


@pytest.mark.parametrize("transposed", [False, True])
def test_crop_equals_the_original(rng, transposed):
    for size in random_sizes(rng):
        extent = rng.integers(1, np.array(size) + 1)
        corner = rng.integers(0, np.array(size) - extent + 1)
        box = np.concatenate([corner, extent]).astype(np.int32)
        found = geometry.crop(tf.constant(box), tf.constant(size), transposed=transposed)
        assert_same(found, original.crop(box, np.array(size), transposed=transposed))


def test_rotation_equals_the_original(rng):
    for size in random_sizes(rng):
        angle = np.float32(rng.uniform(-np.pi, np.pi))
        assert_same(geometry.rotation(tf.constant(angle), size), original.rotation(angle, size))


@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_shears_equal_the_original(rng, name):
    for size in random_sizes(rng):
        factor = np.float32(rng.uniform(-1, 1))
        found = getattr(geometry, name)(tf.constant(factor), size)
        assert_same(found, getattr(original, name)(factor, size))


def test_translation_equals_the_original(rng):
    for x, y in rng.uniform(-1, 1, (CASES, 2)).astype(np.float32):
        assert_same(geometry.translation(tf.constant(x), tf.constant(y)), original.translation(x, y))


def test_compose_equals_the_original(rng):
    for outer, inner in rng.uniform(-2, 2, (CASES, 2, 2, 3)).astype(np.float32):
        found = geometry.compose(tf.constant(outer), tf.constant(inner))
        np.testing.assert_allclose(found, original.compose(outer, inner), atol=2e-6)


def test_a_quarter_turn_moves_the_corners():
    """A counterclockwise rotation: the top left corner of the result comes from the top right one."""
    found = geometry.rotation(tf.constant(np.pi / 2, tf.float32), (40, 40)).numpy()
    np.testing.assert_allclose(found @ [0, 0, 1], [1, 0], atol=1e-6)


def test_the_published_crop_of_the_top_half_is_the_left_half():
    """The published code exchanges the axes of the crop."""
    box, size = tf.constant([0, 0, 50, 100]), tf.constant([100, 100])
    np.testing.assert_allclose(geometry.crop(box, size), [[1, 0, 0], [0, 0.5, 0]])
    np.testing.assert_allclose(geometry.crop(box, size, transposed=True), [[0.5, 0, 0], [0, 1, 0]])


def test_compose_applies_the_inner_matrix_first():
    outer, inner = geometry.flip(), tf.constant([[0.5, 0.0, 0.25], [0.0, 1.0, 0.0]])
    point = geometry.compose(outer, inner).numpy() @ [0.5, 0.5, 1]
    np.testing.assert_allclose(point, [1 - (0.5 * 0.5 + 0.25), 0.5])
