"""Annotations of every kind of file become the same indices, and indices become classes."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tlvit.config import Segmentation
from tlvit.data.transforms.annotation import decode_annotation, to_classes
from tlvit.images import decode_annotation as decode_with_pillow

INDICES = np.random.RandomState(0).randint(0, 4, (7, 9)).astype(np.uint8)


def png(image, **options):
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def palette():
    image = Image.fromarray(INDICES).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])  # colors that are not the indices
    return image


FILES = {
    "gray": png(Image.fromarray(INDICES)),
    "palette": png(palette()),
    "palette of 2 bits": png(palette(), bits=2),
    "rgb, the red channel": png(Image.fromarray(np.stack([INDICES, 0 * INDICES, 9 * INDICES], -1))),
    "16 bits": png(Image.fromarray(INDICES.astype(np.uint16))),
}


@pytest.fixture(scope="module")
def decode():
    return tf.function(decode_annotation, input_signature=[tf.TensorSpec([], tf.string)])


@pytest.mark.parametrize("kind", FILES)
def test_the_pixels_are_the_indices(kind, decode):
    np.testing.assert_array_equal(decode(tf.constant(FILES[kind])), INDICES)
    np.testing.assert_array_equal(decode_with_pillow(FILES[kind]), INDICES)


def test_what_is_no_annotation_is_refused():
    with pytest.raises(ValueError, match="it is not a PNG, TIFF or BMP image"):
        decode_with_pillow(b"text")
    stream = io.BytesIO()
    Image.fromarray(INDICES.astype(np.float32)).save(stream, "TIFF")
    with pytest.raises(ValueError, match="mode F, not gray, palette or RGB"):
        decode_with_pillow(stream.getvalue())
    for channels in (3, 4):
        colors = tf.io.encode_png(np.full((4, 4, channels), 300, np.uint16)).numpy()
        with pytest.raises(ValueError, match="colors have 16 bits, of which 8 can be read"):
            decode_with_pillow(colors)


def test_ignored_indices_and_the_zero_label():
    def classes(values, **options):
        found, problem = to_classes(tf.constant([values]), Segmentation(**options), 3, tf.constant("a/b"))
        return found[0].numpy().tolist(), problem.numpy().decode()

    assert classes([0, 2, 255]) == ([0, 2, 255], "")
    assert classes([0, 2, 9], ignore=9) == ([0, 2, 255], "")
    assert classes([0, 1, 3, 255], reduce_zero_label=True) == ([255, 0, 2, 255], "")
    for options, wrong in (({}, 3), ({"reduce_zero_label": True}, 4)):
        message = (
            f"the annotation of a/b has the index {wrong} but with 3 classes the last one is {wrong - 1} "
        )
        assert classes([1, wrong, 255], **options)[1].startswith(message)
