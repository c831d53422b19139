"""RandAugment on the host: draws operations for one image inside tf.data and applies them.

The operations, their ranges and the policy are in `tlvit.ops.randaugment_policy` (Cubuk et al. 2019,
arXiv:1909.13719). `tlvit.ops.randaugment` is the version for the device.
"""

from typing import Literal

import tensorflow as tf

from tlvit.data.transforms import geometry, photometric, warp
from tlvit.ops import randaugment_policy as policies
from tlvit.ops.randaugment_policy import OPS, AugmentPolicy


def rand_augment(
    image: tf.Tensor,
    seed: tf.Tensor,
    policy: AugmentPolicy,
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws `policy.layers` operations and applies each of them with probability `policy.probability`.

    Args:
      image: uint8 [H, W, 3].
      seed: int64 [2]. The same seed gives the same image.
      policy: the policy, from `parse_policy`.
      interpolation: of rotations and shears; "random" draws one of the two for each operation, as timm does.

    Returns:
      The image, uint8 [H, W, 3], and its matrix, float32 [2, 3] (see `tlvit.data.transforms.geometry`).
    """
    seeds = tf.random.split(seed, 2)
    drawn = tf.random.stateless_uniform([policy.layers, 3], seeds[0])
    noise = tf.random.stateless_normal([policy.layers], seeds[1])
    levels = tf.clip_by_value(policy.magnitude + policy.noise * noise, 0.0, policies.MAX_MAGNITUDE)
    levels = levels / policies.MAX_MAGNITUDE
    signs = tf.where(drawn[:, 0] < 0.5, -1.0, 1.0)
    ops = tf.minimum(tf.cast(drawn[:, 1] * len(OPS), tf.int32), len(OPS) - 1)
    ops = tf.where(drawn[:, 2] < policy.probability, ops, len(OPS))
    options = [{}] * policy.layers
    if interpolation != "bilinear":
        third = tf.random.stateless_uniform([policy.layers], tf.random.fold_in(seed, 2))
        options = [{"bicubic": interpolation == "bicubic" or draw < 0.5} for draw in tf.unstack(third)]
    matrix = geometry.identity()
    for layer in range(policy.layers):
        image, moved = apply_op(image, ops[layer], levels[layer], signs[layer], **options[layer])
        matrix = geometry.compose(matrix, moved) if layer else moved
    return image, matrix


def apply_op(
    image: tf.Tensor, op: tf.Tensor, level: tf.Tensor, sign: tf.Tensor, bicubic: bool | tf.Tensor = False
) -> tuple[tf.Tensor, tf.Tensor]:
    """Applies one operation.

    Args:
      image: uint8 [H, W, 3].
      op: int32 scalar, index into `randaugment_policy.OPS`; len(OPS) applies none.
      level: scalar, magnitude / 10, in [0, 1].
      sign: scalar, -1 or 1: the direction of an operation that has two.
      bicubic: interpolation of rotations and shears; else bilinear.

    Returns:
      The image, uint8 [H, W, 3], and its matrix, float32 [2, 3].
    """
    amount = sign * level
    factor = tf.maximum(policies.MIN_ENHANCE, 1.0 + amount * policies.ENHANCE)
    count = lambda most: tf.cast(level * most, tf.int32)
    bits = lambda: policies.POSTERIZE_BITS - count(policies.POSTERIZE_BITS)
    threshold = lambda: policies.SOLARIZE - count(policies.SOLARIZE)
    colors = {
        "AutoContrast": lambda: photometric.autocontrast(image),
        "Equalize": lambda: photometric.equalize(image),
        "Invert": lambda: photometric.invert(image),
        "PosterizeIncreasing": lambda: photometric.posterize(image, bits()),
        "SolarizeIncreasing": lambda: photometric.solarize(image, threshold()),
        "SolarizeAdd": lambda: photometric.solarize_add(image, count(policies.SOLARIZE_ADD)),
        "ColorIncreasing": lambda: photometric.color(image, factor),
        "ContrastIncreasing": lambda: photometric.contrast(image, factor),
        "BrightnessIncreasing": lambda: photometric.brightness(image, factor),
        "SharpnessIncreasing": lambda: photometric.sharpness(image, factor),
    }
    moves = {
        "Rotate": lambda: warp.rotate(image, amount * policies.ROTATE_DEGREES, bicubic),
        "ShearX": lambda: warp.shear_x(image, amount * policies.SHEAR, bicubic),
        "ShearY": lambda: warp.shear_y(image, amount * policies.SHEAR, bicubic),
        "TranslateXRel": lambda: warp.translate_x(image, amount * policies.TRANSLATE),
        "TranslateYRel": lambda: warp.translate_y(image, amount * policies.TRANSLATE),
    }
    in_place = lambda change: lambda: (change(), geometry.identity())
    branches = moves | {name: in_place(change) for name, change in colors.items()}
    shape = image.shape
    none = in_place(lambda: image)
    image, matrix = tf.switch_case(op, [*(branches[name] for name in OPS), none])
    image.set_shape(shape)
    matrix.set_shape([2, 3])
    return image, matrix
