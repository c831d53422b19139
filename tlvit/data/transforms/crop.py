"""From encoded bytes to pixels of the final size, with the 2x3 matrix that says where they come from.

A matrix M maps a point (x, y) of an image to the image that it was made from, both in [0, 1] x [0, 1], x to
the right and y down: p = M @ (x, y, 1). All functions run inside tf.data's graph. Random ones depend on their
seed only.
"""

import math
from typing import Literal

import tensorflow as tf

from tlvit.data.transforms import randaugment
from tlvit.ops.randaugment_policy import AugmentPolicy

Interpolation = Literal["bilinear", "bicubic", "random"]
LabelCrop = Literal["aligned", "published"]
TRIES = 10  # random boxes drawn before the center is taken, as in torchvision

# Training resizes without antialiasing, after a JPEG's own scaled decoding by 2, 4 or 8. A crop of at least
# SCALED_DECODE times the final size is decoded smaller by 2 (twice that: by 4, ...): from there on that is
# closer to Pillow's resize than sampling the whole crop. Above SOFTER times the final size the bilinear
# kernel is nearer to both of Pillow's than the bicubic one. On photographs the mean difference is below 4
# gray levels.
SCALED_DECODE = 1.625
SOFTER = 1.2


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
    randaugment_policy: AugmentPolicy | None = None,
    three_augment: bool = False,
    color_jitter: float = 0.0,
    exact_resize: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Random flip, random resized crop, then the augmentations of `randaugment` at the final size.

    Args:
      encoded: scalar string, an image file.
      seed: int64 [2]; the same seed gives the same image.
      image_size: (H, W) of the result.
      scale: range of the crop's share of the area; ratio: range of its width / height.
      hflip: chance of a flip.
      interpolation: of the resize; "random" picks one of the two for every image.
      label_crop: "aligned" gives the matrix of the pixels; "published" the one of the published targets,
        whose crop has its two axes exchanged (x from the top edge and the height, y from the left edge and
        the width). Later moves of the pixels count in both.
      randaugment_policy: of RandAugment, or None for none of it.
      three_augment: 3-Augment's grayscale, solarizing or blur (give color_jitter=0.3 with it).
      color_jitter: strength of the jitter of brightness, contrast and saturation; 0 is off.
      exact_resize: decode at full size and antialias as Pillow does: two to three times the time.

    Returns:
      image uint8 [H, W, 3], geometry float32 [2, 3].
    """
    seeds = tf.random.split(seed, 6)  # of independent streams; a later one is added at the end
    flip = tf.random.stateless_uniform([], seeds[0]) < hflip

    def choose(size):
        box = random_box(seeds[1], size, scale=scale, ratio=ratio)  # in the flipped image
        other_left = lambda box: tf.where(flip, size[1] - box[1] - box[3], box[1])
        mirror = lambda box: tf.stack([box[0], other_left(box), box[2], box[3]])
        box = mirror(box)
        box, halvings = (box, 0) if exact_resize else snap_box(box, size, image_size)
        return box, halvings, mirror(box)

    pixels, box, size = decode_and_crop(encoded, choose)
    resize_pixels = resize if exact_resize else fast_resize
    image = resize_pixels(pixels, image_size, interpolation, seeds[2])
    image = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
    unflip = tf.where(flip, flip_matrix(), identity_matrix())
    geometry = compose(unflip, crop_matrix(box, size, transposed=label_crop == "published"))
    if three_augment:
        image = randaugment.three_augment(image, seeds[4])
    if color_jitter:
        image = randaugment.color_jitter(image, seeds[5], color_jitter)
    if randaugment_policy is not None:
        image, moved = randaugment.rand_augment(image, seeds[3], randaugment_policy)
        geometry = compose(geometry, moved)
    return image, geometry


def eval_image(
    encoded: tf.Tensor,
    *,
    image_size: tuple[int, int],
    crop_pct: float = 0.9,
    interpolation: Literal["bilinear", "bicubic"] = "bicubic",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Resize so that the image covers image_size / crop_pct, then crop the center: uint8 [H, W, 3], float32
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
    that fits, else the largest centerd box whose ratio is allowed.
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
    center = tf.stack(
        [
            (height - center_h) // 2,
            (width - center_w) // 2,
            tf.maximum(center_h, 1.0),
            tf.maximum(center_w, 1.0),
        ]
    )
    box = tf.cast(tf.where(tf.reduce_any(fits), drawn, center), tf.int32)
    # u * (n + 1) in float32 can round up to n + 1.
    return tf.concat([tf.minimum(box[:2], size - box[2:]), box[2:]], 0)


def snap_box(box: tf.Tensor, size: tf.Tensor, image_size: tuple[int, int]) -> tuple[tf.Tensor, tf.Tensor]:
    """How a crop that is much larger than the final size is decoded smaller.

    Args:
      box: int32 [4] (top, left, height, width), of an image of int32 [2] (height, width).
      size: the image's size.
      image_size: (H, W), the final size.

    Returns:
      The box moved by a few pixels so that the smaller image has it in whole pixels, int32 [4]; and how often
      to halve, int32, 0 to 3.
    """
    area = tf.cast(box[2] * box[3], tf.float32) / (image_size[0] * image_size[1])
    bounds = tf.constant([(SCALED_DECODE * 2**k) ** 2 for k in range(3)])
    fits = tf.reduce_min(size) >= tf.constant([2, 4, 8])
    halvings = tf.reduce_sum(tf.cast((area >= bounds) & fits, tf.int32))
    factor = tf.bitwise.left_shift(1, halvings)
    most = size // factor
    corner = tf.minimum(box[:2] // factor, most - 1)
    extent = tf.minimum((box[2:] + factor // 2) // factor, most - corner)
    return tf.concat([corner, tf.maximum(extent, 1)], 0) * factor, halvings


def decode_and_crop(encoded: tf.Tensor, choose) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Decode only a part of an image, and smaller, where the format allows it.

    Args:
      encoded: scalar string.
      choose: int32 [2] (height, width) -> (box to cut out as int32 [4] (top, left, height, width); how often
        a JPEG is halved while it is decoded, int32 0 to 3, the box being whole pixels of that; anything).

    Returns:
      pixels uint8 [h, w, 3], the third thing that `choose` gave, and the image's full size int32 [2].
    """
    is_jpeg = tf.io.is_jpeg(encoded)
    pixels = tf.cond(is_jpeg, lambda: tf.zeros([0, 0, 3], tf.uint8), lambda: _decode_any(encoded))
    size = tf.cond(is_jpeg, lambda: tf.io.extract_jpeg_shape(encoded)[:2], lambda: tf.shape(pixels)[:2])
    box, halvings, extra = choose(size)

    def crop_jpeg(factor):
        return tf.io.decode_and_crop_jpeg(
            encoded, box // factor, channels=3, ratio=factor, dct_method="INTEGER_ACCURATE"
        )

    def crop_pixels():
        return pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]

    ways = [lambda factor=factor: crop_jpeg(factor) for factor in (1, 2, 4, 8)]
    return tf.switch_case(tf.where(is_jpeg, halvings, 4), [*ways, crop_pixels]), extra, size


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """JPEG, PNG, BMP, WebP or GIF (its first frame) to uint8 [h, w, 3]."""
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


def fast_resize(
    pixels: tf.Tensor,
    image_size: tuple[int, int],
    interpolation: Interpolation,
    seed: tf.Tensor | None = None,
) -> tf.Tensor:
    """As `resize`, without antialiasing where that makes little difference (less than a factor of two)."""
    size = tf.cast(tf.shape(pixels)[:2], tf.float32)
    zoom = tf.sqrt(size[0] * size[1] / (image_size[0] * image_size[1]))
    if interpolation == "random":
        bicubic = tf.random.stateless_uniform([], seed) >= 0.5
    else:
        bicubic = tf.constant(interpolation == "bicubic")

    def sampled(sample):
        image = sample(images=pixels[None], size=image_size, half_pixel_centers=True)[0]
        return tf.cast(tf.clip_by_value(image + 0.5, 0.0, 255.0), tf.uint8)

    ways = [
        lambda: sampled(tf.raw_ops.ResizeBilinear),
        lambda: sampled(tf.raw_ops.ResizeBicubic),
        lambda: resize(pixels, image_size, "bilinear"),
        lambda: resize(pixels, image_size, "bicubic"),
    ]
    small = tf.where(bicubic & (zoom < SOFTER), 1, 0)
    image = tf.switch_case(tf.where(zoom > 2, tf.where(bicubic, 3, 2), small), ways)
    image.set_shape([*image_size, 3])
    return image


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
