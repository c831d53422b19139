"""Augments an image of segmentation and the classes of its pixels alike: scale, crop, flip, colors, padding.

As in mmsegmentation's configuration for ADE20K. The classes are sampled by nearest neighbor at the centers of
the pixels, so they are aligned with the image (OpenCV's nearest neighbor is up to half a pixel off).
"""

import tensorflow as tf

from tlvit.config import Segmentation
from tlvit.data.transforms import geometry
from tlvit.types import IGNORE

TRIES = 10  # crops that are checked for `max_class_ratio`; the one after them is taken unchecked
BRIGHTNESS = 32.0  # largest change, of 255
FACTORS = (0.5, 1.5)  # of contrast and saturation
HUE = 18 / 180  # largest change, as a fraction of the circle


def scene_crop(
    pixels: tf.Tensor,
    classes: tf.Tensor,
    seed: tf.Tensor,
    *,
    crop_size: tuple[int, int],
    hflip: float,
    settings: Segmentation,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A random view of an image.

    Args:
      pixels: uint8 [h, w, 3].
      classes: uint8 [h, w].
      seed: int64 [2]. The same seed gives the same view.
      crop_size: (H, W) of the view.
      hflip: probability of a horizontal flip.
      settings: scale, scale_range, max_class_ratio and photometric are used.

    Returns:
      The view, uint8 [H, W, 3]; its classes, uint8 [H, W]; and the matrix from its points to those of the
      image, float32 [2, 3]. A view that is larger than the scaled image is padded at the bottom and on the
      right, by black pixels of the class IGNORE, whose points are outside of the image.
    """
    seeds = tf.random.split(seed, 4)
    size = tf.shape(pixels)[:2]
    scaled = _scaled_size(seeds[0], size, settings)
    box = _choose_box(seeds[1], classes, scaled, crop_size, settings.max_class_ratio)
    labels = _sample_classes(classes, box, scaled)
    image = _sample_pixels(pixels, box, scaled)
    flipped = tf.random.stateless_uniform([], seeds[2]) < hflip
    labels = tf.cond(flipped, lambda: tf.reverse(labels, [1]), lambda: labels)
    image = tf.cond(flipped, lambda: tf.reverse(image, [1]), lambda: image)
    if settings.photometric:
        image = photometric_distortion(image, seeds[3])
    image = tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)
    below, right = crop_size[0] - box[2], crop_size[1] - box[3]
    image = tf.ensure_shape(tf.pad(image, [[0, below], [0, right], [0, 0]]), [*crop_size, 3])
    labels = tf.pad(labels, [[0, below], [0, right]], constant_values=IGNORE)
    unflip = tf.where(flipped, geometry.flip(), geometry.identity())
    matrix = geometry.compose(geometry.crop(box, scaled), unflip)
    padding = geometry.crop(
        tf.stack([0, 0, *crop_size]), box[2:]
    )  # from the view to its part without padding
    return image, tf.ensure_shape(labels, crop_size), geometry.compose(matrix, padding)


def photometric_distortion(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    The contrast comes after the brightness or, with probability 1/2, last. Nothing is rounded in between.

    Args:
      image: float32 [h, w, 3] in [0, 255].
      seed: int64 [2].

    Returns:
      float32 [h, w, 3] in [0, 255].
    """
    drawn = tf.unstack(tf.random.stateless_uniform([9], seed), num=9)
    on = [value < 0.5 for value in drawn[:5]]
    factor = lambda u: FACTORS[0] + (FACTORS[1] - FACTORS[0]) * u
    clip = lambda x: tf.clip_by_value(x, 0.0, 255.0)
    brightness = tf.where(on[0], BRIGHTNESS * (2 * drawn[5] - 1), 0.0)
    contrast = tf.where(on[1], factor(drawn[6]), 1.0)
    saturation = tf.where(on[2], factor(drawn[7]), 1.0)
    hue = tf.where(on[3], HUE * (2 * drawn[8] - 1), 0.0)
    image = clip(clip(image + brightness) * tf.where(on[4], contrast, 1.0))
    h, s, v = tf.unstack(tf.image.rgb_to_hsv(image / 255.0), axis=-1)
    changed = tf.stack([tf.math.floormod(h + hue, 1.0), tf.minimum(s * saturation, 1.0), v], -1)
    image = tf.cond(on[2] | on[3], lambda: 255.0 * tf.image.hsv_to_rgb(changed), lambda: image)
    return clip(image * tf.where(on[4], 1.0, contrast))


def _scaled_size(seed: tf.Tensor, size: tf.Tensor, settings: Segmentation) -> tf.Tensor:
    """The size that the image is scaled to, int32 [2]: within the limits of `scale` times a random factor."""
    low, high = settings.scale_range
    ratio = low + (high - low) * tf.random.stateless_uniform([], seed)
    longer, shorter = (tf.floor(ratio * limit) for limit in (max(settings.scale), min(settings.scale)))
    sides = tf.cast(size, tf.float32)
    zoom = tf.minimum(longer / tf.reduce_max(sides), shorter / tf.reduce_min(sides))
    return tf.maximum(tf.cast(sides * zoom + 0.5, tf.int32), 1)


def _choose_box(
    seed: tf.Tensor, classes: tf.Tensor, scaled: tf.Tensor, crop_size: tuple[int, int], max_ratio: float
) -> tf.Tensor:
    """The box of the crop in the scaled image, int32 [4] (top, left, height, width).

    It is the first of TRIES random ones in which labeled pixels have several classes and none has `max_ratio`
    of them or more; otherwise a further random one.
    """
    extent = tf.minimum(tf.constant(crop_size), scaled)
    drawn = tf.random.stateless_uniform([TRIES + 1, 2], seed)
    corners = tf.cast(tf.floor(drawn * tf.cast(scaled - extent + 1, tf.float32)), tf.int32)
    corners = tf.minimum(corners, scaled - extent)  # a product in float32 can be rounded up
    box = lambda i: tf.concat([corners[i], extent], 0)

    def is_refused(i: tf.Tensor) -> tf.Tensor:
        found = tf.reshape(_sample_classes(classes, box(i), scaled), [-1])
        counts = tf.math.bincount(tf.cast(found, tf.int32), minlength=IGNORE + 1, maxlength=IGNORE + 1)
        counts = tf.cast(counts[:IGNORE], tf.float32)
        several = tf.math.count_nonzero(counts) > 1
        return ~several | (tf.reduce_max(counts) >= max_ratio * tf.reduce_sum(counts))

    if max_ratio >= 1:
        return box(0)
    (chosen,) = tf.while_loop(
        lambda i: (i < TRIES) & is_refused(i), lambda i: (i + 1,), (tf.constant(0),), parallel_iterations=1
    )
    return box(chosen)


def _sample_classes(classes: tf.Tensor, box: tf.Tensor, scaled: tf.Tensor) -> tf.Tensor:
    """The classes in a box of the scaled image, by nearest neighbor at the centers of the pixels."""

    def source(axis: int) -> tf.Tensor:
        length = tf.shape(classes)[axis]
        centers = tf.cast(box[axis] + tf.range(box[2 + axis]), tf.float32) + 0.5
        nearest = tf.floor(centers * (tf.cast(length, tf.float32) / tf.cast(scaled[axis], tf.float32)))
        return tf.clip_by_value(tf.cast(nearest, tf.int32), 0, length - 1)

    return tf.gather(tf.gather(classes, source(0)), source(1), axis=1)


def _sample_pixels(pixels: tf.Tensor, box: tf.Tensor, scaled: tf.Tensor) -> tf.Tensor:
    """The pixels in a box of the scaled image, float32: bilinear, without antialiasing."""
    size = tf.cast(tf.shape(pixels)[:2], tf.float32)
    return tf.raw_ops.ScaleAndTranslate(
        images=pixels[None],
        size=box[2:],
        scale=tf.cast(scaled, tf.float32) / size,
        translation=-tf.cast(box[:2], tf.float32),
        kernel_type="triangle",
        antialias=False,
    )[0]
