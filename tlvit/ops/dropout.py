"""Dropout of elements, or of all elements of an image or a channel together."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tlvit.shapes import Float, Float32, PRNGKeyArray
from tlvit.types import Array


def dropout(
    x: Float[Array, "*shape"],
    rate: float | Float32[Array, ""],
    key: PRNGKeyArray | None,
    *,
    axes: Sequence[int] | None = None,
) -> Float[Array, "*shape"]:
    """Sets elements to zero with probability `rate` and divides the others by 1 - rate.

    Args:
      x: the array.
      rate: probability in [0, 1); an array in a loop.
      key: PRNG key. Nothing is dropped without one.
      axes: axes with a draw of their own for each index; elements that differ in other axes only are dropped
        together. None: all axes, so that each element has its own draw.

    Returns:
      An array of the shape and type of `x`; `x` itself without a key or with rate 0.
    """
    if key is None or (isinstance(rate, float | int) and rate == 0):
        return x
    shape = x.shape if axes is None else tuple(n if axis in axes else 1 for axis, n in enumerate(x.shape))
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    # In float32: 1 - rate would be rounded in bfloat16, and all values would be up to 0.2 % off.
    return jnp.where(keep, x.astype(jnp.float32) / (1 - rate), 0).astype(x.dtype)
