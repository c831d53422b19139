"""Resizing of images, feature maps and position embeddings with the arithmetic of torch."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tlvit.shapes import Float, Float32, Num
from tlvit.types import Array


def resize_pos_embed(
    pos_embed: Float[Array, "1 _ D"],
    grid: tuple[int, int],
    *,
    num_prefix: int,
    old_grid: tuple[int, int] | None = None,
) -> Float[Array, "1 _ D"]:
    """Resizes the position embeddings of the patch tokens to another grid and keeps those of the prefix
    tokens.

    The method is the bicubic interpolation that DeiT and LV-ViT use for other image sizes (Touvron et al.
    2021, arXiv:2012.12877), see `resize_bicubic`.

    Args:
      pos_embed: [1, P + N, D].
      grid: (h, w) of the result.
      num_prefix: P, the number of class and distillation tokens at the front.
      old_grid: (h, w) of the N tokens; by default the square grid of N tokens.

    Returns:
      [1, P + h * w, D]; the same array if the grid is the old one.

    Raises:
      ValueError: N is not a square number, or not the size of old_grid.

    Example:
      >>> import numpy as np
      >>> resize_pos_embed(np.ones((1, 1 + 14 * 14, 8), np.float32), (24, 24), num_prefix=1).shape
      (1, 577, 8)
    """
    count = pos_embed.shape[1] - num_prefix
    if old_grid is None:
        side = math.isqrt(max(count, 0))
        old_grid = (side, side)
    if count != old_grid[0] * old_grid[1] or count <= 0:
        raise ValueError(
            f"Position embedding of {pos_embed.shape[1]} tokens, {num_prefix} of them in front: {count} are "
            f"not a {old_grid[0]}x{old_grid[1]} grid; give old_grid."
        )
    if tuple(grid) == tuple(old_grid):
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    table = resize_bicubic(rearrange(patches, "b (h w) d -> b h w d", h=old_grid[0]), grid)
    return jnp.concatenate([prefix, rearrange(table, "b h w d -> b (h w) d").astype(prefix.dtype)], axis=1)


def resize_bicubic(image: Float[Array, "B _ _ D"], size: tuple[int, int]) -> Float[Array, "B _ _ D"]:
    """Resizes images as torch's `interpolate(mode="bicubic", align_corners=False)` does.

    The cubic kernel has a = -0.75 (Keys 1981). There is no antialiasing, and borders are repeated.

    Args:
      image: [B, h, w, D].
      size: (h, w) of the result.

    Returns:
      [B, *size, D].
    """
    rows = _bicubic_matrix(image.shape[1], size[0])
    columns = _bicubic_matrix(image.shape[2], size[1])
    return jnp.einsum("iy,jx,byxd->bijd", rows, columns, image, precision="highest")


def resize_pixels(image: Num[Array, "B _ _ C"], size: tuple[int, int]) -> Float32[Array, "B _ _ C"]:
    """Resizes pixels from 0 to 255 as images are resized for annotation: bicubic, antialiased, whole numbers.

    Args:
      image: [B, H, W, C].
      size: (height, width) of the result.

    Returns:
      float32 [B, *size, C].
    """
    image = image.astype(jnp.float32)
    if tuple(size) == image.shape[1:3]:
        return image
    resized = jax.image.resize(image, (image.shape[0], *size, image.shape[3]), "cubic")
    return jnp.clip(jnp.round(resized), 0.0, 255.0)


def resize_bilinear(image: Float[Array, "B _ _ D"], size: Sequence[int]) -> Float[Array, "B _ _ D"]:
    """Resizes images as torch's `interpolate(mode="bilinear", align_corners=False)` does.

    There is no antialiasing, also when the image shrinks.

    Args:
      image: [B, h, w, D].
      size: (h, w) of the result.

    Returns:
      [B, *size, D] in the type of `image`.
    """
    rows, columns = (
        jnp.asarray(_bilinear_matrix(old, new), image.dtype)
        for old, new in zip(image.shape[1:3], size, strict=True)
    )
    wide = jnp.einsum("bhwd,xw->bhxd", image, columns, precision="highest")
    return jnp.einsum("bhxd,yh->byxd", wide, rows, precision="highest")


def _bilinear_matrix(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of torch's bilinear interpolation along one axis, float32.

    Positions are rounded to float32 once, after the multiplication and the subtraction: torch computes them
    with a fused multiply-add. At position 30, rounding twice changes a weight by 4e-6.
    """
    scale = np.float64(np.float32(old) / np.float32(new))
    center = np.maximum(np.float32(scale * (np.arange(new) + 0.5) - 0.5), 0)
    base = np.floor(center).astype(int)
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), base), 1 - (center - base).astype(np.float32))
    np.add.at(matrix, (np.arange(new), np.minimum(base + 1, old - 1)), (center - base).astype(np.float32))
    return matrix


def _bicubic_matrix(old: int, new: int) -> Array:
    """Weights [new, old] of torch's bicubic interpolation along one axis."""
    a = -0.75
    center = (jnp.arange(new, dtype=jnp.float32) + 0.5) * (old / new) - 0.5
    base = jnp.floor(center)
    matrix = jnp.zeros((new, old), jnp.float32)
    for offset in (-1, 0, 1, 2):
        d = jnp.abs(center - (base + offset))
        inner = ((a + 2) * d - (a + 3)) * d * d + 1
        outer = ((d - 5) * d + 8) * d * a - 4 * a
        weight = jnp.where(d <= 1, inner, jnp.where(d < 2, outer, 0.0))
        cell = jnp.clip(base + offset, 0, old - 1).astype(jnp.int32)
        matrix = matrix.at[jnp.arange(new), cell].add(weight)
    return matrix
