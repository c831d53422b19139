"""Evaluation sums in plain jnp: top-1, top-5 and loss over the images that are not padding."""

import jax.numpy as jnp

from tlvit.losses import soft_cross_entropy
from tlvit.token_labels import smooth_one_hot
from tlvit.types import Array


def classification_sums(logits: Array, label: Array, mask: Array) -> dict[str, Array]:
    """Sums over a batch, to be added up over batches and divided by `count` at the end.

    Args:
      logits: [B, L].
      label: int32 [B].
      mask: bool [B], False for padding.

    Returns:
      float32 scalars `top1`, `top5`, `loss`, `count`. Ties count against the model: the true class must be
      among the best k whatever the order, so a constant output scores 0, not 1.
    """
    logits = logits.astype(jnp.float32)
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    # The true class itself is one of those that are at least as good; NaN compares false and gives rank 0, so
    # it is ruled out.
    rank = jnp.sum(logits >= own, axis=-1)
    ok = mask & jnp.isfinite(own[:, 0])
    loss = soft_cross_entropy(logits, smooth_one_hot(label, logits.shape[-1]))
    return {
        "top1": jnp.sum((rank <= 1) & ok).astype(jnp.float32),
        "top5": jnp.sum((rank <= 5) & ok).astype(jnp.float32),
        "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        "count": jnp.sum(mask).astype(jnp.float32),
    }
