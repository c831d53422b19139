"""The geometry of image transforms as 2x3 matrices in TensorFlow: the twin of `tlvit.ops.geometry`.

A matrix M maps a point (x, y) of the transformed image to the image before the transform: p = M @ (x, y, 1).
Points of both images are in [0, 1] x [0, 1], x to the right and y down. All matrices are float32 [2, 3].
"""

import tensorflow as tf


def size_of(image: tf.Tensor) -> tuple[int | tf.Tensor, int | tf.Tensor]:
    """(height, width) of an image [H, W, C]: numbers where they are known, else int32 scalars."""
    known, shape = image.shape, tf.shape(image)
    height, width = (shape[axis] if known[axis] is None else known[axis] for axis in (0, 1))
    return height, width


def as_floats(size: tuple[int | tf.Tensor, int | tf.Tensor]) -> tuple[float | tf.Tensor, float | tf.Tensor]:
    """The size for arithmetic with coordinates: numbers stay, tensors become float32."""
    height, width = (tf.cast(n, tf.float32) if isinstance(n, tf.Tensor) else n for n in size)
    return height, width


def compose(outer: tf.Tensor, inner: tf.Tensor) -> tf.Tensor:
    """The matrix of p -> outer(inner(p)). `inner` belongs to the later transform."""
    return tf.matmul(outer, tf.concat([inner, [[0.0, 0.0, 1.0]]], 0))


def identity() -> tf.Tensor:
    """The matrix of an unchanged image."""
    return tf.constant([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def flip() -> tf.Tensor:
    """The matrix of a horizontal flip."""
    return tf.constant([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


def crop(box: tf.Tensor, size: tf.Tensor, transposed: bool = False) -> tf.Tensor:
    """The matrix of a crop.

    Args:
      box: [4] (top, left, height, width), pixels.
      size: [2] (height, width) of the image that is cropped, pixels.
      transposed: exchange the two axes of the region: x in [top, top + height] and y in [left, left + width],
        as fractions of the image. The published code crops its label maps so.
    """
    size = tf.cast(size, tf.float32)
    top, left, height, width = tf.unstack(tf.cast(box, tf.float32) / tf.concat([size, size], 0))
    if transposed:
        top, left, height, width = left, top, width, height
    return _matrix(width, 0.0, left, 0.0, height, top)


def rotation(angle: tf.Tensor, size: tuple[float | tf.Tensor, float | tf.Tensor]) -> tf.Tensor:
    """The matrix of a counterclockwise rotation about the center.

    Args:
      angle: scalar, radians.
      size: (height, width) of the image, pixels.
    """
    return from_pixels(pixel_rotation(angle, size), size)


def shear_x(factor: tf.Tensor, size: tuple[float | tf.Tensor, float | tf.Tensor]) -> tf.Tensor:
    """The matrix of a horizontal shear: a point at (x, y) pixels comes from (x + factor * y, y)."""
    return from_pixels(pixel_shear_x(factor), size)


def shear_y(factor: tf.Tensor, size: tuple[float | tf.Tensor, float | tf.Tensor]) -> tf.Tensor:
    """The matrix of a vertical shear: a point at (x, y) pixels comes from (x, y + factor * x)."""
    return from_pixels(pixel_shear_y(factor), size)


def translation(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """The matrix of a translation: a point comes from x further right and y further down, as fractions."""
    return _matrix(1.0, 0.0, x, 0.0, 1.0, y)


def pixel_rotation(angle: tf.Tensor, size: tuple[float | tf.Tensor, float | tf.Tensor]) -> tf.Tensor:
    """`rotation` between points in pixels, for sampling."""
    x, y = size[1] / 2, size[0] / 2
    cos, sin = tf.cos(angle), tf.sin(angle)
    return _matrix(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def pixel_shear_x(factor: tf.Tensor) -> tf.Tensor:
    """`shear_x` between points in pixels, for sampling."""
    return _matrix(1.0, factor, 0.0, 0.0, 1.0, 0.0)


def pixel_shear_y(factor: tf.Tensor) -> tf.Tensor:
    """`shear_y` between points in pixels, for sampling."""
    return _matrix(1.0, 0.0, 0.0, factor, 1.0, 0.0)


def from_pixels(matrix: tf.Tensor, size: tuple[float | tf.Tensor, float | tf.Tensor]) -> tf.Tensor:
    """Converts a matrix between points in pixels, of an image of `size`, to one between points in [0, 1]."""
    height, width = size
    (a, b, c), (d, e, f) = (tf.unstack(row) for row in tf.unstack(matrix))
    return _matrix(a, b * (height / width), c / width, d * (width / height), e, f / height)


def _matrix(*values: tf.Tensor | float) -> tf.Tensor:
    """float32 [2, 3] of six scalars, row by row."""
    return tf.reshape(tf.stack([tf.cast(value, tf.float32) for value in values]), [2, 3])
