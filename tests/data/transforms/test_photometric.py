"""Photometric operations equal Pillow's."""

import itertools

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFilter
import PIL.ImageOps
import pytest
import tensorflow as tf
import tiny_images

from tlvit.data.transforms import photometric

FACTORS = (0.1, 0.19, 0.55, 1.0, 1.45, 1.81, 1.9)
ENHANCERS = {"color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}


@pytest.fixture(scope="module")
def photographs():
    return tiny_images.photographs()


def add_below_128(image, amount):
    return image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)


def photometric_cases():
    """(our operation, Pillow's, their argument), named."""
    pairs = [("autocontrast", PIL.ImageOps.autocontrast), ("equalize", PIL.ImageOps.equalize)]
    for name, theirs in pairs:
        yield pytest.param(getattr(photometric, name), theirs, None, id=name)
    arguments = {"posterize": (1, 2, 3, 4), "solarize": (0, 26, 128, 256)}
    for name, values in arguments.items():
        for n in values:
            yield pytest.param(getattr(photometric, name), getattr(PIL.ImageOps, name), n, id=f"{name} {n}")
    for n in (0, 55, 110):
        yield pytest.param(photometric.solarize_add, add_below_128, n, id=f"solarize_add {n}")
    for (name, kind), f in itertools.product(ENHANCERS.items(), FACTORS):
        theirs = lambda image, f, kind=kind: getattr(PIL.ImageEnhance, kind)(image).enhance(f)
        yield pytest.param(getattr(photometric, name), theirs, f, id=f"{name} {f}")


@pytest.mark.parametrize(("ours", "theirs", "argument"), list(photometric_cases()))
def test_photometric_operations_equal_pillow(photographs, ours, theirs, argument):
    given = [] if argument is None else [argument]
    for image in photographs:
        result = ours(tf.constant(image), *given).numpy()
        expected = np.asarray(theirs(PIL.Image.fromarray(image), *given))
        assert result.dtype == np.uint8
        assert np.abs(result.astype(int) - expected).max() <= 1


def test_constant_channels_do_not_change():
    image = np.full((20, 30, 3), 77, np.uint8)
    image[:, :, 1] = np.arange(30)
    for ours, theirs in (
        (photometric.autocontrast, PIL.ImageOps.autocontrast),
        (photometric.equalize, PIL.ImageOps.equalize),
    ):
        expected = np.asarray(theirs(PIL.Image.fromarray(image)))
        result = ours(tf.constant(image)).numpy()
        np.testing.assert_array_equal(result[:, :, [0, 2]], 77)
        assert np.abs(result.astype(int) - expected).max() <= 1


def test_posterize_to_no_bits_is_black(photographs):
    assert photometric.posterize(tf.constant(photographs[0]), 0).numpy().max() == 0


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_close_to_pillow(photographs, radius):
    """Pillow's is three box filters in place of a Gaussian, so single pixels differ more."""
    for image in photographs:
        ours = photometric.gaussian_blur(tf.constant(image), radius).numpy().astype(int)
        theirs = PIL.Image.fromarray(image).filter(PIL.ImageFilter.GaussianBlur(radius))
        assert np.abs(ours - np.asarray(theirs)).mean() < 0.6


def test_images_whose_size_is_not_known():
    """Whole images have sizes of their own in the graph of tf.data."""
    image = tf.constant(tiny_images.wavy_image(30, 44))
    functions = [
        photometric.autocontrast, photometric.equalize, photometric.invert, photometric.grayscale,
        lambda x: photometric.posterize(x, tf.constant(3)),
        lambda x: photometric.solarize(x, tf.constant(120)),
        lambda x: photometric.solarize_add(x, tf.constant(40)),
        lambda x: photometric.color(x, 1.4),
        lambda x: photometric.contrast(x, 0.7),
        lambda x: photometric.brightness(x, 1.2),
        lambda x: photometric.sharpness(x, 1.8),
    ]  # fmt: skip
    signature = [tf.TensorSpec([None, None, 3], tf.uint8)]
    graph = tf.function(lambda x: [f(x) for f in functions], input_signature=signature)
    for found, function in zip(graph(image), functions, strict=True):
        np.testing.assert_array_equal(found, function(image))
