"""The padded random crop: pixels against NumPy and Pillow, and the matrix against where the pixels are."""

import io

import numpy as np
import pytest
import tensorflow as tf
import tiny_images
from PIL import Image

from tlvit.config import Augment
from tlvit.data.transforms.crop import train_image
from tlvit.data.transforms.padded_crop import padded_crop


def seeds(count):
    return [tf.constant([7, i], tf.int64) for i in range(count)]


def of(image, i, image_size, **options):
    """The crop and its matrix for seed i."""
    augment = Augment(crop="padded", **options)
    pixels, matrix = padded_crop(
        tf.io.encode_png(image), (seeds(99)[i], seeds(99)[-i - 1]), image_size, augment
    )
    return pixels.numpy(), matrix.numpy()


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_it_is_a_window_of_the_padded_image(mode):
    """Without a resize: NumPy pads the image, and the matrix says where the window is. All corners occur."""
    image = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode)
    corners = set()
    for i in range(60):
        pixels, matrix = of(image, i, (8, 8), crop_padding=3, padding_mode=mode)
        np.testing.assert_allclose(matrix[:, :2], np.eye(2), atol=1e-6)
        left, top = np.round(matrix[:, 2] * 8).astype(int) + 3
        np.testing.assert_array_equal(pixels, padded[top : top + 8, left : left + 8])
        corners.add((top, left))
    assert {top for top, _ in corners} == {left for _, left in corners} == set(range(7))


def test_the_published_crop_of_cifar():
    """torchvision's Resize(224) of 32 pixels, which is Pillow's bilinear one, then black padding of 28."""
    image = np.random.RandomState(1).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    expected = np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR)).astype(int)
    expected = np.pad(expected, ((28, 28), (28, 28), (0, 0)))
    pixels, matrix = of(image, 5, (224, 224), crop_padding=28, interpolation="bilinear")
    left, top = np.round(matrix[:, 2] * 224).astype(int) + 28
    window = expected[top : top + 224, left : left + 224]
    assert np.abs(pixels.astype(int) - window).max() <= 1
    assert (pixels == 0).all(-1).any()


def test_an_oblong_image_covers_the_crop():
    """The shorter side gets the size of the crop. The matrix points at the pixels, also after a flip."""
    encoded = tf.io.encode_png(tiny_images.position_image(0, 60, 90))
    augment = Augment(crop="padded", crop_padding=0, interpolation="random")
    lefts, flips = set(), 0
    for seed in seeds(20):
        image, matrix = train_image(encoded, seed, (30, 30), augment)
        assert image.shape == (30, 30, 3)
        expected = np.tensordot(matrix.numpy(), tiny_images.pixel_centers(30, 30), 1)
        read = image.numpy()[:, :, :2].astype(np.float64).transpose(2, 0, 1) / 255
        assert np.abs(read - expected)[:, 1:-1, 1:-1].max() < 0.02
        flips += matrix.numpy()[0, 0] < 0
        lefts.add(round(float(matrix.numpy()[0, 2]), 3))
    assert 4 < flips < 16
    assert len(lefts) > 8


def test_seeds_and_streams(tmp_path):
    """The same seed gives the same image; augmentations come after the crop."""
    image = np.random.RandomState(2).randint(0, 256, (20, 20, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    encoded = tf.constant(stream.getvalue())
    plain = Augment(crop="padded", crop_padding=2, hflip=0.0)
    gray = Augment(crop="padded", crop_padding=2, hflip=0.0, color_jitter=0.5)
    first, again = (train_image(encoded, seeds(1)[0], (20, 20), plain)[0].numpy() for _ in range(2))
    np.testing.assert_array_equal(first, again)
    jittered, matrix = train_image(encoded, seeds(1)[0], (20, 20), gray)
    assert (jittered.numpy() != first).any()
    np.testing.assert_array_equal(matrix, train_image(encoded, seeds(1)[0], (20, 20), plain)[1])
