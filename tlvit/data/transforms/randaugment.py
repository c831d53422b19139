"""RandAugment, color jitter and 3-Augment on the host: uint8 images in and out, with each move's matrix.

All functions run inside tf.data's graph on one image, uint8 [H, W, 3], H and W known, and depend on their
seed only. Photometric operations have Pillow's arithmetic, truncation included. Geometric ones sample
bilinearly: the transform of TensorFlow's core has no bicubic mode, and one of our own would cost more than
the decoding (the published recipe draws bilinear or bicubic); translations are by whole pixels, without
sampling. Each matrix maps a point of the result to the image before it, both in [0, 1] x [0, 1] (see
`transforms`).
"""

import math

import tensorflow as tf

from tlvit.ops import randaugment_policy as policies
from tlvit.ops.randaugment_policy import FILL, OPS, AugmentPolicy

GRAY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's weights of red, green and blue


def rand_augment(image: tf.Tensor, seed: tf.Tensor, policy: AugmentPolicy) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw `policy.layers` operations and apply each with its probability.

    Args:
      image: uint8 [H, W, 3].
      seed: int64 [2].
      policy: see `augment_policy.parse_policy`.

    Returns:
      image uint8 [H, W, 3] and the matrix float32 [2, 3] from its points to the given image's.
    """
    seeds = tf.random.split(seed, 2)
    drawn = tf.random.stateless_uniform([policy.layers, 3], seeds[0])
    noise = tf.random.stateless_normal([policy.layers], seeds[1])
    levels = tf.clip_by_value(policy.magnitude + policy.noise * noise, 0.0, policies.MAX_MAGNITUDE)
    levels = levels / policies.MAX_MAGNITUDE
    signs = tf.where(drawn[:, 0] < 0.5, -1.0, 1.0)
    ops = tf.minimum(tf.cast(drawn[:, 1] * len(OPS), tf.int32), len(OPS) - 1)
    ops = tf.where(drawn[:, 2] < policy.probability, ops, len(OPS))
    matrix = tf.constant(_IDENTITY)
    for layer in range(policy.layers):
        image, moved = apply_op(image, ops[layer], levels[layer], signs[layer])
        matrix = tf.matmul(matrix, tf.concat([moved, [[0.0, 0.0, 1.0]]], 0)) if layer else moved
    return image, matrix


def apply_op(
    image: tf.Tensor, op: tf.Tensor, level: tf.Tensor, sign: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """One operation: uint8 [H, W, 3], float32 [2, 3].

    Args:
      image: uint8 [H, W, 3].
      op: int32 scalar, index into `augment_policy.OPS`, or len(OPS) for none.
      level: scalar, magnitude / 10.
      sign: scalar -1 or 1, the direction where an operation has two.
    """
    still = tf.constant(_IDENTITY)
    factor = tf.maximum(policies.MIN_ENHANCE, 1.0 + sign * level * policies.ENHANCE)
    count = lambda most: tf.cast(level * most, tf.int32)
    share = sign * level * policies.TRANSLATE
    branches = {
        "AutoContrast": lambda: (autocontrast(image), still),
        "Equalize": lambda: (equalize(image), still),
        "Invert": lambda: (255 - image, still),
        "Rotate": lambda: rotate(image, sign * level * policies.ROTATE_DEGREES),
        "PosterizeIncreasing": lambda: (
            posterize(image, policies.POSTERIZE_BITS - count(policies.POSTERIZE_BITS)),
            still,
        ),
        "SolarizeIncreasing": lambda: (
            solarize(image, policies.SOLARIZE - count(policies.SOLARIZE)),
            still,
        ),
        "SolarizeAdd": lambda: (solarize_add(image, count(policies.SOLARIZE_ADD)), still),
        "ColorIncreasing": lambda: (color(image, factor), still),
        "ContrastIncreasing": lambda: (contrast(image, factor), still),
        "BrightnessIncreasing": lambda: (brightness(image, factor), still),
        "SharpnessIncreasing": lambda: (sharpness(image, factor), still),
        "ShearX": lambda: shear_x(image, sign * level * policies.SHEAR),
        "ShearY": lambda: shear_y(image, sign * level * policies.SHEAR),
        "TranslateXRel": lambda: translate_x(image, share),
        "TranslateYRel": lambda: translate_y(image, share),
    }
    shape = image.shape
    image, matrix = tf.switch_case(op, [*(branches[name] for name in OPS), lambda: (image, still)])
    image.set_shape(shape)
    matrix.set_shape([2, 3])
    return image, matrix


def color_jitter(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    """Brightness, contrast and saturation by factors uniform in 1 - or + `strength`, in random order."""
    seeds = tf.random.split(seed, 2)
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    factors = tf.random.stateless_uniform([3], seeds[0], low, high)
    order = tf.random.experimental.stateless_shuffle(tf.range(3), seeds[1])
    shape = image.shape
    for turn in range(3):
        steps = [
            lambda image=image: brightness(image, factors[0]),
            lambda image=image: contrast(image, factors[1]),
            lambda image=image: color(image, factors[2]),
        ]
        image = tf.switch_case(order[turn], steps)
    image.set_shape(shape)
    return image


def three_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Greyscale, solarizing or Gaussian blur (radius 0.1 to 2 pixels), one of them at random.

    3-Augment of DeiT III (Touvron et al. 2022, arXiv:2204.07118) without its color jitter.
    """
    drawn = tf.random.stateless_uniform([2], seed)
    shape = image.shape
    steps = [
        lambda: tf.broadcast_to(tf.cast(_gray(image), tf.uint8)[:, :, None], tf.shape(image)),
        lambda: solarize(image, 128),
        lambda: gaussian_blur(image, 0.1 + 1.9 * drawn[1]),
    ]
    image = tf.switch_case(tf.minimum(tf.cast(drawn[0] * 3, tf.int32), 2), steps)
    image.set_shape(shape)
    return image


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretch each channel to 0-255; a channel of one value stays."""
    wide = _wide(image)
    ends = lambda reduce: tf.cast(reduce(tf.reshape(reduce(wide, 0), [-1, 3]), 0), tf.float32)
    low, high = ends(tf.reduce_min), ends(tf.reduce_max)
    flat = high <= low
    scale = tf.where(flat, 1.0, 255.0 / tf.maximum(high - low, 1.0))
    # Truncated as in Pillow, but never below a whole number because of float32.
    shift = tf.where(flat, 0.0, 1e-4 - low * scale)
    width = image.shape[1]
    stretched = tf.cast(wide, tf.float32) * tf.tile(scale, [width]) + tf.tile(shift, [width])
    return tf.reshape(_truncate(stretched), image.shape)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Flatten each channel's histogram by Pillow's table."""
    index = tf.cast(image, tf.int32) + tf.constant([0, 256, 512])  # a table for each channel
    counts = tf.math.bincount(tf.reshape(index, [-1]), minlength=768, maxlength=768)
    counts = tf.reshape(counts, [3, 256])
    levels = tf.range(256)
    last = tf.reduce_max(tf.where(counts > 0, levels[None, :], 0), 1)  # the brightest value there is
    total = tf.size(image) // 3
    step = (total - tf.gather(counts, last, batch_dims=1)) // 255
    before = tf.cumsum(counts, 1, exclusive=True) + step[:, None] // 2
    table = tf.minimum(before // tf.maximum(step, 1)[:, None], 255)
    table = tf.cast(tf.where(step[:, None] > 0, table, levels[None, :]), tf.uint8)
    return tf.gather(tf.reshape(table, [768]), index)


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keep the `bits` highest bits of every value."""
    return tf.bitwise.bitwise_and(image, tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8))


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Invert the values from `threshold` (0-256) on."""
    bright = tf.cast(tf.cast(image, tf.int16) >= tf.cast(threshold, tf.int16), tf.uint8)
    return tf.bitwise.bitwise_xor(image, bright * 255)


def solarize_add(image: tf.Tensor, add: tf.Tensor) -> tf.Tensor:
    """Add (0-127) to the values below 128."""
    dark = tf.cast(image < policies.SOLARIZE_ADD_BELOW, tf.uint8)
    return image + dark * tf.cast(add, tf.uint8)


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Saturation: 0 gives gray, 1 the image."""
    gray = tf.tile(tf.constant(GRAY)[:, None], [1, 3])
    pixels = tf.reshape(tf.cast(image, tf.float32), [-1, 3])
    mixed = tf.matmul(pixels, (1 - factor) * gray + factor * tf.eye(3))
    return tf.reshape(_truncate(mixed + 1e-3), image.shape)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """0 gives the image's mean gray everywhere, 1 the image."""
    mean = tf.reduce_mean(tf.cast(_wide(image), tf.float32), 0)
    gray = tf.reduce_sum(tf.reduce_mean(tf.reshape(mean, [-1, 3]), 0) * tf.constant(GRAY))
    return _blend(tf.floor(gray + 0.5), image, factor)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """0 gives black, 1 the image."""
    return _truncate(tf.cast(image, tf.float32) * factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """0 gives a 3x3 smoothing (the middle counts five times), 1 the image; the border stays as it is."""
    height, width, _ = image.shape
    wide = tf.cast(_wide(image), tf.int16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    inner = wide[1:-1, 3:-3]
    total = rows[:, :-6] + rows[:, 3:-3] + rows[:, 6:] + 4 * inner
    smooth = tf.floor(tf.cast(total, tf.float32) * (1 / 13) + 0.5)
    sharp = tf.reshape(_blend(smooth, inner, factor), [height - 2, width - 2, 3])
    middle = tf.concat([image[1:-1, :1], sharp, image[1:-1, -1:]], 1)
    return tf.concat([image[:1], middle, image[-1:]], 0)


def gaussian_blur(image: tf.Tensor, radius: tf.Tensor) -> tf.Tensor:
    """Gaussian of standard deviation `radius` pixels; at the border only what is inside counts."""
    height, width, _ = image.shape
    rows = tf.matmul(_gaussian(height, radius), tf.cast(_wide(image), tf.float32))
    columns = tf.reshape(tf.transpose(tf.reshape(rows, [height, width, 3]), [1, 0, 2]), [width, height * 3])
    blurred = tf.reshape(tf.matmul(_gaussian(width, radius), columns), [width, height, 3])
    return _truncate(tf.transpose(blurred, [1, 0, 2]) + 0.5)


def rotate(image: tf.Tensor, degrees: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Counter-clockwise about the center."""
    height, width, _ = image.shape
    angle = degrees * (math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    x, y = width / 2, height / 2
    return _warp(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def shear_x(image: tf.Tensor, factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A pixel comes from `factor` times its y further right."""
    return _warp(image, 1.0, factor, 0.0, 0.0, 1.0, 0.0)


def shear_y(image: tf.Tensor, factor: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A pixel comes from `factor` times its x further down."""
    return _warp(image, 1.0, 0.0, 0.0, factor, 1.0, 0.0)


def translate_x(image: tf.Tensor, share: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A pixel comes from `share` of the width further right, rounded to whole pixels."""
    width = image.shape[1]
    pixels = tf.cast(tf.round(share * width), tf.int32)
    fill = _fill_image(image)
    kept = image[:, tf.maximum(pixels, 0) : width + tf.minimum(pixels, 0)]
    moved = tf.concat([fill[:, : tf.maximum(-pixels, 0)], kept, fill[:, : tf.maximum(pixels, 0)]], 1)
    return moved, _matrix(1.0, 0.0, tf.cast(pixels, tf.float32) / width, 0.0, 1.0, 0.0)


def translate_y(image: tf.Tensor, share: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A pixel comes from `share` of the height further down, rounded to whole pixels."""
    height = image.shape[0]
    pixels = tf.cast(tf.round(share * height), tf.int32)
    fill = _fill_image(image)
    kept = image[tf.maximum(pixels, 0) : height + tf.minimum(pixels, 0)]
    moved = tf.concat([fill[: tf.maximum(-pixels, 0)], kept, fill[: tf.maximum(pixels, 0)]], 0)
    return moved, _matrix(1.0, 0.0, 0.0, 0.0, 1.0, tf.cast(pixels, tf.float32) / height)


_IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


def _warp(image, a, b, c, d, e, f) -> tuple[tf.Tensor, tf.Tensor]:
    """Sample at x' = a x + b y + c, y' = d x + e y + f, in pixels with the first one's center at 0.5."""
    height, width, _ = image.shape
    half = lambda p, q, r: r + 0.5 * (p + q) - 0.5  # TensorFlow counts from the first pixel's center
    numbers = [a, b, half(a, b, c), d, e, half(d, e, f), 0.0, 0.0]
    fill = tf.constant(FILL * width, tf.float32)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.reshape(tf.cast(_wide(image), tf.float32) - fill, [1, height, width, 3]),
        transforms=tf.stack([tf.cast(n, tf.float32) for n in numbers])[None],
        output_shape=[height, width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    moved = tf.reshape(_truncate(_wide(moved[0]) + (fill + 0.5)), image.shape)
    return moved, _matrix(a, b * (height / width), c / width, d * (width / height), e, f / height)


def _wide(image: tf.Tensor) -> tf.Tensor:
    """[H, W * 3]: TensorFlow adds vectors to long rows several times faster than to rows of three."""
    height, width, _ = image.shape
    return tf.reshape(image, [height, width * 3])


def _matrix(a, b, c, d, e, f) -> tf.Tensor:
    return tf.reshape(tf.stack([tf.cast(n, tf.float32) for n in (a, b, c, d, e, f)]), [2, 3])


def _fill_image(image: tf.Tensor) -> tf.Tensor:
    return tf.broadcast_to(tf.constant(FILL, tf.uint8), image.shape)


def _gray(image: tf.Tensor) -> tf.Tensor:
    """float32 [H, W], whole numbers."""
    return tf.floor(tf.tensordot(tf.cast(image, tf.float32), tf.constant(GRAY), 1) + 0.5)


def _blend(other: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """other + factor * (image - other), truncated."""
    return _truncate(other * (1 - factor) + tf.cast(image, tf.float32) * factor)


def _truncate(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _gaussian(size: int, radius: tf.Tensor) -> tf.Tensor:
    """Weights float32 [size, size] of the pixels (columns) in each blurred one; rows sum to 1."""
    place = tf.range(size, dtype=tf.float32)
    distance = (place[:, None] - place[None, :]) / radius
    return tf.nn.softmax(-0.5 * distance * distance, axis=1)
