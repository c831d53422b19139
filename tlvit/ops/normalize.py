"""From uint8 pixels to the normalized input of a model."""

import jax.numpy as jnp

from tlvit.types import Array

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    image: Array, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Array:
    """uint8 [B, H, W, 3] -> float32, (x / 255 - mean) / std."""
    mean, std = (jnp.array(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (image.astype(jnp.float32) / 255 - mean) / std
