"""Decodes image files inside tf.data: completely, or only a crop of them and at a lower resolution."""

from collections.abc import Callable

import tensorflow as tf


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes JPEG, PNG, BMP, WebP or the first frame of a GIF to uint8 [h, w, 3]."""
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


def _decode_any(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image
