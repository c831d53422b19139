"""The random crop of a resized and padded image, for small images and for fine-tuning."""

import tensorflow as tf

from tlvit.config import Augment
from tlvit.data.transforms import geometry
from tlvit.data.transforms.decode import decode
from tlvit.data.transforms.resize import covering_size


def padded_crop(
    encoded: tf.Tensor, seeds: tuple[tf.Tensor, tf.Tensor], image_size: tuple[int, int], augment: Augment
) -> tuple[tf.Tensor, tf.Tensor]:
    """Resizes an image so that it covers (H, W), pads all sides and takes a random crop of (H, W).

    These are torchvision's Resize and RandomCrop(padding=…), of which T2T-ViT's transfer to CIFAR (224 pixels
    padded by 28, black) and DeiT III's simple random crop (padded by 4, mirrored) consist.

    Args:
      encoded: scalar string, an image file.
      seeds: two of int64 [2], of the box and of the interpolation.
      image_size: (H, W) of the result.
      augment: uses crop_padding, padding_mode and interpolation.

    Returns:
      The image, uint8 [H, W, 3], and the matrix from its points to those of the file, float32 [2, 3]. The
      points of black and of mirrored pixels are outside of [0, 1].
    """
    pixels = decode(encoded)
    scaled = covering_size(pixels, image_size)
    size, padding = tf.cast(scaled, tf.int32), augment.crop_padding
    kernels = ("bilinear", "bicubic") if augment.interpolation == "random" else (augment.interpolation,)
    branches = [
        lambda kernel=kernel: tf.image.resize(pixels, size, kernel, antialias=True) for kernel in kernels
    ]
    chosen = tf.random.stateless_uniform([], seeds[1], maxval=len(kernels), dtype=tf.int32)
    image = tf.saturate_cast(tf.round(tf.switch_case(chosen, branches)), tf.uint8)
    room = size - image_size + 2 * padding  # pixels by which the crop may move
    drawn = tf.random.stateless_uniform([2], seeds[0])
    corner = tf.minimum(tf.cast(drawn * tf.cast(room + 1, tf.float32), tf.int32), room)
    image = tf.pad(image, [[padding, padding]] * 2 + [[0, 0]], augment.padding_mode.upper())
    image = tf.slice(image, tf.concat([corner, [0]], 0), [*image_size, 3])
    box = tf.concat([corner - padding, image_size], 0)
    return image, geometry.crop(box, scaled)
