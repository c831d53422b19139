"""From encoded bytes to pixels of the final size, with the 2x3 matrix that says where they come from.

A matrix M maps a point (x, y) of an image to the image that it was made from, both in [0, 1] x [0, 1], x to
the right and y down: p = M @ (x, y, 1). All functions run inside tf.data's graph. Random ones depend on their
seed only.
"""

import math
from typing import Literal

import tensorflow as tf

Interpolation = Literal["bilinear", "bicubic", "random"]
LabelCrop = Literal["aligned", "published"]
TRIES = 10  # random boxes drawn before the centre is taken, as in torchvision


def train_image(
    encoded: tf.Tensor,
    seed: tf.Tensor,
    *,
    image_size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    interpolation: Interpolation = "random",
    label_crop: LabelCrop = "aligned",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Random flip, random resized crop: the order of the published recipe.

    Args:
      encoded: scalar string, an image file.
      seed: int64 [2]; the same seed gives the same image.
      image_size: (H, W) of the result.
      scale: range of the crop's share of the area; ratio: range of its width / height.
      hflip: chance of a flip.
      interpolation: of the resize, always antialiased; "random" picks one of the two for every image.
      label_crop: "aligned" gives the matrix of the pixels; "published" the one of the published targets,
        whose crop has its two axes exchanged (x from the top edge and the height, y from the left edge and
        the width).

    Returns:
      image uint8 [H, W, 3], geometry float32 [2, 3].
    """
    seeds = tf.random.split(seed, 3)  # of independent streams; a later one is added at the end
    flip = tf.random.stateless_uniform([], seeds[0]) < hflip

    def choose(size):
        box = random_box(seeds[1], size, scale=scale, ratio=ratio)  # in the flipped image
        left = tf.where(flip, size[1] - box[1] - box[3], box[1])
        return tf.stack([box[0], left, box[2], box[3]]), box

    pixels, box, size = decode_and_crop(encoded, choose)
    image = resize(pixels, image_size, interpolation, seeds[2])
    image = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
    unflip = tf.where(flip, flip_matrix(), identity_matrix())
    return image, compose(unflip, crop_matrix(box, size, transposed=label_crop == "published"))


def eval_image(
    encoded: tf.Tensor,
    *,
    image_size: tuple[int, int],
    crop_pct: float = 0.9,
    interpolation: Literal["bilinear", "bicubic"] = "bicubic",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Resize so that the image covers image_size / crop_pct, then crop the centre: uint8 [H, W, 3], float32
    [2, 3].

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop do.
    """
    height, width = image_size
    pixels = decode(encoded)
    size = tf.cast(tf.shape(pixels)[:2], tf.float32)
    target = tf.constant([math.floor(height / crop_pct), math.floor(width / crop_pct)], tf.float32)
    zoom = target / size
    # The axis that needs the larger zoom gets its target exactly; the other one follows, rounded down.
    scaled = tf.where(zoom >= tf.reduce_max(zoom), target, tf.floor(tf.reduce_max(zoom) * size + 1e-4))
    corner = tf.round((scaled - [height, width]) / 2)
    image = tf.raw_ops.ScaleAndTranslate(
        images=pixels[None],
        size=[height, width],
        scale=scaled / size,
        translation=-corner,
        kernel_type={"bicubic": "keyscubic", "bilinear": "triangle"}[interpolation],
        antialias=True,
    )[0]
    box = tf.concat([corner, [height, width]], 0)
    return _to_uint8(image, image_size), crop_matrix(box, scaled)


def whole_image(encoded: tf.Tensor, *, image_size: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor]:
    """The whole image squashed to the size (bicubic): uint8 [H, W, 3] and the identity [2, 3]."""
    return resize(decode(encoded), image_size, "bicubic"), identity_matrix()


def random_box(seed: tf.Tensor, size: tf.Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]):
    """A box (top, left, height, width), int32 [4], in pixels of an image of int32 [2] (height, width).

    As torchvision's RandomResizedCrop: area uniform in `scale`, ratio log-uniform; the first of ten draws
    that fits, else the largest centred box whose ratio is allowed.
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

    centre_w = tf.minimum(width, tf.round(height * ratio[1]))
    centre_h = tf.minimum(height, tf.round(width / ratio[0]))
    centre = tf.stack(
        [
            (height - centre_h) // 2,
            (width - centre_w) // 2,
            tf.maximum(centre_h, 1.0),
            tf.maximum(centre_w, 1.0),
        ]
    )
    box = tf.cast(tf.where(tf.reduce_any(fits), drawn, centre), tf.int32)
    # u * (n + 1) in float32 can round up to n + 1.
    return tf.concat([tf.minimum(box[:2], size - box[2:]), box[2:]], 0)


def decode_and_crop(encoded: tf.Tensor, choose) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Decode only a part of an image, where the format allows it.

    Args:
      encoded: scalar string.
      choose: int32 [2] (height, width) -> (box to cut out as int32 [4] (top, left, height, width), anything).

    Returns:
      pixels uint8 [h, w, 3], the second thing that `choose` gave, and the image's size int32 [2].
    """
    is_jpeg = tf.io.is_jpeg(encoded)
    pixels = tf.cond(is_jpeg, lambda: tf.zeros([0, 0, 3], tf.uint8), lambda: _decode_any(encoded))
    size = tf.cond(is_jpeg, lambda: tf.io.extract_jpeg_shape(encoded)[:2], lambda: tf.shape(pixels)[:2])
    box, extra = choose(size)

    def crop_jpeg():
        return tf.io.decode_and_crop_jpeg(encoded, box, channels=3, dct_method="INTEGER_ACCURATE")

    def crop_pixels():
        return pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]

    return tf.cond(is_jpeg, crop_jpeg, crop_pixels), extra, size


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """JPEG, PNG, BMP or GIF (its first frame) to uint8 [h, w, 3]."""
    as_jpeg = lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
    return tf.cond(tf.io.is_jpeg(encoded), as_jpeg, lambda: _decode_any(encoded))


def resize(
    pixels: tf.Tensor,
    image_size: tuple[int, int],
    interpolation: Interpolation,
    seed: tf.Tensor | None = None,
) -> tf.Tensor:
    """Antialiased resize, uint8 [h, w, 3] to uint8 [H, W, 3]; "random" needs a seed, int64 [2]."""
    if interpolation == "random":
        image = tf.cond(
            tf.random.stateless_uniform([], seed) < 0.5,
            lambda: tf.image.resize(pixels, image_size, "bilinear", antialias=True),
            lambda: tf.image.resize(pixels, image_size, "bicubic", antialias=True),
        )
    else:
        image = tf.image.resize(pixels, image_size, interpolation, antialias=True)
    return _to_uint8(image, image_size)


def compose(outer: tf.Tensor, inner: tf.Tensor) -> tf.Tensor:
    """The matrix [2, 3] of p -> outer(inner(p)): `inner` is the later step of the image's making."""
    square = tf.concat([inner, [[0.0, 0.0, 1.0]]], 0)
    return tf.matmul(outer, square)


def identity_matrix() -> tf.Tensor:
    """float32 [2, 3]: the image is its own source."""
    return tf.constant([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def flip_matrix() -> tf.Tensor:
    """float32 [2, 3]: left and right exchanged."""
    return tf.constant([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


def crop_matrix(box: tf.Tensor, size: tf.Tensor, *, transposed: bool = False) -> tf.Tensor:
    """float32 [2, 3] of the crop `box` [4] (top, left, height, width) of an image of `size` [2] (height,
    width).

    `transposed` gives the region x in [top, top + height], y in [left, left + width] (as fractions) instead,
    which is what the published code cuts out of its label maps.
    """
    size = tf.cast(size, tf.float32)
    top, left, height, width = tf.unstack(tf.cast(box, tf.float32) / tf.concat([size, size], 0))
    if transposed:
        top, left, height, width = left, top, width, height
    zero = tf.zeros_like(top)
    return tf.stack([tf.stack([width, zero, left]), tf.stack([zero, height, top])])


def _decode_any(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def _to_uint8(image: tf.Tensor, image_size: tuple[int, int]) -> tf.Tensor:
    image = tf.saturate_cast(tf.round(image), tf.uint8)
    image.set_shape([*image_size, 3])
    return image
