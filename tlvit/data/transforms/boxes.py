"""Draws the box of a random resized crop, inside tf.data's graph."""

import math

import tensorflow as tf

TRIES = 10  # random boxes that are drawn before the centered one is taken, as in torchvision


def random_box(
    seed: tf.Tensor, size: tf.Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tf.Tensor:
    """Draws the box of a random resized crop as torchvision's RandomResizedCrop does.

    The area is uniform in `scale`, the aspect ratio log-uniform in `ratio`. The first of ten draws that fits
    is taken; if none does, the largest centered box of an allowed aspect ratio.

    Args:
      seed: int64 [2].
      size: int32 [2] (height, width) of the image, pixels.
      scale: range of the area, as a fraction of the image.
      ratio: range of width / height.

    Returns:
      int32 [4] (top, left, height, width), pixels.
    """
    height, width = tf.cast(size[0], tf.float32), tf.cast(size[1], tf.float32)
    u = tf.random.stateless_uniform([4, TRIES], seed)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = tf.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[1])
    w, h = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    top, left = tf.floor(u[2] * (height - h + 1)), tf.floor(u[3] * (width - w + 1))
    first = tf.argmax(tf.cast(fits, tf.int32))
    drawn = tf.gather(tf.stack([top, left, h, w], 1), first)

    center_w = tf.minimum(width, tf.round(height * ratio[1]))
    center_h = tf.minimum(height, tf.round(width / ratio[0]))
    corner = [(height - center_h) // 2, (width - center_w) // 2]
    center = tf.stack([*corner, tf.maximum(center_h, 1.0), tf.maximum(center_w, 1.0)])
    box = tf.cast(tf.where(tf.reduce_any(fits), drawn, center), tf.int32)
    # u * (n + 1) in float32 can round up to n + 1.
    return tf.concat([tf.minimum(box[:2], size - box[2:]), box[2:]], 0)
