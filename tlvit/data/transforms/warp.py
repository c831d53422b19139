"""Rotation, shear and translation of an image at its own size, each with its matrix.

All functions run inside tf.data's graph on one image, uint8 [H, W, 3]. They return the image, uint8
[H, W, 3], and its matrix, float32 [2, 3] (see `tlvit.data.transforms.geometry`). Pixels from outside of the
image get the mean color of ImageNet. Rotation and shear interpolate bilinearly, or with Pillow's bicubic
kernel if `bicubic` is true, which may be a tensor. Translations are by a whole number of pixels and need no
interpolation.
"""

import math

import tensorflow as tf

from tlvit.data.transforms import geometry
from tlvit.data.transforms.geometry import as_floats, size_of
from tlvit.ops.randaugment_policy import FILL

Flag = bool | tf.Tensor


def rotate(image: tf.Tensor, degrees: tf.Tensor, bicubic: Flag = False) -> tuple[tf.Tensor, tf.Tensor]:
    """Rotates counterclockwise about the center."""
    size = as_floats(size_of(image))
    return _warp(image, geometry.pixel_rotation(degrees * (math.pi / 180), size), bicubic)


def shear_x(image: tf.Tensor, factor: tf.Tensor, bicubic: Flag = False) -> tuple[tf.Tensor, tf.Tensor]:
    """Shears horizontally: a pixel comes from `factor` times its y further right."""
    return _warp(image, geometry.pixel_shear_x(factor), bicubic)


def shear_y(image: tf.Tensor, factor: tf.Tensor, bicubic: Flag = False) -> tuple[tf.Tensor, tf.Tensor]:
    """Shears vertically: a pixel comes from `factor` times its x further down."""
    return _warp(image, geometry.pixel_shear_y(factor), bicubic)


def translate_x(image: tf.Tensor, fraction: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Translates horizontally: a pixel comes from `fraction` of the width further right, in whole pixels."""
    width, (_, columns) = size_of(image)[1], as_floats(size_of(image))
    pixels = tf.cast(tf.round(fraction * columns), tf.int32)
    fill = _fill_image(image)
    kept = image[:, tf.maximum(pixels, 0) : width + tf.minimum(pixels, 0)]
    moved = tf.concat([fill[:, : tf.maximum(-pixels, 0)], kept, fill[:, : tf.maximum(pixels, 0)]], 1)
    return moved, geometry.translation(tf.cast(pixels, tf.float32) / columns, 0.0)


def translate_y(image: tf.Tensor, fraction: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Translates vertically: a pixel comes from `fraction` of the height further down, in whole pixels."""
    height, (rows, _) = size_of(image)[0], as_floats(size_of(image))
    pixels = tf.cast(tf.round(fraction * rows), tf.int32)
    fill = _fill_image(image)
    kept = image[tf.maximum(pixels, 0) : height + tf.minimum(pixels, 0)]
    moved = tf.concat([fill[: tf.maximum(-pixels, 0)], kept, fill[: tf.maximum(pixels, 0)]], 0)
    return moved, geometry.translation(0.0, tf.cast(pixels, tf.float32) / rows)


def _warp(image: tf.Tensor, matrix: tf.Tensor, bicubic: Flag) -> tuple[tf.Tensor, tf.Tensor]:
    """Samples the image where `matrix`, between points in pixels, maps the centers of the pixels."""
    if isinstance(bicubic, bool):
        moved = (_sample_bicubic if bicubic else _sample_bilinear)(image, matrix)
    else:
        moved = tf.cond(
            bicubic, lambda: _sample_bicubic(image, matrix), lambda: _sample_bilinear(image, matrix)
        )
    moved.set_shape(image.shape)
    return moved, geometry.from_pixels(matrix, as_floats(size_of(image)))


def _sample_bilinear(image: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    height, width = size_of(image)
    (a, b, c), (d, e, f) = (tf.unstack(row) for row in tf.unstack(matrix))
    # The center of the first pixel is (0.5, 0.5) in the matrix and (0, 0) in TensorFlow.
    shifted = lambda p, q, r: r + 0.5 * (p + q) - 0.5
    fill = tf.tile(tf.constant(FILL, tf.float32), [width])
    pixels = tf.cast(tf.reshape(image, [height, width * 3]), tf.float32)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.reshape(pixels - fill, [1, height, width, 3]),
        transforms=tf.stack([a, b, shifted(a, b, c), d, e, shifted(d, e, f), 0.0, 0.0])[None],
        output_shape=tf.stack([height, width]),
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    moved = tf.reshape(moved, [height, width * 3]) + (fill + 0.5)
    moved = tf.cast(tf.clip_by_value(moved, 0.0, 255.0), tf.uint8)
    return tf.reshape(moved, tf.shape(image))


def _sample_bicubic(image: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """As Pillow: 4x4 pixels with cubic weights, repeated at the border, and truncated to whole numbers."""
    height, width = size_of(image)
    rows, columns = as_floats((height, width))
    (a, b, c), (d, e, f) = (tf.unstack(row) for row in tf.unstack(matrix))
    y, x = tf.meshgrid(tf.range(height), tf.range(width), indexing="ij")
    y, x = (tf.reshape(tf.cast(axis, tf.float32) + 0.5, [-1]) for axis in (y, x))
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < columns) & (from_y >= 0) & (from_y < rows)

    first_x, weights_x = _cubic(from_x, columns)
    first_y, weights_y = _cubic(from_y, rows)
    padded = tf.concat([image[:, :1]] * 2 + [image] + [image[:, -1:]] * 2, 1)
    # Four pixels of a row are adjacent, so that they are gathered at once.
    windows = tf.reshape(tf.concat([padded[:, i : i + width + 1] for i in range(4)], 2), [-1, 12])
    repeated = tf.stack([weight for weight in weights_x for _ in range(3)], 1)
    total = tf.zeros(tf.shape(repeated))
    for offset, weight in enumerate(weights_y, start=-1):
        row = tf.clip_by_value(first_y + offset, 0, height - 1)
        part = tf.gather(windows, row * (width + 1) + first_x + 1)
        total += tf.cast(part, tf.float32) * (repeated * weight[:, None])
    total = total[:, :3] + total[:, 3:6] + total[:, 6:9] + total[:, 9:]
    moved = tf.cast(tf.clip_by_value(total + 1e-3, 0.0, 255.0), tf.uint8)
    moved = tf.where(inside[:, None], moved, tf.constant(FILL, tf.uint8))
    return tf.reshape(moved, tf.shape(image))


def _cubic(position: tf.Tensor, size: float | tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """The pixels around points along one axis of an image.

    Args:
      position: float32 [N], of the points, pixels.
      size: of the axis, pixels. Points outside of the image are moved to its border.

    Returns:
      int32 [N], the index i of the last pixel whose center is not behind the point; and the weights of the
      pixels i - 1 to i + 2, float32 [N] each: the cubic kernel with a = -1 (Keys 1981).
    """
    position = tf.clip_by_value(position - 0.5, -0.5, size - 0.5)
    first = tf.floor(position)
    t = position - first
    s = 1 - t
    weights = [-t * s * s, 1 - t * t * (2 - t), 1 - s * s * (2 - s), -s * t * t]
    return tf.cast(first, tf.int32), weights


def _fill_image(image: tf.Tensor) -> tf.Tensor:
    return tf.broadcast_to(tf.constant(FILL, tf.uint8), tf.shape(image))
