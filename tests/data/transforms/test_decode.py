"""Image files of all kinds become the pixels that tlvit.images defines, and truncated JPEGs are an error."""

import image_kinds
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tiny_images

from tlvit.config import Augment
from tlvit.data.transforms.crop import train_image
from tlvit.data.transforms.decode import check_complete_jpeg, decode, to_ordinary
from tlvit.images import decode_image

UNCHANGED = [kind for kind in image_kinds.KINDS if kind.split()[-1] in ("jpeg", "jpegs", "png")]


def convert(content, *, exif):
    return tf.function(lambda x: to_ordinary(x, exif=exif))(tf.constant(content)).numpy()


@pytest.mark.parametrize("kind", image_kinds.KINDS)
def test_the_pipeline_sees_the_pixels_of_the_definition(kind):
    content = image_kinds.image_file(kind)
    for exif in (False, True):
        found = decode(convert(content, exif=exif)).numpy().astype(int)
        expected = decode_image(content, exif=exif)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("kind", UNCHANGED)
def test_jpeg_and_png_files_are_not_converted(kind):
    content = image_kinds.image_file(kind)
    assert convert(content, exif=False) == content
    assert (convert(content, exif=True) == content) == ("exif" not in kind)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("jfif", [False, True])
def test_a_jpeg_is_converted_only_if_it_must_be_turned(orientation, jfif):
    image = PIL.Image.fromarray(tiny_images.wavy_image(16, 24))
    content = image_kinds.save(image, "JPEG", exif=image_kinds.exif(orientation))
    if not jfif:  # as cameras write it: EXIF data directly at the start
        length = int.from_bytes(content[4:6], "big")
        assert content[2:4] == b"\xff\xe0"
        content = content[:2] + content[4 + length :]
    assert (convert(content, exif=True) == content) == (orientation == 1)
    found = decode(convert(content, exif=True)).numpy()
    assert found.shape == ((16, 24, 3) if orientation < 5 else (24, 16, 3))
    np.testing.assert_allclose(found.astype(int), decode_image(content, exif=True), atol=1)


@pytest.mark.parametrize("size", [(22_000, 22_000), (65_536, 1)])
def test_large_images_raise_an_error_with_their_size(size):
    content = image_kinds.png(8, 2, np.zeros((1, 1, 3), np.uint8), size)
    for exif in (False, True):
        with pytest.raises(tf.errors.InvalidArgumentError, match="pixels"):
            convert(content, exif=exif)


@pytest.mark.parametrize(
    "content", [b"", b"GIF or what?", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1", b"\xff\xd8\xff"]
)
def test_damaged_headers_raise_an_error(content):
    for exif in (False, True):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(convert(content, exif=exif))


def test_training_reads_unusual_kinds():
    seed = tf.constant([7, 0], tf.int64)
    for kind in ("cmyk jpeg", "16-bit gray png", "transparent gif", "exif webp", "rgb tiff"):
        encoded = tf.constant(convert(image_kinds.image_file(kind), exif=True))
        assert train_image(encoded, seed, (8, 8), Augment())[0].shape == (8, 8, 3)


def test_a_truncated_jpeg_is_an_error():
    complete = tiny_images.encode_jpeg(tiny_images.wavy_image(60, 80))
    assert check_complete_jpeg(tf.constant(complete)).numpy() == complete
    followed = complete + b"other data"  # complete, without the end marker as its last bytes
    assert check_complete_jpeg(tf.constant(followed)).numpy() == followed
    png = tf.io.encode_png(tiny_images.wavy_image(60, 80))
    assert check_complete_jpeg(png).numpy() == png.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError):
        check_complete_jpeg(tf.constant(complete[: len(complete) * 3 // 4]))
