"""Changes of the pixel values of an image with Pillow's arithmetic, truncation included.

All functions run inside tf.data's graph on one image, uint8 [H, W, 3], and return an image of the same shape.
"""

import tensorflow as tf

from tlvit.data.transforms.geometry import size_of
from tlvit.ops.randaugment_policy import SOLARIZE_ADD_BELOW

GRAY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's weights of red, green and blue


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to [0, 255]. A channel of one value does not change."""
    wide = _wide(image)
    ends = lambda reduce: tf.cast(reduce(tf.reshape(reduce(wide, 0), [-1, 3]), 0), tf.float32)
    low, high = ends(tf.reduce_min), ends(tf.reduce_max)
    flat = high <= low
    scale = tf.where(flat, 1.0, 255.0 / tf.maximum(high - low, 1.0))
    # Truncated as in Pillow. The small offset keeps float32 rounding from falling below a whole number.
    shift = tf.where(flat, 0.0, 1e-4 - low * scale)
    width = size_of(image)[1]
    stretched = tf.cast(wide, tf.float32) * tf.tile(scale, [width]) + tf.tile(shift, [width])
    return tf.reshape(_truncate(stretched), tf.shape(image))


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Equalizes each channel's histogram with Pillow's table."""
    index = tf.cast(image, tf.int32) + tf.constant([0, 256, 512])  # a table for each channel
    counts = tf.math.bincount(tf.reshape(index, [-1]), minlength=768, maxlength=768)
    counts = tf.reshape(counts, [3, 256])
    levels = tf.range(256)
    last = tf.reduce_max(tf.where(counts > 0, levels[None, :], 0), 1)  # the brightest value in the image
    total = tf.size(image) // 3
    step = (total - tf.gather(counts, last, batch_dims=1)) // 255
    before = tf.cumsum(counts, 1, exclusive=True) + step[:, None] // 2
    table = tf.minimum(before // tf.maximum(step, 1)[:, None], 255)
    table = tf.cast(tf.where(step[:, None] > 0, table, levels[None, :]), tf.uint8)
    return tf.gather(tf.reshape(table, [768]), index)


def invert(image: tf.Tensor) -> tf.Tensor:
    """Inverts every value."""
    return 255 - image


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keeps the `bits` highest bits of every value."""
    return tf.bitwise.bitwise_and(image, tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8))


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Inverts all values of at least `threshold`, which is in [0, 256]."""
    bright = tf.cast(tf.cast(image, tf.int16) >= tf.cast(threshold, tf.int16), tf.uint8)
    return tf.bitwise.bitwise_xor(image, bright * 255)


def solarize_add(image: tf.Tensor, add: tf.Tensor) -> tf.Tensor:
    """Adds `add`, in [0, 127], to all values below 128."""
    dark = tf.cast(image < SOLARIZE_ADD_BELOW, tf.uint8)
    return image + dark * tf.cast(add, tf.uint8)


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Changes the saturation: factor 0 gives a gray image, 1 the image itself."""
    gray = tf.tile(tf.constant(GRAY)[:, None], [1, 3])
    pixels = tf.reshape(tf.cast(image, tf.float32), [-1, 3])
    mixed = tf.matmul(pixels, (1 - factor) * gray + factor * tf.eye(3))
    return tf.reshape(_truncate(mixed + 1e-3), tf.shape(image))


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Changes the contrast: factor 0 gives the image's mean gray, 1 the image itself."""
    mean = tf.reduce_mean(tf.cast(_wide(image), tf.float32), 0)
    gray = tf.reduce_sum(tf.reduce_mean(tf.reshape(mean, [-1, 3]), 0) * tf.constant(GRAY))
    return _blend(tf.floor(gray + 0.5), image, factor)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Changes the brightness: factor 0 gives black, 1 the image itself."""
    return _truncate(tf.cast(image, tf.float32) * factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Changes the sharpness: factor 0 gives a smoothed image, 1 the image itself.

    The smoothing kernel is 3x3, with 5 in the center and 1 elsewhere, over 13. The border does not change.
    """
    height, width = size_of(image)
    wide = tf.cast(_wide(image), tf.int16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    inner = wide[1:-1, 3:-3]
    total = rows[:, :-6] + rows[:, 3:-3] + rows[:, 6:] + 4 * inner
    smooth = tf.floor(tf.cast(total, tf.float32) * (1 / 13) + 0.5)
    sharp = tf.reshape(_blend(smooth, inner, factor), [height - 2, width - 2, 3])
    middle = tf.concat([image[1:-1, :1], sharp, image[1:-1, -1:]], 1)
    return tf.concat([image[:1], middle, image[-1:]], 0)


def grayscale(image: tf.Tensor) -> tf.Tensor:
    """Removes the colors."""
    gray = tf.floor(tf.tensordot(tf.cast(image, tf.float32), tf.constant(GRAY), 1) + 0.5)
    return tf.broadcast_to(tf.cast(gray, tf.uint8)[:, :, None], tf.shape(image))


def gaussian_blur(image: tf.Tensor, radius: tf.Tensor) -> tf.Tensor:
    """Blurs with a Gaussian of standard deviation `radius` pixels, renormalized at the border."""
    height, width = size_of(image)
    rows = tf.matmul(_gaussian(height, radius), tf.cast(_wide(image), tf.float32))
    columns = tf.reshape(tf.transpose(tf.reshape(rows, [height, width, 3]), [1, 0, 2]), [width, height * 3])
    blurred = tf.reshape(tf.matmul(_gaussian(width, radius), columns), [width, height, 3])
    return _truncate(tf.transpose(blurred, [1, 0, 2]) + 0.5)


def _wide(image: tf.Tensor) -> tf.Tensor:
    """[H, W * 3]: TensorFlow adds vectors to long rows several times faster than to rows of three."""
    height, width = size_of(image)
    return tf.reshape(image, [height, width * 3])


def _blend(other: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """other + factor * (image - other), truncated."""
    return _truncate(other * (1 - factor) + tf.cast(image, tf.float32) * factor)


def _truncate(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _gaussian(size: int | tf.Tensor, radius: tf.Tensor) -> tf.Tensor:
    """Weights float32 [size, size]: row i has those of the pixels in blurred pixel i. Rows sum to 1."""
    position = tf.range(size, dtype=tf.float32)
    distance = (position[:, None] - position[None, :]) / radius
    return tf.nn.softmax(-0.5 * distance * distance, axis=1)
