"""Attention of all model families: softmax attention and the linear attention of the Performer."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from tlvit.ops.dropout import dropout
from tlvit.shapes import Float, Float32, PRNGKeyArray
from tlvit.types import Array


def attend(
    query: Float[Array, "B heads N d"],
    key: Float[Array, "B heads M d"],
    value: Float[Array, "B heads M d"],
    *,
    scale: float,
    drop_rate: float = 0.0,
    drop_key: PRNGKeyArray | None = None,
) -> Float[Array, "B heads N d"]:
    """Softmax attention (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
      query: [B, heads, N, d].
      key: [B, heads, M, d].
      value: [B, heads, M, d].
      scale: factor of the logits, as a rule d ** -0.5.
      drop_rate: probability in [0, 1) with which an attention weight is set to zero.
      drop_key: PRNG key of the dropout. Nothing is dropped without one.

    Returns:
      [B, heads, N, d] in the type of `value`.
    """
    weights = dropout(attention_weights(query, key, scale=scale).astype(value.dtype), drop_rate, drop_key)
    return apply_weights(weights, value)


def attention_weights(
    query: Float[Array, "B heads N d"], key: Float[Array, "B heads M d"], *, scale: float
) -> Float32[Array, "B heads N M"]:
    """The weights softmax(scale * query @ key^T) of softmax attention.

    Args:
      query: [B, heads, N, d].
      key: [B, heads, M, d].
      scale: factor of the logits.

    Returns:
      float32 [B, heads, N, M]. Rows sum to 1. Logits and softmax are float32 whatever the input's type.
    """
    logits = jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits * scale, axis=-1)


def apply_weights(
    weights: Float[Array, "B heads N M"], value: Float[Array, "B heads M d"]
) -> Float[Array, "B heads N d"]:
    """The values, summed with attention weights. `attend` does this with the weights of queries and keys.

    Args:
      weights: [B, heads, N, M].
      value: [B, heads, M, d].

    Returns:
      [B, heads, N, d] in the type of `value`.
    """
    return jnp.einsum("bhnm,bhmd->bhnd", weights.astype(value.dtype), value)


def performer_attention(
    query: Float[Array, "B N D"],
    key: Float[Array, "B N D"],
    value: Float[Array, "B N D"],
    features: Float[Array, "m D"],
    *,
    epsilon: float = 1e-8,
) -> Float32[Array, "B N D"]:
    """Attention by positive random features, linear in N, without overflow or underflow.

    With phi(x) = exp(w x - |x|^2 / 2) / sqrt(m) the result is
    sum_n phi(q) . phi(k_n) v_n / (sum_n phi(q) . phi(k_n) + epsilon), the softmax kernel of the Performer
    (Choromanski et al. 2020, arXiv:2009.14794). The largest log feature of the keys and the largest log
    product of each query are subtracted before the exponentials. The result is the same in exact arithmetic;
    every intermediate value and the gradient stay finite where the plain formula is 0 / 0.

    Args:
      query: [B, N, D].
      key: [B, N, D].
      value: [B, N, D].
      features: w, [m, D], the random features.
      epsilon: is added to the denominator, as published.

    Returns:
      float32 [B, N, D].
    """
    log_query, log_key = (_log_features(x, features) for x in (query, key))
    largest_key = jax.lax.stop_gradient(jnp.max(log_key, axis=1, keepdims=True))  # [B, 1, m]
    log_query = log_query + largest_key
    largest = jax.lax.stop_gradient(jnp.max(log_query, axis=2, keepdims=True))  # [B, N, 1]
    phi_query, phi_key = jnp.exp(log_query - largest), jnp.exp(log_key - largest_key)

    exact = {"precision": jax.lax.Precision.HIGHEST}
    moments = jnp.einsum("bnd,bnm->bmd", value.astype(jnp.float32), phi_key, **exact)
    numerator = jnp.einsum("bnm,bmd->bnd", phi_query, moments, **exact)
    # At least 1: the largest product belongs to a feature whose largest key is 1.
    total = jnp.einsum("bnm,bm->bn", phi_query, jnp.sum(phi_key, axis=1), **exact)[..., None]
    # epsilon gets the same factors: m for the two factors 1 / sqrt(m), and the subtracted logarithm.
    log_epsilon = math.log(epsilon * features.shape[0]) - largest
    return numerator * jnp.exp(-jnp.logaddexp(jnp.log(total), log_epsilon))


def split_heads(x: Float[Array, "B N D"], num_heads: int) -> Float[Array, "B heads N d"]:
    """Splits the channels [B, N, heads * d] into heads [B, heads, N, d]."""
    return rearrange(x, "b n (h d) -> b h n d", h=num_heads)


def merge_heads(x: Float[Array, "B heads N d"]) -> Float[Array, "B N heads*d"]:
    """Merges the heads [B, heads, N, d] into channels [B, N, heads * d]."""
    return rearrange(x, "b h n d -> b n (h d)")


def _log_features(x: Array, features: Array) -> Array:
    """w x - |x|^2 / 2 in float32: [B, N, D], [m, D] -> [B, N, m]."""
    # The bound is larger than any value whose features are not 0, and its square is finite.
    x = jnp.clip(x.astype(jnp.float32), -1e15, 1e15)
    product = jnp.einsum("bnd,md->bnm", x, features, precision=jax.lax.Precision.HIGHEST)
    return product - jnp.sum(x * x, axis=-1, keepdims=True) / 2
