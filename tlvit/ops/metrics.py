"""Evaluation sums in plain jnp: top-1, top-5 and loss over the images that are not padding."""

import jax.numpy as jnp

from tlvit.ops.losses import soft_cross_entropy
from tlvit.ops.targets import smooth_one_hot
from tlvit.types import Array


def classification_sums(
    logits: Array, label: Array, mask: Array, real: Array | None = None
) -> dict[str, Array]:
    """Sums over a batch, to be added up over batches and divided by `count` at the end.

    Args:
      logits: [B, L].
      label: int32 [B].
      mask: bool [B], False for padding.
      real: int32 [B, R], sets of right labels padded with -1, as in `Batch`; or None.

    Returns:
      float32 scalars `top1`, `top5`, `loss`, `count`. Ties count against the model: the true class must be
      among the best k whatever the order, so a constant output scores 0, not 1. With `real` also `real`, the
      images whose best class is in their set, and `real_count`, those whose set is not empty (Beyer et al.
      2020, arXiv:2006.07159).
    """
    logits = logits.astype(jnp.float32)
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    # The true class itself is one of those that are at least as good; NaN compares false, so a row that has
    # any is ruled out.
    rank = jnp.sum(logits >= own, axis=-1)
    ok = mask & jnp.isfinite(own[:, 0]) & ~jnp.any(jnp.isnan(logits), axis=-1)
    loss = soft_cross_entropy(logits, smooth_one_hot(label, logits.shape[-1]))
    sums = {
        "top1": jnp.sum((rank <= 1) & ok).astype(jnp.float32),
        "top5": jnp.sum((rank <= 5) & ok).astype(jnp.float32),
        "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        "count": jnp.sum(mask).astype(jnp.float32),
    }
    return sums if real is None else sums | _real_sums(logits, mask, real)


def _real_sums(logits: Array, mask: Array, real: Array) -> dict[str, Array]:
    classes = jnp.arange(logits.shape[-1], dtype=real.dtype)
    right = jnp.any(real[:, :, None] == classes[None, None, :], axis=1)  # [B, L]
    best_right = jnp.max(jnp.where(right, logits, -jnp.inf), axis=-1)
    best_wrong = jnp.max(jnp.where(right, -jnp.inf, logits), axis=-1)  # NaN if any is: never right
    judged = mask & jnp.any(right, axis=-1)
    hit = judged & (best_right > best_wrong) & jnp.isfinite(best_right)
    return {"real": jnp.sum(hit).astype(jnp.float32), "real_count": jnp.sum(judged).astype(jnp.float32)}
