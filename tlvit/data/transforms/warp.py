"""Rotation, shear and translation of an image at its own size, each with its matrix.

All functions run inside tf.data's graph on one image, uint8 [H, W, 3] with H and W known. They return the
image, uint8 [H, W, 3], and its matrix, float32 [2, 3] (see `tlvit.data.transforms.geometry`). Pixels from
outside of the image get the mean color of ImageNet. Rotation and shear interpolate bilinearly: TensorFlow has
no bicubic transform, and one written in its operations would take longer than decoding. (The published recipe
draws bilinear or bicubic.) Translations are by a whole number of pixels and need no interpolation.
"""

import math

import tensorflow as tf

from tlvit.data.transforms import geometry
from tlvit.ops.randaugment_policy import FILL


def rotate(image: tf.Tensor, degrees: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rotates counterclockwise about the center."""
    size = _size(image)
    return _warp(image, geometry.pixel_rotation(degrees * (math.pi / 180), size))


def shear_x(image: tf.Tensor, factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Shears horizontally: a pixel comes from `factor` times its y further right."""
    return _warp(image, geometry.pixel_shear_x(factor))


def shear_y(image: tf.Tensor, factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Shears vertically: a pixel comes from `factor` times its x further down."""
    return _warp(image, geometry.pixel_shear_y(factor))


def translate_x(image: tf.Tensor, fraction: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Translates horizontally: a pixel comes from `fraction` of the width further right, in whole pixels."""
    width = image.shape[1]
    pixels = tf.cast(tf.round(fraction * width), tf.int32)
    fill = _fill_image(image)
    kept = image[:, tf.maximum(pixels, 0) : width + tf.minimum(pixels, 0)]
    moved = tf.concat([fill[:, : tf.maximum(-pixels, 0)], kept, fill[:, : tf.maximum(pixels, 0)]], 1)
    return moved, geometry.translation(tf.cast(pixels, tf.float32) / width, 0.0)


def translate_y(image: tf.Tensor, fraction: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Translates vertically: a pixel comes from `fraction` of the height further down, in whole pixels."""
    height = image.shape[0]
    pixels = tf.cast(tf.round(fraction * height), tf.int32)
    fill = _fill_image(image)
    kept = image[tf.maximum(pixels, 0) : height + tf.minimum(pixels, 0)]
    moved = tf.concat([fill[: tf.maximum(-pixels, 0)], kept, fill[: tf.maximum(pixels, 0)]], 0)
    return moved, geometry.translation(0.0, tf.cast(pixels, tf.float32) / height)


def _warp(image: tf.Tensor, matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Samples the image where `matrix`, between points in pixels, maps the centers of the pixels."""
    height, width = _size(image)
    (a, b, c), (d, e, f) = (tf.unstack(row) for row in tf.unstack(matrix))
    # The center of the first pixel is (0.5, 0.5) in the matrix and (0, 0) in TensorFlow.
    shifted = lambda p, q, r: r + 0.5 * (p + q) - 0.5
    fill = tf.constant(FILL * width, tf.float32)
    pixels = tf.cast(tf.reshape(image, [height, width * 3]), tf.float32)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.reshape(pixels - fill, [1, height, width, 3]),
        transforms=tf.stack([a, b, shifted(a, b, c), d, e, shifted(d, e, f), 0.0, 0.0])[None],
        output_shape=[height, width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    moved = tf.reshape(moved, [height, width * 3]) + (fill + 0.5)
    moved = tf.cast(tf.clip_by_value(moved, 0.0, 255.0), tf.uint8)
    return tf.reshape(moved, image.shape), geometry.from_pixels(matrix, (height, width))


def _size(image: tf.Tensor) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _fill_image(image: tf.Tensor) -> tf.Tensor:
    return tf.broadcast_to(tf.constant(FILL, tf.uint8), image.shape)
