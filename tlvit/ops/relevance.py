"""How much each token contributes to others, from the attention of all blocks: rollout and gradient-weighted
relevance."""

from collections.abc import Sequence

import jax.numpy as jnp

from tlvit.shapes import Float, Float32
from tlvit.types import Array


def attention_rollout(maps: Sequence[Float[Array, "B heads T T"]]) -> Float32[Array, "B T T"]:
    """Attention rollout (Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers",
    arXiv:2005.00928).

    With A_l the mean over the heads of the attention of block l and I the identity, which represents the
    residual connection:

        A_hat_l = (A_l + I) / 2
        rollout = A_hat_L ... A_hat_2 A_hat_1

    Args:
      maps: attention of each block, first block first. Rows sum to 1.

    Returns:
      float32 [B, T, T]. Row i says from which input tokens the output token i was mixed; it sums to 1.

    Raises:
      ValueError: there is no map.
    """
    rollout = _identity(maps)
    for attention in maps:
        mean = jnp.mean(attention.astype(jnp.float32), axis=1)
        rollout = (_product(mean, rollout) + rollout) / 2
    return rollout


def gradient_relevance(
    maps: Sequence[Float[Array, "B heads T T"]], gradients: Sequence[Float[Array, "B heads T T"]]
) -> Float32[Array, "B T T"]:
    """Gradient-weighted relevance (Chefer, Gur & Wolf 2021, "Generic Attention-model Explainability",
    arXiv:2103.15679, the rules for self-attention).

    With A_l the attention of block l, grad A_l the gradient of the explained logit with respect to it, *
    the product of elements, (.)+ the positive part and E_h the mean over the heads:

        A_bar_l = E_h (grad A_l * A_l)+
        R_0 = I,    R_l = R_{l-1} + A_bar_l R_{l-1}

    Args:
      maps: attention of each block, first block first.
      gradients: of the explained logit with respect to each of them.

    Returns:
      R_L, float32 [B, T, T]. Row i says how relevant each input token is for the output token i. Values are
      not normalized: only those of one row can be compared.

    Raises:
      ValueError: there is no map, or not one gradient for each map.
    """
    if len(maps) != len(gradients):
        raise ValueError(f"{len(maps)} attention maps need as many gradients, not {len(gradients)}.")
    relevance = _identity(maps)
    for attention, gradient in zip(maps, gradients, strict=True):
        weighted = attention.astype(jnp.float32) * gradient.astype(jnp.float32)
        relevance = relevance + _product(jnp.mean(jnp.maximum(weighted, 0), axis=1), relevance)
    return relevance


def _identity(maps: Sequence[Array]) -> Array:
    """float32 [B, T, T]."""
    if not maps:
        raise ValueError("There is no attention map.")
    batch, _, tokens, _ = maps[0].shape
    return jnp.broadcast_to(jnp.eye(tokens, dtype=jnp.float32), (batch, tokens, tokens))


def _product(left: Array, right: Array) -> Array:
    """The matrix product in float32, also on devices whose default is less."""
    return jnp.einsum("bij,bjk->bik", left, right, precision="highest")
