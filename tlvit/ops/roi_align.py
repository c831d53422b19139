"""Resampling written out as weights: RoIAlign through an affine geometry, and torch's bicubic resize."""

import math

import jax
import jax.numpy as jnp

from tlvit.types import Array


def roi_weights(geometry: Array, map_grid: tuple[int, int], grid: tuple[int, int]) -> Array:
    """How much each cell of a map counts for each token: the sampling of RoIAlign along the geometry.

    The arithmetic is that of torchvision's `roi_align` (He et al. 2017; `aligned=False`, adaptive sampling
    ratio) on the box that the geometry cuts out of the map, minus half a cell, which puts cell centers where
    they belong. Every token averages ceil(extent / tokens) samples along each axis, a sample interpolates
    bilinearly between cell centers, samples up to a cell outside of the map take its border and those further
    away count as zero. For rotations and shears the box is a parallelogram and everything else is the same;
    sides longer than the map average as many samples as one of its length.

    Args:
      geometry: float32 [B, 2, 3], token image -> map, both in [0, 1] x [0, 1].
      map_grid: (hm, wm) of the map.
      grid: (h, w) of the tokens.

    Returns:
      float32 [B, h * w, hm * wm].
    """
    size = jnp.array([map_grid[1], map_grid[0]], jnp.float32)[None, :]  # of x and y
    # Operations in the order of a box given by corners: near a cell's border the last digit of a position
    # matters (1e-5).
    corner, right, bottom = (
        point * size - 0.5
        for point in (
            geometry[:, :, 2],
            geometry[:, :, 0] + geometry[:, :, 2],
            geometry[:, :, 1] + geometry[:, :, 2],
        )
    )
    limit = max(map_grid)
    start_x, inside_x, weight_x = _samples(right - corner, grid[1], limit)  # [B, 2, w], [B, 2, gx], [B, gx]
    start_y, inside_y, weight_y = _samples(bottom - corner, grid[0], limit)
    start = corner[:, :, None, None] + start_y[:, :, :, None] + start_x[:, :, None, :]
    inside = inside_y[:, :, :, None] + inside_x[:, :, None, :]
    # Positions (x, y) of all samples, [B, 2, h, gy, w, gx].
    position = start[:, :, :, None, :, None] + inside[:, :, None, :, None, :]
    share = weight_y[:, None, :, None, None] * weight_x[:, None, None, None, :]
    columns = _interpolate(position[:, 0], map_grid[1])
    rows = _interpolate(position[:, 1], map_grid[0]) * share[..., None]
    weights = jnp.einsum("bygxfr,bygxfc->byxrc", rows, columns, precision="highest")
    return weights.reshape(geometry.shape[0], grid[0] * grid[1], map_grid[0] * map_grid[1])


def _samples(extent: Array, tokens: int, limit: int) -> tuple[Array, Array, Array]:
    """Along one side of the box: offsets [B, 2, tokens] of the tokens, [B, 2, G] of the samples within a
    token and the weights [B, G] of these.

    The side `extent` [B, 2] is in cells and counts as at least one long. A token averages ceil(length /
    tokens) samples; G is that number for a side of `limit` cells, and samples past an image's own number
    weigh nothing.
    """
    length = jnp.sqrt(jnp.sum(extent**2, axis=1))
    most = math.ceil(limit / tokens)
    count = jnp.clip(jnp.ceil(jnp.maximum(length, 1.0) / tokens), 1, most)[:, None]
    bins = extent * (jnp.maximum(length, 1.0) / jnp.maximum(length, 1e-6))[:, None] / tokens
    index = jnp.arange(most, dtype=jnp.float32)
    weight = jnp.where(index[None, :] < count, 1.0 / count, 0.0)
    start = jnp.arange(tokens, dtype=jnp.float32)[None, None, :] * bins[:, :, None]
    inside = (index[None, None, :] + 0.5) * bins[:, :, None] / count[:, None, :]
    return start, inside, weight


def _interpolate(position: Array, cells: int) -> Array:
    """Bilinear weights [..., cells] of a position in units of cells, with RoIAlign's treatment of the
    border."""
    near = (position >= -1.0) & (position <= cells)
    clipped = jnp.clip(position, 0.0, cells - 1.0)
    distance = jnp.abs(
        clipped[..., None] - jax.lax.iota(jnp.float32, cells).reshape((1,) * position.ndim + (cells,))
    )
    return jnp.maximum(0.0, 1.0 - distance) * near[..., None]
