"""The geometry of image transforms as 2x3 matrices, for NumPy and JAX arrays.

A matrix M maps a point (x, y) of the augmented image to its source, the image before the transform:
p = M @ (x, y, 1). Points of both images are in [0, 1] x [0, 1], x to the right and y down. All matrices are
float32 [..., 2, 3] with any number of batch axes. Functions compute with jax.numpy where an argument is a JAX
array and with NumPy elsewhere. `tlvit.data.transforms.geometry` has the same functions in TensorFlow.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from tlvit.shapes import Float, Float32, Num
from tlvit.types import Array


def compose(
    outer: Float[Array, "*#batch 2 3"], inner: Float[Array, "*#batch 2 3"]
) -> Float32[Array, "... 2 3"]:
    """The matrix of p -> outer(inner(p)). `inner` belongs to the later transform of the image.

    Args:
      outer: float32 [..., 2, 3].
      inner: float32 [..., 2, 3], with batch axes that broadcast with those of `outer`.

    Returns:
      float32 [..., 2, 3].

    Example:
      >>> compose(flip(), translation(0.25, 0.0))  # flips an image, then shifts it
      array([[-1.  ,  0.  ,  0.75],
             [ 0.  ,  1.  ,  0.  ]], dtype=float32)
    """
    xp = _namespace(outer, inner)
    outer, inner = _same_rank(xp.asarray(outer, xp.float32), xp.asarray(inner, xp.float32))
    linear = xp.sum(outer[..., :, :2, None] * inner[..., None, :, :], axis=-2)
    return linear + xp.pad(outer[..., 2:], [(0, 0)] * (outer.ndim - 1) + [(2, 0)])


def identity() -> Float32[np.ndarray, "2 3"]:
    """The matrix of an unchanged image, float32 [2, 3]."""
    return np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], np.float32)


def flip() -> Float32[np.ndarray, "2 3"]:
    """The matrix of a horizontal flip, float32 [2, 3]."""
    return np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], np.float32)


def crop(
    box: Num[Array, "*#batch 4"] | tuple[int, int, int, int],
    size: Num[Array, "*#batch 2"] | tuple[int, int],
    transposed: bool = False,
) -> Float32[Array, "... 2 3"]:
    """The matrix of a crop.

    Args:
      box: [..., 4] (top, left, height, width), pixels.
      size: [..., 2] (height, width) of the image that is cropped, pixels.
      transposed: exchange the two axes of the region: x in [top, top + height] and y in [left, left + width],
        as fractions of the image. The published code crops its label maps in this way.

    Returns:
      float32 [..., 2, 3].
    """
    xp = _namespace(box, size)
    box, size = xp.asarray(box, xp.float32), xp.asarray(size, xp.float32)
    top, left = box[..., 0] / size[..., 0], box[..., 1] / size[..., 1]
    height, width = box[..., 2] / size[..., 0], box[..., 3] / size[..., 1]
    if transposed:
        top, left, height, width = left, top, width, height
    return _matrix(xp, width, 0.0, left, 0.0, height, top)


def rotation(
    angle: Float[Array, "*batch"] | float | np.floating, size: tuple[int, int]
) -> Float32[Array, "*batch 2 3"]:
    """The matrix of a counterclockwise rotation about the center.

    Args:
      angle: [...], radians.
      size: (height, width) of the image, pixels. The rotation is one of pixels, so the matrix depends on the
        image's aspect ratio.

    Returns:
      float32 [..., 2, 3].

    Example:
      >>> import math
      >>> rotation(math.pi / 2, (100, 100)).round(3) + 0.0
      array([[ 0., -1.,  1.],
             [ 1.,  0.,  0.]], dtype=float32)
    """
    xp = _namespace(angle)
    angle = xp.asarray(angle, xp.float32)
    cos, sin = xp.cos(angle), xp.sin(angle)
    x, y = size[1] / 2, size[0] / 2
    pixels = _matrix(xp, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    return from_pixels(pixels, size)


def shear_x(
    factor: Float[Array, "*batch"] | float | np.floating, size: tuple[int, int]
) -> Float32[Array, "*batch 2 3"]:
    """The matrix of a horizontal shear: a point at (x, y) pixels comes from (x + factor * y, y).

    Args:
      factor: [...].
      size: (height, width) of the image, pixels.

    Returns:
      float32 [..., 2, 3].
    """
    return from_pixels(_matrix(_namespace(factor), 1.0, factor, 0.0, 0.0, 1.0, 0.0), size)


def shear_y(
    factor: Float[Array, "*batch"] | float | np.floating, size: tuple[int, int]
) -> Float32[Array, "*batch 2 3"]:
    """The matrix of a vertical shear: a point at (x, y) pixels comes from (x, y + factor * x).

    Args:
      factor: [...].
      size: (height, width) of the image, pixels.

    Returns:
      float32 [..., 2, 3].
    """
    return from_pixels(_matrix(_namespace(factor), 1.0, 0.0, 0.0, factor, 1.0, 0.0), size)


def translation(
    x: Float[Array, "*#batch"] | float | np.floating, y: Float[Array, "*#batch"] | float | np.floating
) -> Float32[Array, "... 2 3"]:
    """The matrix of a translation: a point comes from x further right and y further down.

    Args:
      x: [...], fraction of the width.
      y: [...], fraction of the height.

    Returns:
      float32 [..., 2, 3].
    """
    return _matrix(_namespace(x, y), 1.0, 0.0, x, 0.0, 1.0, y)


def from_pixels(matrix: Float32[Array, "*batch 2 3"], size: tuple[int, int]) -> Float32[Array, "*batch 2 3"]:
    """Converts a matrix between points in pixels to one between points in [0, 1] x [0, 1].

    Args:
      matrix: float32 [..., 2, 3], of an image of `size`.
      size: (height, width), pixels.

    Returns:
      float32 [..., 2, 3].
    """
    height, width = size
    xp = _namespace(matrix)
    units = xp.asarray([[1.0, height / width, 1 / width], [width / height, 1.0, 1 / height]], xp.float32)
    return matrix * units.reshape((1,) * (matrix.ndim - 2) + (2, 3))


def _namespace(*arrays: Array | float | np.floating | tuple[int, ...]) -> ModuleType:
    """jax.numpy if one of the arrays is JAX's, else NumPy."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _same_rank(*arrays: Array) -> list[Array]:
    """The arrays with leading axes of length 1 added, so that all have as many axes."""
    rank = max(array.ndim for array in arrays)
    return [array.reshape((1,) * (rank - array.ndim) + array.shape) for array in arrays]


def _matrix(xp: ModuleType, *values: Array | float | np.floating) -> Array:
    """float32 [..., 2, 3] of six arrays [...], row by row."""
    arrays = _same_rank(*(xp.asarray(value, xp.float32) for value in values))
    stacked = xp.stack(xp.broadcast_arrays(*arrays), axis=-1)
    return stacked.reshape(*stacked.shape[:-1], 2, 3)
