"""RandAugment on the device, for all images of a batch at once, for hosts with too few cores.

The operations and ranges are those of `tlvit.data.transforms.randaugment` (Cubuk et al. 2019,
arXiv:1909.13719). There are no branches: every image goes through the formula of every family of operations,
with parameters that change nothing if another operation was drawn for it. There are no gathers, which are
slow on TPUs: colors go through a 3x3 matrix, histograms and tables through products with one-hot half bytes,
and geometric operations through three shears (Paeth 1986), which shift rows by selecting between slices.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from einops import rearrange

from tlvit.ops import randaugment_policy as policies
from tlvit.ops.geometry import compose, from_pixels
from tlvit.ops.randaugment_policy import FILL, OPS, AugmentPolicy
from tlvit.shapes import Float, Float32, Int, UInt8
from tlvit.types import Array

GRAY = (0.299, 0.587, 0.114)
CHUNKS = 16  # `_equalize` processes the images in up to this many parts, to save memory

Pixels = UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"]


def randaugment(
    key: jax.Array, images: Pixels, geometry: Float32[Array, "B 2 3"], policy: AugmentPolicy
) -> tuple[Pixels, Float32[Array, "B 2 3"]]:
    """Draws `policy.layers` operations for each image and applies each with its probability.

    Args:
      key: PRNG key.
      images: uint8, or floats with integer values in [0, 255]; not normalized.
      geometry: maps the images to their source, see `Batch`.
      policy: from `parse_policy`.

    Returns:
      (images of the given type, their geometry).

    Raises:
      ValueError: the shapes do not fit together.
    """
    batch = images.shape[0]
    if images.ndim != 4 or images.shape[3] != 3 or geometry.shape != (batch, 2, 3):
        raise ValueError(
            f"RandAugment needs images [B, H, W, 3] and geometry [B, 2, 3], not {images.shape} and "
            f"{geometry.shape}."
        )
    shape = (policy.layers, batch)
    keys = jax.random.split(key, 4)
    ops = jax.random.randint(keys[0], shape, 0, len(OPS))
    ops = jnp.where(jax.random.bernoulli(keys[1], policy.probability, shape), ops, len(OPS))
    magnitudes = policy.magnitude + policy.noise * jax.random.normal(keys[2], shape)
    levels = jnp.clip(magnitudes, 0.0, policies.MAX_MAGNITUDE) / policies.MAX_MAGNITUDE
    signs = jax.random.rademacher(keys[3], shape, jnp.float32)
    floats = images.astype(jnp.float32)
    for layer in range(policy.layers):
        floats, matrix = apply_ops(floats, ops[layer], levels[layer], signs[layer])
        geometry = compose(geometry, matrix)
    return floats.astype(images.dtype), geometry


def apply_ops(
    images: Float32[Array, "B H W 3"],
    op: Int[Array, " B"],
    level: Float32[Array, " B"],
    sign: Float32[Array, " B"],
) -> tuple[Float32[Array, "B H W 3"], Float32[Array, "B 2 3"]]:
    """Applies one operation to each image.

    Args:
      images: integer values in [0, 255].
      op: index into `randaugment_policy.OPS`, or len(OPS) for no operation.
      level: magnitude / 10, in [0, 1].
      sign: -1 or 1, the direction of operations that have two.

    Returns:
      (images with integer values in [0, 255], matrices that map their points to those of the given images).
    """
    images = _change_colors(images, op, level, sign)
    images = _change_bits(images, op, level)
    images = _equalize(images, op == OPS.index("Equalize"))
    images = _sharpen(images, jnp.where(op == OPS.index("SharpnessIncreasing"), _factor(level, sign), 1.0))
    return _transform(images, op, level, sign)


def _factor(level: Array, sign: Array) -> Array:
    return jnp.maximum(policies.MIN_ENHANCE, 1.0 + sign * level * policies.ENHANCE)


def _change_colors(images: Array, op: Array, level: Array, sign: Array) -> Array:
    """Applies the affine maps of colors: contrast, brightness, saturation and inversion."""
    batch = images.shape[0]
    factor = _factor(level, sign)
    low, high = jnp.min(images, axis=(1, 2)), jnp.max(images, axis=(1, 2))  # [B, 3]
    stretch = jnp.where(high > low, 255.0 / jnp.maximum(high - low, 1.0), 1.0)
    gray = jnp.array(GRAY)
    mean = jnp.floor(jnp.sum(jnp.mean(images, axis=(1, 2)) * gray[None, :], axis=1) + 0.5)
    has = {name: (op == OPS.index(name))[:, None] for name in OPS}

    diagonal, offset = jnp.ones((batch, 3)), jnp.zeros((batch, 3))
    for name, scale, shift in (
        ("AutoContrast", stretch, jnp.where(high > low, -low * stretch, 0.0)),
        ("Invert", -1.0, 255.0),
        ("BrightnessIncreasing", factor[:, None], 0.0),
        ("ContrastIncreasing", factor[:, None], ((1 - factor) * mean)[:, None]),
        ("ColorIncreasing", factor[:, None], 0.0),
    ):
        diagonal = jnp.where(has[name], scale, diagonal)
        offset = jnp.where(has[name], shift, offset)
    gray_weight = jnp.where(has["ColorIncreasing"], (1 - factor)[:, None], 0.0)[:, :, None, None]
    gray = jnp.sum(images * gray[None, None, None, :], axis=3, keepdims=True)
    mixed = images * diagonal[:, None, None, :] + offset[:, None, None, :] + gray_weight * gray
    return _whole(mixed)


def _change_bits(images: Array, op: Array, level: Array) -> Array:
    """Applies posterize, solarize and solarize-add."""
    at = lambda name, value, other: jnp.where(op == OPS.index(name), value, other)[:, None, None, None]
    count = lambda most: jnp.floor(level * most)
    step = at("PosterizeIncreasing", 2 ** (8 - policies.POSTERIZE_BITS + count(policies.POSTERIZE_BITS)), 1.0)
    threshold = at("SolarizeIncreasing", policies.SOLARIZE - count(policies.SOLARIZE), 256.0)
    add = at("SolarizeAdd", count(policies.SOLARIZE_ADD), 0.0)
    images = jnp.floor(images / step) * step
    images = jnp.where(images >= threshold, 255.0 - images, images)
    return jnp.where(images < policies.SOLARIZE_ADD_BELOW, images + add, images)


def _equalize(images: Array, wanted: Array) -> Array:
    """Equalizes the histograms of the `wanted` images (bool [B]) with the table that Pillow uses."""
    batch, height, width, _ = images.shape
    chunks = max(n for n in range(1, CHUNKS + 1) if height % n == 0)
    parts = rearrange(images, "b (n y) x c -> n b (y x) c", n=chunks)

    def half_bytes(part: Array) -> tuple[Array, Array]:
        value = part.astype(jnp.int32)
        one_hot = lambda x: jax.nn.one_hot(x, 16, dtype=jnp.bfloat16)
        return one_hot(value // 16), one_hot(value % 16)

    def count(counts: Array, part: Array) -> tuple[Array, None]:
        high, low = half_bytes(part)
        return counts + jnp.einsum("bpci,bpcj->bcij", high, low, preferred_element_type=jnp.float32), None

    # Computed from the images, so that it has their sharding.
    empty = jnp.broadcast_to(images[:, 0, 0, :, None, None] * 0, (batch, 3, 16, 16))
    counts, _ = jax.lax.scan(count, empty, parts)
    table = _equalizing_table(counts.reshape(batch, 3, 256).astype(jnp.int32), height * width)
    identity = jnp.broadcast_to(jnp.arange(256)[None, None, :], table.shape)
    table = jnp.where(wanted[:, None, None], table, identity)
    table = table.reshape(batch, 3, 16, 16).astype(jnp.bfloat16)  # exact to 256

    def look_up(part: Array) -> Array:
        high, low = half_bytes(part)
        rows = jnp.einsum("bpci,bcij->bpcj", high, table)
        return jnp.sum(jnp.where(low > 0, rows, 0).astype(jnp.float32), axis=3)

    return rearrange(jax.lax.map(look_up, parts), "n b (y x) c -> b (n y) x c", x=width)


def _equalizing_table(counts: Array, total: int) -> Array:
    """Histograms int32 [B, 3, 256] of `total` pixels -> new values int32 [B, 3, 256]."""
    values = jnp.arange(256)[None, None, :]
    last = jnp.max(jnp.where(counts > 0, values, 0), axis=2, keepdims=True)
    step = (total - jnp.sum(jnp.where(values == last, counts, 0), axis=2, keepdims=True)) // 255
    before = jnp.cumsum(counts, axis=2) - counts + step // 2
    table = jnp.minimum(before // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, jnp.broadcast_to(values, table.shape))


def _sharpen(images: Array, factor: Array) -> Array:
    """Blends each image with a 3x3 smoothing with center weight 5. factor [B]: 0 smoothed, 1 unchanged."""
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    inner = images[:, 1:-1, 1:-1]
    smooth = jnp.floor((rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner) / 13 + 0.5)
    smooth = jnp.pad(smooth, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = images.shape[1:3]
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    border = (rows == 0) | (rows == height - 1) | (columns == 0) | (columns == width - 1)
    smooth = jnp.where(border[None, :, :, None], images, smooth)
    factor = factor[:, None, None, None]
    # The order of the sum makes a factor of 1 exact.
    return _whole(images * factor + smooth * (1 - factor))


def _transform(images: Array, op: Array, level: Array, sign: Array) -> tuple[Array, Array]:
    """Applies rotation, shears and translations as shears along x, y and x; also returns their matrices."""
    height, width = images.shape[1:3]
    at = lambda name, value: jnp.where(op == OPS.index(name), value, 0.0)
    amount = sign * level
    angle = at("Rotate", amount * math.radians(policies.ROTATE_DEGREES))
    slant, rise = -jnp.tan(angle / 2), jnp.sin(angle)
    shear_x, shear_y = at("ShearX", amount * policies.SHEAR), at("ShearY", amount * policies.SHEAR)
    move_x = at("TranslateXRel", jnp.round(amount * policies.TRANSLATE * width))
    move_y = at("TranslateYRel", jnp.round(amount * policies.TRANSLATE * height))

    steepest = math.tan(math.radians(policies.ROTATE_DEGREES) / 2)
    margin = math.ceil(steepest * height / 2) + 1  # columns outside of the image that a rotation needs
    x = jnp.arange(width + 2 * margin) + 0.5 - margin
    y = jnp.arange(height) + 0.5
    times = lambda value, position: value[:, None] * position[None, :]
    fill = jnp.array(FILL, jnp.float32)[None, None, None, :]
    moved = jnp.pad(images - fill, ((0, 0), (0, 0), (margin, margin), (0, 0)))
    reach = lambda *shifts: math.ceil(max(shifts)) + 1  # pixels
    # Three interpolations blur more than the single one on the host. With a cubic first one they are closest.
    moved = _shift_rows(moved, times(slant, y - height / 2), reach(steepest * height / 2), cubic=True)
    columns = times(rise, x - width / 2) + times(shear_y, x) + move_y[:, None]
    largest_y = (policies.SHEAR * (width + margin), policies.TRANSLATE * height)
    sine = math.sin(math.radians(policies.ROTATE_DEGREES))
    moved = jnp.swapaxes(moved, 1, 2)
    moved = _shift_rows(moved, columns, reach(*largest_y, sine * (width / 2 + margin)))
    moved = jnp.swapaxes(moved, 1, 2)
    rows = times(slant, y - height / 2) + times(shear_x, y) + move_x[:, None]
    largest_x = (policies.SHEAR * height, policies.TRANSLATE * width, steepest * height / 2)
    moved = _shift_rows(moved, rows, reach(*largest_x))[:, :, margin : margin + width]
    matrix = _shear_matrices(slant, rise, shear_x, shear_y, move_x, move_y, height, width)
    return jnp.floor(jnp.clip(moved + fill + 0.5, 0.0, 255.0)), matrix


def _shift_rows(images: Array, shift: Array, reach: int, *, cubic: bool = False) -> Array:
    """Shifts row y of image b to the left by shift[b, y] pixels and fills up with zeros.

    Args:
      images: [B, H, W, C].
      shift: [B, H], pixels.
      reach: bound of the absolute shifts.
      cubic: interpolate by Catmull-Rom splines instead of linearly.
    """
    shift = jnp.clip(shift, -reach, reach) + reach
    whole = jnp.floor(shift)
    part = (shift - whole)[:, :, None, None]
    bits = max(1, math.ceil(math.log2(2 * reach + 1)))
    spare = 2**bits - 2 * reach
    images = jnp.pad(images, ((0, 0), (0, 0), (reach + cubic, reach + spare + cubic), (0, 0)))
    whole = whole.astype(jnp.int32)[:, :, None, None]
    for bit in reversed(range(bits)):
        step = 2**bit
        images = jnp.where((whole // step) % 2 == 1, images[:, :, step:], images[:, :, :-step])
    if not cubic:
        return images[:, :, :-1] * (1 - part) + images[:, :, 1:] * part
    other = 1 - part
    weights = (
        -0.5 * part * other * other,
        1 - part * part * (2.5 - 1.5 * part),
        1 - other * other * (2.5 - 1.5 * other),
        -0.5 * other * part * part,
    )
    width = images.shape[2] - 3
    terms = [weight * images[:, :, i : i + width] for i, weight in enumerate(weights)]
    return functools.reduce(operator.add, terms)


def _shear_matrices(
    slant: Array, rise: Array, shear_x: Array, shear_y: Array, move_x: Array, move_y: Array, height: int,
    width: int,
) -> Array:  # fmt: skip
    """The matrices [B, 2, 3] of the three shears, for coordinates in [0, 1]."""
    one, zero = jnp.ones_like(slant), jnp.zeros_like(slant)
    pixels = lambda *numbers: jnp.stack(numbers, axis=1).reshape(-1, 2, 3)
    first = pixels(one, slant, -slant * height / 2, zero, one, zero)
    second = pixels(one, zero, zero, rise + shear_y, one, move_y - rise * width / 2)
    third = pixels(one, slant + shear_x, move_x - slant * height / 2, zero, one, zero)
    return from_pixels(compose(first, compose(second, third)), (height, width))


def _whole(values: Array) -> Array:
    """Truncates and clips as Pillow does. 1e-3 compensates float32 results just below an integer."""
    return jnp.floor(jnp.clip(values + 1e-3, 0.0, 255.0))
