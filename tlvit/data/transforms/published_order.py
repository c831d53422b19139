"""The order of the published token-labeling code: flip, RandAugment on the whole image, random crop last."""

from typing import Literal

import tensorflow as tf

from tlvit.config import Augment
from tlvit.data.transforms import geometry
from tlvit.data.transforms.boxes import random_box
from tlvit.data.transforms.decode import decode
from tlvit.data.transforms.randaugment import rand_augment
from tlvit.data.transforms.resize import fast_resize, resize
from tlvit.ops.randaugment_policy import AugmentPolicy


def crop_last(
    encoded: tf.Tensor,
    seeds: tf.Tensor,
    image_size: tuple[int, int],
    augment: Augment,
    *,
    label_crop: Literal["aligned", "published", "none"],
    policy: AugmentPolicy | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Flips the whole image, applies RandAugment to it, and takes the random resized crop of the result.

    The order differs from `train_image` in what the crop shows: translations are fractions of the whole
    image, and a crop can lie in the area that a rotation, shear or translation has filled.

    Args:
      encoded: scalar string, an image file.
      seeds: int64 [4, 2], of the flip, the box, the interpolation and RandAugment.
      image_size: (H, W) of the result.
      augment: uses hflip, crop_scale, crop_ratio, interpolation, antialias and randaugment_interpolation.
      label_crop: as of `train_image`. "published" exchanges the axes of the crop in the flipped and augmented
        image. "none" leaves out the flip only: points outside of [0, 1] are filled.
      policy: RandAugment's policy, or None to skip it.

    Returns:
      The image, uint8 [H, W, 3], and its matrix, float32 [2, 3].
    """
    pixels = decode(encoded)
    flipped = tf.random.stateless_uniform([], seeds[0]) < augment.hflip
    image = tf.cond(flipped, lambda: tf.reverse(pixels, [1]), lambda: pixels)
    matrix = tf.where(flipped & (label_crop != "none"), geometry.flip(), geometry.identity())
    if policy is not None:
        image, moved = rand_augment(image, seeds[3], policy, augment.randaugment_interpolation)
        matrix = geometry.compose(matrix, moved)
    size = tf.shape(image)[:2]
    box = random_box(seeds[1], size, scale=augment.crop_scale, ratio=augment.crop_ratio)
    pixels = image[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    resize_pixels = resize if augment.antialias else fast_resize
    image = resize_pixels(pixels, image_size, augment.interpolation, seeds[2])
    crop = geometry.crop(box, size, transposed=label_crop == "published")
    return image, geometry.compose(matrix, crop)
