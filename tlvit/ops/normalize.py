"""From uint8 pixels to the normalized input of a model."""

from collections.abc import Sequence

import jax.numpy as jnp

from tlvit.shapes import Float32, Num
from tlvit.types import Array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    image: Num[Array, "B H W C"],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float32[Array, "B H W C"]:
    """Computes (image / 255 - mean) / std for each channel.

    Args:
      image: [B, H, W, C], uint8 or numbers from 0 to 255.
      mean: C numbers, of pixels in [0, 1].
      std: C numbers, of pixels in [0, 1].

    Returns:
      float32 [B, H, W, C].

    Example:
      >>> import numpy as np
      >>> normalize(np.full((1, 1, 1, 3), 255, np.uint8), mean=(0.5,) * 3, std=(0.5,) * 3).ravel().tolist()
      [1.0, 1.0, 1.0]
    """
    shift, scale = (jnp.array(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (image.astype(jnp.float32) / 255 - shift) / scale
