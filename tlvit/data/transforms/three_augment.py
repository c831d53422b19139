"""3-Augment of DeiT III and color jitter, on one image inside tf.data.

Both take an image, uint8 [H, W, 3] with H and W known, and return one of the same shape. The same seed, int64
[2], gives the same image.
"""

import tensorflow as tf

from tlvit.data.transforms.photometric import (
    brightness,
    color,
    contrast,
    gaussian_blur,
    grayscale,
    solarize,
)


def three_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Applies grayscale, solarize or a Gaussian blur (radius in [0.1, 2] pixels), each with probability 1/3.

    3-Augment of DeiT III (Touvron et al. 2022, arXiv:2204.07118) without its color jitter.
    """
    drawn = tf.random.stateless_uniform([2], seed)
    shape = image.shape
    branches = [
        lambda: grayscale(image),
        lambda: solarize(image, 128),
        lambda: gaussian_blur(image, 0.1 + 1.9 * drawn[1]),
    ]
    image = tf.switch_case(tf.minimum(tf.cast(drawn[0] * 3, tf.int32), 2), branches)
    image.set_shape(shape)
    return image


def color_jitter(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    """Changes brightness, contrast and saturation in random order.

    The factors are uniform in [max(0, 1 - strength), 1 + strength], as in torchvision's ColorJitter.
    """
    seeds = tf.random.split(seed, 2)
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    factors = tf.random.stateless_uniform([3], seeds[0], low, high)
    order = tf.random.experimental.stateless_shuffle(tf.range(3), seeds[1])
    shape = image.shape
    for turn in range(3):
        branches = [
            lambda image=image: brightness(image, factors[0]),
            lambda image=image: contrast(image, factors[1]),
            lambda image=image: color(image, factors[2]),
        ]
        image = tf.switch_case(order[turn], branches)
    image.set_shape(shape)
    return image
