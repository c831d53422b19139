"""Resizing equals Pillow's; the fast one is close to it."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tiny_images
from sklearn.datasets import load_sample_images

from tlvit.data.transforms.crop import align_box
from tlvit.data.transforms.decode import decode_and_crop
from tlvit.data.transforms.resize import fast_resize, resize
from tlvit.ops.resize import resize_pixels


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resize_equals_pillow(method):
    image = tiny_images.wavy_image(150, 211)
    expected = PIL.Image.fromarray(image).resize((96, 64), getattr(PIL.Image, method.upper()))
    difference = np.abs(resize(image, (64, 96), method).numpy().astype(int) - np.asarray(expected, int))
    assert difference.max() <= 1
    assert difference.mean() < 0.3


@pytest.mark.parametrize("size", [(64, 96), (190, 230)])
def test_the_step_resizes_as_annotation_does(size):
    image = tiny_images.wavy_image(150, 211)
    expected = resize(image, size, "bicubic").numpy().astype(float)
    found = np.asarray(resize_pixels(image[None], size))[0]
    assert np.abs(found - expected).max() <= 1  # positions half-way between two gray levels
    assert np.mean(found != expected) < 0.001
    np.testing.assert_array_equal(resize_pixels(image[None], image.shape[:2])[0], image)


def test_random_interpolation_draws_both():
    seeds = [tf.constant([7, i], tf.int64) for i in range(12)]
    image = tiny_images.wavy_image(40, 40)
    both = [resize(image, (64, 64), method).numpy() for method in ("bilinear", "bicubic")]
    drawn = [resize(image, (64, 64), "random", seed).numpy() for seed in seeds]
    hits = [sum((d == b).all() for d in drawn) for b in both]
    assert sum(hits) == 12
    assert min(hits) >= 2


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "zoom", [0.7, 1.0, 1.19, 1.21, 1.4, 1.6, 1.62, 1.63, 1.65, 1.9, 2.4, 3.2, 3.3, 4.5, 6.4, 7]
)
def test_the_fast_resize_is_close_to_pillow(method, zoom):
    """Crops `zoom` times the final size: over two photographs, the mean difference is below 4 gray levels."""
    differences = []
    for photo in load_sample_images().images:
        encoded = tf.constant(tiny_images.encode_jpeg(photo, 90))
        pixels = np.asarray(PIL.Image.open(io.BytesIO(encoded.numpy())))
        side = min(int(380 / zoom), 224)
        wanted = tf.constant([17, 101, round(side * zoom), round(side * zoom)])
        snap = lambda size, wanted=wanted, side=side: align_box(wanted, size, (side, side))
        crop, box, _ = decode_and_crop(encoded, lambda size, snap=snap: (*snap(size), snap(size)[0]))
        top, left, height, width = box.numpy()
        assert np.abs(box - wanted).max() <= 8
        result = fast_resize(crop, (side, side), method).numpy()
        image = PIL.Image.fromarray(pixels[top : top + height, left : left + width])
        image = image.resize((side, side), getattr(PIL.Image, method.upper()))
        difference = result.astype(int) - np.asarray(image)
        differences.append(np.abs(difference).mean())
        assert abs(difference.mean()) < 0.6
    assert np.mean(differences) < (0.5 if zoom < 1 else 4)
