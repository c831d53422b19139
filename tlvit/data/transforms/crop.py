"""From an encoded image to the pixels of a batch, with their geometry: for training, evaluation, annotation.

All functions run inside tf.data's graph. The matrices are those of `tlvit.data.transforms.geometry`.
"""

import math
from typing import Literal

import tensorflow as tf

from tlvit.config import Augment
from tlvit.data.transforms import geometry
from tlvit.data.transforms.augment import SEEDS, augment_image
from tlvit.data.transforms.boxes import random_box
from tlvit.data.transforms.decode import decode, decode_and_crop
from tlvit.data.transforms.padded_crop import padded_crop
from tlvit.data.transforms.published_order import crop_last
from tlvit.data.transforms.resize import covering_size, fast_resize, resize, resize_and_center_crop
from tlvit.ops.randaugment_policy import AugmentPolicy

LabelCrop = Literal["aligned", "published", "none"]

# Without augment.antialias, a JPEG is decoded at a half, a quarter or an eighth of its size if the crop is at
# least this many times (twice, four times as many) as large as the result. From this ratio on that is closer
# to Pillow's resize than sampling the full crop: on photographs the mean difference is below 4 gray levels.
SCALED_DECODE = 1.625


def train_image(
    encoded: tf.Tensor,
    seed: tf.Tensor,
    image_size: tuple[int, int],
    augment: Augment,
    *,
    label_crop: LabelCrop = "aligned",
    policy: AugmentPolicy | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Random flip and random crop, then the augmentations at the final size; or, with
    augment.order="published", the crop after RandAugment.

    Args:
      encoded: scalar string, an image file.
      seed: int64 [2]. The same seed gives the same image.
      image_size: (H, W) of the result.
      augment: the settings of the augmentation.
      label_crop: "aligned" returns the matrix of the pixels. "published" returns the one of the published
        targets, in which the two axes of the crop are exchanged. "none" returns the one to the crop itself:
        labels are of the crop. All include RandAugment's transforms.
      policy: RandAugment's policy, or None to skip it.

    Returns:
      The image, uint8 [H, W, 3], and its matrix, float32 [2, 3].
    """
    seeds = tf.random.split(seed, 3 + SEEDS)  # a stream of random numbers for each stage
    if augment.order == "published":
        image, matrix = crop_last(encoded, seeds, image_size, augment, label_crop=label_crop, policy=policy)
        return augment_image(image, seeds[3:], augment, None)[0], matrix
    flipped = tf.random.stateless_uniform([], seeds[0]) < augment.hflip
    if augment.crop == "padded":
        image, crop_matrix = padded_crop(encoded, (seeds[1], seeds[2]), image_size, augment)
        image = tf.cond(flipped, lambda: tf.reverse(image, [1]), lambda: image)
        matrix = geometry.compose(crop_matrix, tf.where(flipped, geometry.flip(), geometry.identity()))
    else:
        transposed = label_crop == "published"
        image, matrix = _resized_crop(encoded, seeds, flipped, image_size, augment, transposed=transposed)
    image, moved = augment_image(image, seeds[3:], augment, policy)
    return image, moved if label_crop == "none" else geometry.compose(matrix, moved)


def _resized_crop(
    encoded: tf.Tensor, seeds: tf.Tensor, flipped: tf.Tensor, image_size: tuple[int, int], augment: Augment,
    *, transposed: bool,
) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
    """The random resized crop of a training image, flipped or not, and its matrix."""

    def choose(size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        box = random_box(seeds[1], size, scale=augment.crop_scale, ratio=augment.crop_ratio)
        box = mirror(box, size)  # the box was drawn in the flipped image
        box, halvings = (box, tf.constant(0)) if augment.antialias else align_box(box, size, image_size)
        return box, halvings, mirror(box, size)

    def mirror(box: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
        left = tf.where(flipped, size[1] - box[1] - box[3], box[1])
        return tf.stack([box[0], left, box[2], box[3]])

    pixels, box, size = decode_and_crop(encoded, choose)
    resize_pixels = resize if augment.antialias else fast_resize
    image = resize_pixels(pixels, image_size, augment.interpolation, seeds[2])
    image = tf.cond(flipped, lambda: tf.reverse(image, [1]), lambda: image)
    unflip = tf.where(flipped, geometry.flip(), geometry.identity())
    return image, geometry.compose(unflip, geometry.crop(box, size, transposed=transposed))


def eval_image(
    encoded: tf.Tensor,
    *,
    image_size: tuple[int, int],
    crop_pct: float,
    interpolation: Literal["bilinear", "bicubic"] = "bicubic",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Resizes to cover image_size / crop_pct, then crops the center.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop.

    Args:
      encoded: scalar string, an image file.
      image_size: (H, W) of the result.
      crop_pct: fraction of the resized image that the crop keeps, in (0, 1].
      interpolation: the kernel of the resize.

    Returns:
      The image, uint8 [H, W, 3], and its matrix, float32 [2, 3].
    """
    height, width = image_size
    pixels = decode(encoded)
    scaled = covering_size(pixels, (math.floor(height / crop_pct), math.floor(width / crop_pct)))
    image, box = resize_and_center_crop(pixels, image_size, scaled, interpolation)
    return image, geometry.crop(box, scaled)


def squashed_image(encoded: tf.Tensor, *, image_size: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Resizes the entire image to (H, W), without regard to its aspect ratio (bicubic, antialiased).

    Returns:
      The image, uint8 [H, W, 3], and its matrix, float32 [2, 3]: the identity.
    """
    return resize(decode(encoded), image_size, "bicubic"), geometry.identity()


def align_box(box: tf.Tensor, size: tf.Tensor, image_size: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Chooses the resolution at which a JPEG is decoded, and aligns the box to its pixels.

    Args:
      box: int32 [4] (top, left, height, width), pixels.
      size: int32 [2] (height, width) of the image, pixels.
      image_size: (H, W) that the crop is resized to.

    Returns:
      The box, int32 [4], moved by at most a few pixels so that it consists of complete pixels of the smaller
      image; and how often the image is halved, int32 in [0, 3].
    """
    area = tf.cast(box[2] * box[3], tf.float32) / (image_size[0] * image_size[1])
    bounds = tf.constant([(SCALED_DECODE * 2**k) ** 2 for k in range(3)])
    fits = tf.reduce_min(size) >= tf.constant([2, 4, 8])
    halvings = tf.reduce_sum(tf.cast((area >= bounds) & fits, tf.int32))
    factor = tf.bitwise.left_shift(1, halvings)
    limit = size // factor
    corner = tf.minimum(box[:2] // factor, limit - 1)
    extent = tf.minimum((box[2:] + factor // 2) // factor, limit - corner)
    return tf.concat([corner, tf.maximum(extent, 1)], 0) * factor, halvings
