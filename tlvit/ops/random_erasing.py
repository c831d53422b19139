"""Random erasing on the device."""

import jax
import jax.numpy as jnp

from tlvit.types import Array


def random_erasing(
    key: Array,
    images: Array,
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Array:
    """Replaces one random box of an image by standard normal noise (Zhong et al. 2020, "pixel" mode).

    Args:
      key: PRNG key.
      images: float [B, H, W, C], normalized.
      probability: of an image to be erased.
      area: share of the image, drawn uniformly.
      ratio: height over width, drawn log-uniformly; of ten draws the first box that fits counts.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 6)
    share = jax.random.uniform(keys[0], (batch, 10), minval=area[0], maxval=area[1]) * height * width
    aspect = jnp.exp(
        jax.random.uniform(keys[1], (batch, 10), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1]))
    )
    h, w = jnp.round(jnp.sqrt(share * aspect)), jnp.round(jnp.sqrt(share / aspect))
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    h, w = jnp.take_along_axis(h, first, 1), jnp.take_along_axis(w, first, 1)  # [B, 1]
    top = jnp.floor(jax.random.uniform(keys[2], (batch, 1)) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(keys[3], (batch, 1)) * (width - w + 1))
    rows, columns = jnp.arange(height)[None, :], jnp.arange(width)[None, :]
    inside_y = (rows >= top) & (rows < top + h)
    inside_x = (columns >= left) & (columns < left + w)
    erase = jax.random.bernoulli(keys[4], probability, (batch,)) & jnp.any(fits, axis=1)
    mask = inside_y[:, :, None] & inside_x[:, None, :] & erase[:, None, None]
    return jnp.where(mask[..., None], jax.random.normal(keys[5], images.shape, images.dtype), images)
