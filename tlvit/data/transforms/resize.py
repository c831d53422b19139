"""Resizes images inside tf.data: with antialiasing as Pillow does, or faster and close to it."""

from collections.abc import Callable
from typing import Literal

import tensorflow as tf

Interpolation = Literal["bilinear", "bicubic", "random"]

# `fast_resize` uses the bilinear kernel above this ratio of the sizes, even for "bicubic": without
# antialiasing it is closer to both of Pillow's kernels there.
BILINEAR_ABOVE = 1.2


def resize(
    pixels: tf.Tensor,
    image_size: tuple[int, int],
    interpolation: Interpolation,
    seed: tf.Tensor | None = None,
) -> tf.Tensor:
    """Resizes with antialiasing.

    Args:
      pixels: uint8 [h, w, 3].
      image_size: (H, W) of the result.
      interpolation: the kernel; "random" draws one of the two.
      seed: int64 [2], for "random".

    Returns:
      uint8 [H, W, 3].
    """
    if interpolation == "random":
        image = tf.cond(
            tf.random.stateless_uniform([], seed) < 0.5,
            lambda: tf.image.resize(pixels, image_size, "bilinear", antialias=True),
            lambda: tf.image.resize(pixels, image_size, "bicubic", antialias=True),
        )
    else:
        image = tf.image.resize(pixels, image_size, interpolation, antialias=True)
    return _round_to_uint8(image, image_size)


def fast_resize(
    pixels: tf.Tensor,
    image_size: tuple[int, int],
    interpolation: Interpolation,
    seed: tf.Tensor | None = None,
) -> tf.Tensor:
    """Resizes without antialiasing if the image is at most twice as large as the result, else as `resize`.

    The arguments are those of `resize`.
    """
    size = tf.cast(tf.shape(pixels)[:2], tf.float32)
    zoom = tf.sqrt(size[0] * size[1] / (image_size[0] * image_size[1]))
    if interpolation == "random":
        bicubic = tf.random.stateless_uniform([], seed) >= 0.5
    else:
        bicubic = tf.constant(interpolation == "bicubic")

    def sampled(sample: Callable[..., tf.Tensor]) -> tf.Tensor:
        image = sample(images=pixels[None], size=image_size, half_pixel_centers=True)[0]
        return tf.cast(tf.clip_by_value(image + 0.5, 0.0, 255.0), tf.uint8)

    branches = [
        lambda: sampled(tf.raw_ops.ResizeBilinear),
        lambda: sampled(tf.raw_ops.ResizeBicubic),
        lambda: resize(pixels, image_size, "bilinear"),
        lambda: resize(pixels, image_size, "bicubic"),
    ]
    without_antialias = tf.where(bicubic & (zoom < BILINEAR_ABOVE), 1, 0)
    image = tf.switch_case(tf.where(zoom > 2, tf.where(bicubic, 3, 2), without_antialias), branches)
    image.set_shape([*image_size, 3])
    return image


def covering_size(pixels: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    """The size, float32 [2] (height, width), at which an image covers `image_size` with its aspect ratio.

    The axis that needs the larger zoom gets its length exactly. The other one follows, rounded down, as in
    torchvision's Resize.

    Args:
      pixels: uint8 [h, w, 3].
      image_size: (height, width), pixels.
    """
    size = tf.cast(tf.shape(pixels)[:2], tf.float32)
    target = tf.constant(image_size, tf.float32)
    zoom = target / size
    return tf.where(zoom >= tf.reduce_max(zoom), target, tf.floor(tf.reduce_max(zoom) * size + 1e-4))


def resize_and_center_crop(
    pixels: tf.Tensor,
    image_size: tuple[int, int],
    scaled: tf.Tensor,
    interpolation: Literal["bilinear", "bicubic"],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Resizes to `scaled`, float32 [2] (height, width), with antialiasing, and crops the center.

    Returns:
      The image, uint8 [H, W, 3], and the box of the crop, float32 [4] (top, left, height, width), pixels of
      the resized image. The corner is rounded as in torchvision's CenterCrop.
    """
    height, width = image_size
    corner = tf.round((scaled - [height, width]) / 2)
    image = tf.raw_ops.ScaleAndTranslate(
        images=pixels[None],
        size=[height, width],
        scale=scaled / tf.cast(tf.shape(pixels)[:2], tf.float32),
        translation=-corner,
        kernel_type={"bicubic": "keyscubic", "bilinear": "triangle"}[interpolation],
        antialias=True,
    )[0]
    return _round_to_uint8(image, image_size), tf.concat([corner, [height, width]], 0)


def _round_to_uint8(image: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    """Rounds and clips to uint8 [H, W, 3]."""
    image = tf.saturate_cast(tf.round(image), tf.uint8)
    image.set_shape([*image_size, 3])
    return image
