"""Image files of all formats become RGB, and truncated JPEGs are an error."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tiny_images

from tlvit.config import Augment
from tlvit.data.transforms.crop import train_image
from tlvit.data.transforms.decode import check_complete_jpeg, decode


def test_gray_palette_cmyk_and_animated_files_become_rgb():
    seed = tf.constant([7, 0], tf.int64)
    image = PIL.Image.fromarray(tiny_images.wavy_image(20, 30))
    for mode, kind in (
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("P", "GIF"),
    ):
        stream = io.BytesIO()
        image.convert(mode).save(stream, kind, **({"quality": 98} if kind == "JPEG" else {}))
        decoded = decode(tf.constant(stream.getvalue())).numpy()
        expected = np.asarray(image.convert(mode).convert("RGB"), np.float64)
        assert decoded.shape == (20, 30, 3)
        assert np.abs(decoded - expected).mean() < 4, (mode, kind)
        out, _ = train_image(tf.constant(stream.getvalue()), seed, (8, 8), Augment())
        assert out.shape == (8, 8, 3)


def test_a_truncated_jpeg_is_an_error():
    complete = tiny_images.encode_jpeg(tiny_images.wavy_image(60, 80))
    assert check_complete_jpeg(tf.constant(complete)).numpy() == complete
    followed = complete + b"other data"  # complete, without the end marker as its last bytes
    assert check_complete_jpeg(tf.constant(followed)).numpy() == followed
    png = tf.io.encode_png(tiny_images.wavy_image(60, 80))
    assert check_complete_jpeg(png).numpy() == png.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError):
        check_complete_jpeg(tf.constant(complete[: len(complete) * 3 // 4]))
