"""Random erasing of image regions, on the device."""

import jax
import jax.numpy as jnp

from tlvit.shapes import Float, PRNGKeyArray
from tlvit.types import Array


def random_erasing(
    key: PRNGKeyArray,
    images: Float[Array, "B H W C"],
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Float[Array, "B H W C"]:
    """Replaces one random box of an image by standard normal noise.

    Random erasing (Zhong et al. 2020, arXiv:1708.04896) in the "pixel" mode of timm.

    Args:
      key: PRNG key.
      images: [B, H, W, C], normalized.
      probability: in [0, 1], that an image gets a box.
      area: range of the box's area as a fraction of the image, drawn uniformly.
      ratio: range of height / width, drawn log-uniformly. The first of ten boxes that fits into the image is
        used; if none fits, the image is unchanged.

    Returns:
      [B, H, W, C] in the type of `images`.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 6)
    pixels = jax.random.uniform(keys[0], (batch, 10), minval=area[0], maxval=area[1]) * height * width
    aspect = jnp.exp(
        jax.random.uniform(keys[1], (batch, 10), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1]))
    )
    h, w = jnp.round(jnp.sqrt(pixels * aspect)), jnp.round(jnp.sqrt(pixels / aspect))
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
