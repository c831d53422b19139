"""Mixing on the device: MixToken for token labels, mixup, cutmix and random erasing.

MixToken (Jiang et al. 2021, arXiv:2104.10858) is CutMix on the token grid, after the patch stem: tokens
inside a random box are those of the partner image. Every shard of the batch is mixed with its own reversal,
so no device needs another's images.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tlvit.types import Array, MixTokenMask, pytree


@pytree
class ImageMix:
    """How the images of a batch are mixed with their partners (as in `MixTokenMask`).

    Attributes:
      mask: bool [S, H, W], True where a pixel is the partner's (cutmix).
      blend: float32 [S], the own share of every other pixel (mixup).
      lam: float32 [S], the own share of the target.
    """

    mask: Array
    blend: Array
    lam: Array


def draw_mixtoken_mask(
    key: Array, grid: tuple[int, int], shards: int = 1, *, alpha: float = 1.0
) -> MixTokenMask:
    """Draws one box for each shard: its area share is Beta(alpha, alpha), its center uniform on the grid, its
    parts outside of the grid cut off, as in CutMix.

    Args:
      key: PRNG key.
      grid: (h, w) of the tokens.
      shards: S, the number of independently mixed parts of the batch.
      alpha: of the Beta distribution; 1 in the paper.
    """
    h, w = grid
    key_share, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1.0 - _beta(key_share, alpha, shards))
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


def mix_by_area(values: Array, mix: MixTokenMask | ImageMix) -> Array:
    """lam * own + (1 - lam) * partner's, for values [B, ...] of whole images (the class token's targets)."""
    shards = mix.lam.shape[0]
    own = values.reshape(shards, values.shape[0] // shards, *values.shape[1:])
    lam = mix.lam.reshape(shards, *(1,) * values.ndim).astype(values.dtype)
    return (lam * own + (1 - lam) * own[:, ::-1]).reshape(values.shape)


def draw_image_mix(
    key: Array, image_size: tuple[int, int], shards: int = 1, *, mixup: float, cutmix: float
) -> ImageMix:
    """Draws mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) for each shard of a batch, each half of the
    time if both are on.

    Args:
      key: PRNG key.
      image_size: (H, W).
      shards: S.
      mixup, cutmix: alphas of the Beta distributions, 0 is off.

    Raises:
      ValueError: both are off.
    """
    if not mixup and not cutmix:
        raise ValueError("Mixing images needs an alpha above 0 for mixup or cutmix.")
    key_choice, key_share, key_box = jax.random.split(key, 3)
    box = draw_mixtoken_mask(key_box, image_size, shards, alpha=cutmix or 1.0)
    share = _beta(key_share, mixup or 1.0, shards)
    choose = jax.random.bernoulli(key_choice) if mixup and cutmix else jnp.bool_(bool(cutmix))
    return ImageMix(
        mask=box.mask & choose, blend=jnp.where(choose, 1.0, share), lam=jnp.where(choose, box.lam, share)
    )


def mix_images(images: Array, mix: ImageMix) -> Array:
    """Mixes every shard of the images [B, H, W, C] with its own reversal; their targets mix by
    `mix_by_area`."""
    blended = mix_by_area(images, MixTokenMask(mask=mix.mask, lam=mix.blend))
    shards, height, width = mix.mask.shape
    partner = images.reshape(shards, -1, *images.shape[1:])[:, ::-1].reshape(images.shape)
    mask = jnp.repeat(mix.mask, images.shape[0] // shards, axis=0).reshape(-1, height, width, 1)
    return jnp.where(mask, partner, blended)


def _beta(key: Array, alpha: float, shards: int) -> Array:
    """Beta(alpha, alpha) for each shard; Beta(1, 1) as the uniform it is, without the sampler's loops, which
    would make devices wait for each other."""
    return jax.random.uniform(key, (shards,)) if alpha == 1 else jax.random.beta(key, alpha, alpha, (shards,))


def _with_share(mask: Array) -> MixTokenMask:
    return MixTokenMask(mask=mask, lam=1.0 - jnp.mean(mask.astype(jnp.float32), axis=(1, 2)))
