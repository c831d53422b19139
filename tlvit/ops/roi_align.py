"""RoIAlign through an affine geometry, as a matrix of sampling weights."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from tlvit.shapes import Float, Float32
from tlvit.types import Array


def roi_weights(
    geometry: Float[Array, "B 2 3"], map_grid: tuple[int, int], grid: tuple[int, int]
) -> Float32[Array, "B N M"]:
    """The weight of each cell of a map in the value of each token.

    The arithmetic is that of torchvision's `roi_align` (He et al. 2017, arXiv:1703.06870; `aligned=False`,
    adaptive sampling ratio) on the box that the geometry cuts out of the map, moved by half a cell so that
    positions are relative to cell centers. Every token averages ceil(extent / tokens) samples along each
    axis. A sample interpolates bilinearly between cell centers. Samples up to one cell outside of the map
    take the value of its border, and samples further away are zero. For rotations and shears the box is a
    parallelogram. A side longer than the map has as many samples as a side of the map's length.

    Args:
      geometry: [B, 2, 3], token image -> map, both in [0, 1] x [0, 1], see `tlvit.ops.geometry`.
      map_grid: (hm, wm) of the map.
      grid: (h, w) of the tokens.

    Returns:
      float32 [B, N, M] with N = h * w tokens and M = hm * wm cells, both in row-major order.
    """
    size = jnp.array([map_grid[1], map_grid[0]], jnp.float32)[None, :]  # of x and y
    # The order of the operations is that of a box given by its corners: close to a cell's border a difference
    # of 1e-5 in a position changes the result.
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
    weight = weight_y[:, None, :, None, None] * weight_x[:, None, None, None, :]
    columns = _interpolate(position[:, 0], map_grid[1])
    rows = _interpolate(position[:, 1], map_grid[0]) * weight[..., None]
    weights = jnp.einsum("bygxfr,bygxfc->byxrc", rows, columns, precision="highest")
    return rearrange(weights, "b y x r c -> b (y x) (r c)")


def _samples(extent: Array, tokens: int, limit: int) -> tuple[Array, Array, Array]:
    """The samples along one side of the box.

    A side is at least one cell long. A token averages ceil(length / tokens) samples; G is that number for a
    side of `limit` cells. Samples beyond an image's own number have weight 0.

    Args:
      extent: [B, 2], the side as a vector (x, y) in cells.
      tokens: number of tokens along the side.
      limit: number of cells along the longer side of the map.

    Returns:
      The offsets [B, 2, tokens] of the tokens, the offsets [B, 2, G] of the samples within a token, and the
      weights [B, G] of the samples.
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
