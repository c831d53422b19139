"""Mixing within a batch on the device: MixToken (masks of tokens).

MixToken (Jiang et al. 2021, arXiv:2104.10858) is CutMix on the token grid, after the patch stem: tokens
inside a random box are those of the partner image. Every shard of the batch is mixed with its own reversal,
so no device needs another's images.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tlvit.types import Array, MixTokenMask


def draw_mixtoken_mask(
    key: Array, grid: tuple[int, int], shards: int = 1, *, alpha: float = 1.0
) -> MixTokenMask:
    """Draws one box for each shard: its area share is Beta(alpha, alpha), its centre uniform on the grid, its
    parts outside of the grid cut off, as in CutMix.

    Args:
      key: PRNG key.
      grid: (h, w) of the tokens.
      shards: S, the number of independently mixed parts of the batch.
      alpha: of the Beta distribution; 1 in the paper.
    """
    h, w = grid
    key_share, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1.0 - jax.random.beta(key_share, alpha, alpha, (shards,)))
    half_h = jnp.floor(h * side).astype(jnp.int32) // 2
    half_w = jnp.floor(w * side).astype(jnp.int32) // 2
    y = jax.random.randint(key_y, (shards,), 0, h)
    x = jax.random.randint(key_x, (shards,), 0, w)
    rows = jnp.arange(h)[None, :]
    columns = jnp.arange(w)[None, :]
    inside_y = (rows >= (y - half_h)[:, None]) & (rows < (y + half_h)[:, None])
    inside_x = (columns >= (x - half_w)[:, None]) & (columns < (x + half_w)[:, None])
    return _with_share(inside_y[:, :, None] & inside_x[:, None, :])


def mixtoken_mask_from_box(box: tuple[int, int, int, int], grid: tuple[int, int]) -> MixTokenMask:
    """The mask of one given box (y0, x0, y1, x1) on the token grid (h, w), for a batch mixed as one shard.

    Raises:
      ValueError: the box does not lie on the grid.
    """
    y0, x0, y1, x1 = (int(v) for v in box)
    h, w = grid
    if not (0 <= y0 <= y1 <= h and 0 <= x0 <= x1 <= w):
        raise ValueError(
            f"MixToken box (y0, x0, y1, x1) = {(y0, x0, y1, x1)} does not lie on the {h}x{w} token grid."
        )
    mask = np.zeros((1, h, w), bool)
    mask[:, y0:y1, x0:x1] = True
    return _with_share(jnp.asarray(mask))


def mix_tokens(tokens: Array, mix: MixTokenMask) -> Array:
    """Swaps the masked tokens [B, h, w, ...] with those of the partner; applied twice it gives the tokens
    back.

    Raises:
      ValueError: B is no multiple of the number of shards, or the grids differ.
    """
    shards, h, w = mix.mask.shape
    batch = tokens.shape[0]
    if batch % shards:
        raise ValueError(f"A batch of {batch} images cannot be mixed in {shards} equal shards.")
    if tokens.shape[1:3] != (h, w):
        raise ValueError(f"MixToken mask of {h}x{w} on a token grid of {tokens.shape[1]}x{tokens.shape[2]}.")
    own = tokens.reshape(shards, batch // shards, *tokens.shape[1:])
    mask = mix.mask.reshape(shards, 1, h, w, *(1,) * (tokens.ndim - 3))
    return jnp.where(mask, own[:, ::-1], own).reshape(tokens.shape)


def mix_by_area(values: Array, mix: MixTokenMask) -> Array:
    """lam * own + (1 - lam) * partner's, for values [B, ...] of whole images (the class token's targets)."""
    shards = mix.lam.shape[0]
    own = values.reshape(shards, values.shape[0] // shards, *values.shape[1:])
    lam = mix.lam.reshape(shards, *(1,) * values.ndim).astype(values.dtype)
    return (lam * own + (1 - lam) * own[:, ::-1]).reshape(values.shape)


def _with_share(mask: Array) -> MixTokenMask:
    return MixTokenMask(mask=mask, lam=1.0 - jnp.mean(mask.astype(jnp.float32), axis=(1, 2)))
