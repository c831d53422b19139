"""Decodes the annotations of segmentation inside tf.data: the class of every pixel."""

import tensorflow as tf

from tlvit.config import Segmentation
from tlvit.data.transforms.decode import PNG_SIGNATURE
from tlvit.images import decode_annotation as decode_with_pillow
from tlvit.types import IGNORE


def decode_annotation(encoded: tf.Tensor) -> tf.Tensor:
    """The index of every pixel, int32 [h, w].

    TensorFlow decodes PNG files of 8 bits, gray or RGB. It spreads the values of fewer bits over 0..255 and
    shows the colors of a palette, so Pillow decodes all other files (see `tlvit.images.decode_annotation`).

    Args:
      encoded: scalar string, an image file.
    """
    header = tf.io.decode_raw(tf.strings.substr(encoded, 24, 2), tf.uint8)  # bit depth and color type
    is_png = (tf.strings.substr(encoded, 0, 8) == PNG_SIGNATURE) & (tf.strings.length(encoded) > 26)
    gray = lambda: tf.reduce_all(header == [8, 0])
    rgb = lambda: tf.reduce_all(header == [8, 2])
    is_gray, is_rgb = (tf.cond(is_png, test, lambda: tf.constant(False)) for test in (gray, rgb))

    def by_pillow() -> tf.Tensor:
        indices = tf.numpy_function(decode_with_pillow, [encoded], tf.uint16)
        return tf.cast(tf.ensure_shape(indices, [None, None]), tf.int32)

    def by_tensorflow(channels: int) -> tf.Tensor:
        return tf.cast(tf.io.decode_png(encoded, channels=channels)[:, :, 0], tf.int32)

    return tf.cond(
        is_gray, lambda: by_tensorflow(1), lambda: tf.cond(is_rgb, lambda: by_tensorflow(3), by_pillow)
    )


def to_classes(
    indices: tf.Tensor, settings: Segmentation, num_classes: int, key: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The class of every pixel, and a message if an index is no class.

    Args:
      indices: int32 [h, w], as in the annotation.
      settings: ignore and reduce_zero_label are used.
      num_classes: number of classes.
      key: of the image, for the message.

    Returns:
      The classes, uint8 [h, w], IGNORE for pixels that do not count; and the message, scalar string, empty if
      all indices are classes.
    """
    ignored = indices == settings.ignore
    first = 1 if settings.reduce_zero_label else 0
    ignored |= indices < first
    largest = tf.reduce_max(tf.where(ignored, 0, indices))
    last = num_classes - 1 + first
    message = ["the annotation of", key, "has the index", tf.as_string(largest), f"but with {num_classes}"]
    message += [f"classes the last one is {last} (config.segmentation.num_classes, reduce_zero_label)"]
    problem = tf.where(largest <= last, "", tf.strings.join(message, " "))
    return tf.cast(tf.where(ignored, IGNORE, indices - first), tf.uint8), problem


def size_problem(pixels: tf.Tensor, classes: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """A message, scalar string: empty if the annotation has the size of its image."""
    image, annotation = tf.shape(pixels)[:2], tf.shape(classes)
    sizes = [tf.strings.format("{}", size) for size in (image, annotation)]
    message = ["the image", key, "has", sizes[0], "pixels (height, width), but its annotation", sizes[1]]
    return tf.where(tf.reduce_all(image == annotation), "", tf.strings.join(message, " "))
