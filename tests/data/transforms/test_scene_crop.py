"""Views for segmentation: image, classes and matrix agree; scale, crop, padding and colors are as drawn."""

import numpy as np
import pytest
import tensorflow as tf

from tlvit.config import Segmentation
from tlvit.data.transforms.scene_crop import photometric_distortion, scene_crop

HEIGHT, WIDTH = 60, 90
ROWS, COLUMNS = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
IMAGE = np.stack([2 * COLUMNS, 3 * ROWS, 0 * ROWS], -1).astype(np.uint8)  # the colors tell the position
CLASSES = (COLUMNS // 10 + 10 * (ROWS // 10)).astype(np.uint8)


def view_function(classes=CLASSES, crop_size=(48, 64), hflip=0.5, **options):
    settings = Segmentation(**{"scale": (200, 60), "photometric": False, **options})

    @tf.function
    def view(number):
        seed = tf.stack([tf.constant(3, tf.int64), number])
        images = tf.constant(IMAGE), tf.constant(classes)
        return scene_crop(*images, seed, crop_size=crop_size, hflip=hflip, settings=settings)

    return lambda number: [x.numpy() for x in view(tf.constant(number, tf.int64))]


@pytest.fixture(scope="module")
def views():
    function = view_function()
    return [function(number) for number in range(16)]


def points(matrix, size):
    """Where the pixels of a view are in the image, in pixels."""
    y, x = np.meshgrid(*((np.arange(side) + 0.5) / side for side in size), indexing="ij")
    return WIDTH * (matrix[0, 0] * x + matrix[0, 2]), HEIGHT * (matrix[1, 1] * y + matrix[1, 2])


def test_pixels_classes_and_matrix_agree(views):
    """Within half a gray level, and every class exactly. Padding is where points are outside of the image."""
    padded = flipped = 0
    for image, classes, matrix in views:
        assert (image.dtype, image.shape, classes.dtype, classes.shape) == (
            np.uint8, (48, 64, 3), np.uint8, (48, 64)
        )  # fmt: skip
        x, y = points(matrix, (48, 64))
        inside = (x >= 0) & (x <= WIDTH) & (y >= 0) & (y <= HEIGHT)
        np.testing.assert_array_equal(classes != 255, inside)
        assert not image[~inside].any()
        at = np.clip(y, 0, HEIGHT - 1e-3).astype(int), np.clip(x, 0, WIDTH - 1e-3).astype(int)
        sure = inside & (abs(x - x.round()) > 1e-3) & (abs(y - y.round()) > 1e-3)  # not between two pixels
        assert sure.mean() > 0.5 * inside.mean()
        np.testing.assert_array_equal(classes[sure], CLASSES[at][sure])
        for channel, expected in ((0, 2 * (x - 0.5)), (1, 3 * (y - 0.5))):
            expected = np.clip(expected, 0, (2 * WIDTH - 2, 3 * HEIGHT - 3)[channel])[inside]
            assert np.abs(image[..., channel][inside] - expected).max() < 0.51
        padded += not inside.all()
        flipped += matrix[0, 0] < 0
    assert 0 < padded < 16
    assert 0 < flipped < 16


def test_the_scale_is_uniform_in_its_range(views):
    """An image of 60 x 90 within (200, 60) times r has the height 60 r."""
    scales = [48 / (60 * matrix[1, 1]) for *_, matrix in views]
    assert 0.49 < min(scales) < 0.8
    assert 1.5 < max(scales) < 2.01
    image, _, matrix = view_function(scale_range=(1.0, 1.0), crop_size=(60, 90), hflip=0.0)(0)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_allclose(matrix, np.eye(2, 3), atol=1e-6)


def test_the_same_seed_gives_the_same_view(views):
    for one, two in zip(view_function()(5), views[5], strict=True):
        np.testing.assert_array_equal(one, two)


def test_crops_of_one_class_are_drawn_again():
    """The upper half is one class and the lower half another: a view may not have 3/4 of either."""
    halves = np.where(ROWS < 30, 1, 2).astype(np.uint8)
    halves[:, :20] = 255  # does not count

    def share(ratio):
        function = view_function(halves, (12, 40), max_class_ratio=ratio, scale_range=(0.5, 0.5))
        return [np.mean(classes[classes != 255] == 1) for _, classes, _ in map(function, range(40))]

    assert max(abs(np.array(share(1.0)) - 0.5)) == 0.5
    checked = share(0.75)
    assert np.mean([0.25 < s < 0.75 for s in checked]) > 0.9  # after ten tries any crop is taken


def test_colors_change_within_their_limits():
    image = tf.constant(np.random.RandomState(0).randint(0, 256, (8, 9, 3)), tf.float32)
    changed = [
        photometric_distortion(image, tf.constant([1, number], tf.int64)).numpy() for number in range(40)
    ]
    assert all(x.min() >= 0 and x.max() <= 255 for x in changed)
    unchanged = sum(np.allclose(x, image, atol=1e-2) for x in changed)
    assert 0 < unchanged < 12  # expected: 1/16 of them
    gray = tf.fill([1, 1, 3], 100.0)  # no saturation and no hue: brightness and contrast only
    values = [photometric_distortion(gray, tf.constant([2, i], tf.int64)).numpy()[0, 0, 0] for i in range(60)]
    assert min(values) >= (100 - 32) * 0.5 - 1e-3
    assert max(values) <= (100 + 32) * 1.5 + 1e-3
    assert max(values) - min(values) > 80
