"""The augmentations of a training image at its final size, in the order in which they run.

An augmentation is a function of the image and a seed; one that moves pixels also returns its matrix (see
`tlvit.data.transforms.geometry`). To add one, write its setting in `tlvit/config.py` and the function and its
call here.
"""

import tensorflow as tf

from tlvit.config import Augment
from tlvit.data.transforms import geometry
from tlvit.data.transforms.randaugment import rand_augment
from tlvit.data.transforms.three_augment import color_jitter, three_augment
from tlvit.ops.randaugment_policy import AugmentPolicy

SEEDS = 3  # random streams of `augment_image`


def augment_image(
    image: tf.Tensor, seeds: tf.Tensor, settings: Augment, policy: AugmentPolicy | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """3-Augment, color jitter and RandAugment.

    Args:
      image: uint8 [H, W, 3], H and W known.
      seeds: int64 [S, 2], one for each augmentation. A new augmentation takes a new one at the end.
      settings: the settings of the augmentation.
      policy: RandAugment's policy, or None to skip it.

    Returns:
      The image, and the matrix from its points to those of the given image, float32 [2, 3].
    """
    matrix = geometry.identity()
    if settings.three_augment:
        image = three_augment(image, seeds[1])
    if settings.color_jitter:
        image = color_jitter(image, seeds[2], settings.color_jitter)
    if policy is not None:
        image, moved = rand_augment(image, seeds[0], policy, settings.randaugment_interpolation)
        matrix = geometry.compose(matrix, moved)
    return image, matrix
