"""Mixing of images and tokens on the device: MixToken for token labels, mixup and CutMix.

MixToken (Jiang et al. 2021, arXiv:2104.10858) is CutMix on the token grid, after the patch stem: the tokens
inside a random box are those of the partner image. Every shard of the batch is mixed with itself in reverse
order, so no device needs the images of another one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from tlvit.shapes import Bool, Float, Float32, Int, PRNGKeyArray, Shaped
from tlvit.types import Array, MixTokenMask, pytree


@pytree
class ImageMix:
    """How the images of a batch are mixed with their partners (as in `MixTokenMask`).

    Attributes:
      mask: True where a pixel comes from the partner (CutMix).
      blend: weight of an image in its other pixels (mixup).
      lam: weight of an image's own target.
    """

    mask: Bool[Array, "S H W"]
    blend: Float32[Array, " S"]
    lam: Float32[Array, " S"]


def draw_mixtoken_mask(
    key: PRNGKeyArray, grid: tuple[int, int], shards: int = 1, *, alpha: float = 1.0
) -> MixTokenMask:
    """Draws a box on the token grid for each shard of a batch.

    The area of a box is a fraction of the grid drawn from Beta(alpha, alpha), and its center is uniform on
    the grid. Parts outside of the grid are cut off, as in CutMix (Yun et al. 2019, arXiv:1905.04899).

    Args:
      key: PRNG key.
      grid: (h, w) of the tokens.
      shards: S, the number of independently mixed parts of the batch.
      alpha: of the Beta distribution, above 0; 1 in the paper (Jiang et al. 2021, arXiv:2104.10858).

    Returns:
      MixTokenMask: mask [S, h, w] and lam [S].

    Raises:
      ValueError: alpha is not above 0, or there is no token or no shard.

    Example:
      >>> mix = draw_mixtoken_mask(jax.random.key(0), (14, 14), shards=2)
      >>> mix.mask.shape, mix.lam.shape
      ((2, 14, 14), (2,))
    """
    h, w = grid
    if not alpha > 0 or min(h, w, shards) < 1:
        raise ValueError(f"MixToken needs alpha > 0, a grid and a shard, not {alpha}, {h}x{w} and {shards}.")
    key_area, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1.0 - _beta(key_area, alpha, shards))
    half_h = jnp.floor(h * side).astype(jnp.int32) // 2
    half_w = jnp.floor(w * side).astype(jnp.int32) // 2
    y = jax.random.randint(key_y, (shards,), 0, h)
    x = jax.random.randint(key_x, (shards,), 0, w)
    rows = jnp.arange(h)[None, :]
    columns = jnp.arange(w)[None, :]
    inside_y = (rows >= (y - half_h)[:, None]) & (rows < (y + half_h)[:, None])
    inside_x = (columns >= (x - half_w)[:, None]) & (columns < (x + half_w)[:, None])
    return _with_lam(inside_y[:, :, None] & inside_x[:, None, :])


def mixtoken_mask_from_box(box: Sequence[int] | Int[np.ndarray, "4"], grid: tuple[int, int]) -> MixTokenMask:
    """The mask of a given box, for a batch that is mixed as one shard.

    Args:
      box: (y0, x0, y1, x1) in tokens; y1 and x1 are exclusive.
      grid: (h, w) of the tokens.

    Returns:
      MixTokenMask: mask [1, h, w] and lam [1].

    Raises:
      ValueError: the box does not lie on the grid.

    Example:
      >>> mix = mixtoken_mask_from_box((0, 0, 1, 2), (2, 4))
      >>> mix.mask[0].astype(int).tolist(), mix.lam.tolist()
      ([[1, 1, 0, 0], [0, 0, 0, 0]], [0.75])
    """
    y0, x0, y1, x1 = (int(v) for v in box)
    h, w = grid
    if not (0 <= y0 <= y1 <= h and 0 <= x0 <= x1 <= w):
        raise ValueError(
            f"MixToken box (y0, x0, y1, x1) = {(y0, x0, y1, x1)} does not lie on the {h}x{w} token grid."
        )
    mask = np.zeros((1, h, w), bool)
    mask[:, y0:y1, x0:x1] = True
    return _with_lam(jnp.asarray(mask))


def mix_tokens(tokens: Shaped[Array, "B h w *rest"], mix: MixTokenMask) -> Shaped[Array, "B h w *rest"]:
    """Swaps the masked tokens with those of the partner (MixToken, Jiang et al. 2021, arXiv:2104.10858).

    Applied twice it returns the original tokens.

    Args:
      tokens: [B, h, w, ...].
      mix: the mask, for S shards of B / S images.

    Returns:
      [B, h, w, ...].

    Raises:
      ValueError: B is not a multiple of the number of shards, or the grids differ.

    Example:
      >>> tokens = jnp.array([[[1, 1]], [[2, 2]]])  # two images of 1 x 2 tokens
      >>> mix_tokens(tokens, mixtoken_mask_from_box((0, 0, 1, 1), (1, 2))).tolist()
      [[[2, 1]], [[1, 2]]]
    """
    shards, h, w = mix.mask.shape
    batch = tokens.shape[0]
    if batch % shards:
        raise ValueError(f"A batch of {batch} images cannot be mixed in {shards} equal shards.")
    if tokens.shape[1:3] != (h, w):
        raise ValueError(f"MixToken mask of {h}x{w} on a token grid of {tokens.shape[1]}x{tokens.shape[2]}.")
    own = rearrange(tokens, "(s b) ... -> s b ...", s=shards)
    mask = mix.mask.reshape(shards, 1, h, w, *(1,) * (tokens.ndim - 3))
    return rearrange(jnp.where(mask, own[:, ::-1], own), "s b ... -> (s b) ...")


def mix_by_area(values: Float[Array, " B *rest"], mix: MixTokenMask | ImageMix) -> Float[Array, " B *rest"]:
    """Computes lam * own + (1 - lam) * partner for values of an image, for example its class target.

    Args:
      values: [B, ...].
      mix: lam [S], for S shards of B / S images.

    Returns:
      [B, ...].

    Raises:
      ValueError: B is not a multiple of the number of shards.
    """
    shards = mix.lam.shape[0]
    if values.shape[0] % shards:
        raise ValueError(f"A batch of {values.shape[0]} images cannot be mixed in {shards} equal shards.")
    own = rearrange(values, "(s b) ... -> s b ...", s=shards)
    lam = mix.lam.reshape(shards, *(1,) * values.ndim).astype(values.dtype)
    return rearrange(lam * own + (1 - lam) * own[:, ::-1], "s b ... -> (s b) ...")


def draw_image_mix(
    key: PRNGKeyArray, image_size: tuple[int, int], shards: int = 1, *, mixup: float, cutmix: float
) -> ImageMix:
    """Draws mixup (Zhang et al. 2018, arXiv:1710.09412) or CutMix (Yun et al. 2019, arXiv:1905.04899).

    If both are on, every shard draws one of them, each with probability 1/2.

    Args:
      key: PRNG key.
      image_size: (H, W).
      shards: S, the number of independently mixed parts of the batch.
      mixup: alpha of the Beta distribution of mixup; 0 turns it off.
      cutmix: alpha of the Beta distribution of CutMix; 0 turns it off.

    Returns:
      ImageMix: mask [S, H, W], blend [S] and lam [S].

    Raises:
      ValueError: both are off.
    """
    if not mixup and not cutmix:
        raise ValueError("Mixing images needs an alpha above 0 for mixup or cutmix.")
    key_choice, key_blend, key_box = jax.random.split(key, 3)
    box = draw_mixtoken_mask(key_box, image_size, shards, alpha=cutmix or 1.0)
    blend = _beta(key_blend, mixup or 1.0, shards)
    both = jax.random.bernoulli(key_choice, shape=(shards,))
    choose = both if mixup and cutmix else jnp.full((shards,), bool(cutmix))
    return ImageMix(
        mask=box.mask & choose[:, None, None],
        blend=jnp.where(choose, 1.0, blend),
        lam=jnp.where(choose, box.lam, blend),
    )


def mix_images(images: Float[Array, "B H W C"], mix: ImageMix) -> Float[Array, "B H W C"]:
    """Mixes every shard of the images with itself in reverse order. `mix_by_area` mixes their targets.

    Args:
      images: [B, H, W, C].
      mix: as from `draw_image_mix`, for S shards of B / S images.

    Returns:
      [B, H, W, C].
    """
    blended = mix_by_area(images, MixTokenMask(mask=mix.mask, lam=mix.blend))
    shards = mix.mask.shape[0]
    partner = rearrange(images, "(s b) h w c -> s b h w c", s=shards)[:, ::-1]
    partner = rearrange(partner, "s b h w c -> (s b) h w c")
    mask = repeat(mix.mask, "s h w -> (s b) h w 1", b=images.shape[0] // shards)
    return jnp.where(mask, partner, blended)


def _beta(key: jax.Array, alpha: float, shards: int) -> Array:
    """Beta(alpha, alpha) for each shard. Beta(1, 1) is drawn as the uniform distribution: the loops of the
    general sampler would make devices wait for each other."""
    return jax.random.uniform(key, (shards,)) if alpha == 1 else jax.random.beta(key, alpha, alpha, (shards,))


def _with_lam(mask: Array) -> MixTokenMask:
    """The mask [S, h, w] with the fraction of tokens that an image keeps."""
    return MixTokenMask(mask=mask, lam=1.0 - jnp.mean(mask.astype(jnp.float32), axis=(1, 2)))
