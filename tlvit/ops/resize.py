"""Bicubic resizing as torch does it, and position embeddings for another grid."""

import math

import jax.numpy as jnp

from tlvit.types import Array


def resize_bicubic(image: Array, size: tuple[int, int]) -> Array:
    """Resizes [B, h, w, D] to [B, *size, D] as torch's `interpolate(mode="bicubic", align_corners=False)`:
    cubic kernel with a = -0.75, no antialiasing, borders repeated."""
    rows = _bicubic_matrix(image.shape[1], size[0])
    columns = _bicubic_matrix(image.shape[2], size[1])
    return jnp.einsum("iy,jx,byxd->bijd", rows, columns, image, precision="highest")


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


def resize_pos_embed(
    pos_embed: Array, grid: tuple[int, int], *, num_prefix: int, old_grid: tuple[int, int] | None = None
) -> Array:
    """Position embeddings for another grid: bicubic as torch's `interpolate(align_corners=False)`, prefix
    tokens kept.

    Args:
      pos_embed: [1, P + N, D].
      grid: (h, w) wanted.
      num_prefix: P, the class (and distillation) tokens in front.
      old_grid: of the N tokens; a square if not given.

    Returns:
      [1, P + h * w, D]; the same array where the grid already fits.

    Raises:
      ValueError: N is not a square (or not old_grid).
    """
    count = pos_embed.shape[1] - num_prefix
    if old_grid is None:
        side = math.isqrt(max(count, 0))
        old_grid = (side, side)
    if count != old_grid[0] * old_grid[1] or count <= 0:
        raise ValueError(
            f"Position embedding of {pos_embed.shape[1]} tokens, {num_prefix} of them in front: {count} are "
            f"no {old_grid[0]}x{old_grid[1]} grid; give old_grid."
        )
    if tuple(grid) == tuple(old_grid):
        return pos_embed
    prefix, rest = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    table = resize_bicubic(rest.reshape(1, *old_grid, -1), grid)
    return jnp.concatenate([prefix, table.reshape(1, grid[0] * grid[1], -1).astype(prefix.dtype)], axis=1)
