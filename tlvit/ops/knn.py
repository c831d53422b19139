"""The weighted k-nearest-neighbor classifier on features."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tlvit.shapes import Float, Float32, Int
from tlvit.types import Array


def knn_scores(
    queries: Float[Array, "Q D"],
    features: Float[Array, "N D"],
    labels: Int[Array, " N"],
    *,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = 0.07,
) -> Float32[Array, "K Q {num_classes}"]:
    """The votes of the k nearest images for every class.

    The nearness of two images is the cosine s of their features, and a neighbor votes for its class with
    exp(s / temperature) (Wu et al. 2018, arXiv:1805.01978). DINO (Caron et al. 2021, arXiv:2104.14294)
    evaluates so, with k of 10, 20, 100 and 200.

    Args:
      queries: features of the images to classify.
      features: features of the images whose labels are known.
      labels: [N], their class indices.
      ks: the K numbers of neighbors, each from 1 to N.
      num_classes: L.
      temperature: above 0.

    Returns:
      float32 [K, Q, L].

    Raises:
      ValueError: a number of neighbors is out of range.

    Example:
      >>> features = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
      >>> scores = knn_scores(features[:1], features, jnp.array([4, 1, 0]), ks=(1, 2), num_classes=5)
      >>> scores.shape, int(scores[0, 0].argmax())  # the nearest image is the image itself
      ((2, 1, 5), 4)
    """
    if not ks or min(ks) < 1 or max(ks) > features.shape[0]:
        raise ValueError(f"k must be from 1 to {features.shape[0]}, the number of known images, not {ks}.")
    cosines = jnp.matmul(_unit(queries), _unit(features).T, precision="highest")
    nearest, index = jax.lax.top_k(cosines, max(ks))
    # The largest cosine of a query is subtracted: a factor that all votes of the query have.
    votes = jnp.exp((nearest - nearest[:, :1]) / temperature)[..., None]
    votes = votes * jax.nn.one_hot(labels[index], num_classes)
    return jnp.stack([jnp.sum(votes[:, :k], axis=1) for k in ks])


def _unit(x: Array) -> Array:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
