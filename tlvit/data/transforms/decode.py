"""Decodes image files inside tf.data: completely, or only a crop of them and at a lower resolution.

TensorFlow decodes JPEG and PNG files. `to_ordinary` turns all other images into BMP files first, with the
pixels that `tlvit.images` defines.
"""

import io
from collections.abc import Callable

import tensorflow as tf
from PIL import Image

from tlvit.images import MAX_PIXELS, MAX_SIDE, decode_image, is_upright_jpeg

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def to_ordinary(encoded: tf.Tensor, *, exif: bool) -> tf.Tensor:
    """Returns a file that TensorFlow decodes to the pixels of `tlvit.images.decode_image`.

    JPEG and PNG files are returned unchanged, unless their EXIF orientation has to be applied. Their headers
    decide that, without Python. Everything else becomes a BMP file.

    Args:
      encoded: scalar string, an image file.
      exif: whether to turn images as their EXIF orientation says.

    Returns:
      Scalar string, a JPEG, PNG or BMP file. An image that `tlvit.images` refuses raises an error in the
      graph.
    """

    def jpeg_is_unchanged() -> tf.Tensor:
        fits = _fits(tf.io.extract_jpeg_shape(encoded)[:2])
        return fits & ~_may_have_exif(encoded) if exif else fits

    def png_is_unchanged() -> tf.Tensor:
        fits = _fits(_png_size(encoded))
        return fits & ~tf.strings.regex_full_match(encoded, r"\C*eXIf\C*") if exif else fits

    is_png = (tf.strings.substr(encoded, 0, 8) == PNG_SIGNATURE) & (tf.strings.length(encoded) >= 24)
    not_jpeg = lambda: tf.cond(is_png, png_is_unchanged, lambda: tf.constant(False))
    unchanged = tf.cond(tf.io.is_jpeg(encoded), jpeg_is_unchanged, not_jpeg)

    def convert() -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(lambda file: _to_bmp(file, exif), [encoded], tf.string), [])

    return tf.cond(unchanged, lambda: encoded, convert)


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG, PNG or BMP file to uint8 [h, w, 3]."""
    as_jpeg = lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
    return tf.cond(tf.io.is_jpeg(encoded), as_jpeg, lambda: _decode_any(encoded))


def decode_and_crop(
    encoded: tf.Tensor, choose: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Decodes a crop of an image, at a lower resolution where the format supports it.

    Args:
      encoded: scalar string, an image file.
      choose: maps the image's size, int32 [2] (height, width), to three tensors: the box to crop, int32 [4]
        (top, left, height, width); how often a JPEG is halved while it is decoded, int32 h in [0, 3], where
        2^h must divide the box; and any further tensor, which is returned.

    Returns:
      The pixels, uint8 [h, w, 3]; the third tensor of `choose`; the full size of the image, int32 [2].
    """
    is_jpeg = tf.io.is_jpeg(encoded)
    pixels = tf.cond(is_jpeg, lambda: tf.zeros([0, 0, 3], tf.uint8), lambda: _decode_any(encoded))
    size = tf.cond(is_jpeg, lambda: tf.io.extract_jpeg_shape(encoded)[:2], lambda: tf.shape(pixels)[:2])
    box, halvings, extra = choose(size)

    def crop_jpeg(factor: int) -> tf.Tensor:
        return tf.io.decode_and_crop_jpeg(
            encoded, box // factor, channels=3, ratio=factor, dct_method="INTEGER_ACCURATE"
        )

    def crop_pixels() -> tf.Tensor:
        return pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]

    branches = [lambda factor=factor: crop_jpeg(factor) for factor in (1, 2, 4, 8)]
    return tf.switch_case(tf.where(is_jpeg, halvings, 4), [*branches, crop_pixels]), extra, size


def check_complete_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    """Returns the encoded image unchanged, or raises an error in the graph if it is a JPEG that ends early.

    The decoder of a crop stops at the end of the crop, so it detects a truncated file for some crops only. A
    JPEG without the end marker as its last two bytes is therefore decoded completely once.
    """
    ended = tf.strings.substr(encoded, -2, 2) == b"\xff\xd9"

    def check() -> tf.Tensor:
        # The result has to depend on the pixels. Otherwise the graph leaves the decoding out.
        return tf.where(tf.size(tf.io.decode_jpeg(encoded, channels=3)) > 0, encoded, "")

    return tf.cond(tf.io.is_jpeg(encoded) & ~ended, check, lambda: encoded)


def _fits(size: tf.Tensor) -> tf.Tensor:
    """Whether an image of this size, integers [2], is small enough to decode."""
    height, width = tf.unstack(tf.cast(size, tf.int64), num=2)
    return (height * width <= MAX_PIXELS) & (tf.maximum(height, width) <= MAX_SIDE)


def _png_size(encoded: tf.Tensor) -> tf.Tensor:
    """The size of a PNG file, int32 [2]."""
    return tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)


def _may_have_exif(encoded: tf.Tensor) -> tf.Tensor:
    """Whether an APP or a comment segment follows the start of a JPEG file and its JFIF header, if any."""
    header = tf.cast(tf.io.decode_raw(tf.strings.substr(encoded, 0, 22), tf.uint8), tf.int32)
    has_jfif = tf.reduce_all(header[3:6] == [0xE0, 0, 16])
    return tf.where(has_jfif, header[21], header[3]) >= 0xE0


def _to_bmp(content: bytes, exif: bool) -> bytes:
    """An uncompressed BMP file of an image; a JPEG that is upright is returned unchanged."""
    if exif and is_upright_jpeg(content):
        return content
    stream = io.BytesIO()
    Image.fromarray(decode_image(content, exif=exif)).save(stream, "BMP")
    return stream.getvalue()


def _decode_any(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image
