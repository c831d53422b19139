"""Evaluation sums: top-1, top-5 and loss over the images that are not padding."""

import jax.numpy as jnp

from tlvit.ops.losses import soft_cross_entropy
from tlvit.ops.targets import smooth_one_hot
from tlvit.shapes import Bool, Float, Int
from tlvit.types import Array


def classification_sums(
    logits: Float[Array, "B L"],
    label: Int[Array, " B"],
    mask: Bool[Array, " B"],
    real_labels: Int[Array, "B R"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Sums over a batch. Add them up over batches and divide by `count` at the end.

    Ties count against the model: the correct class must be among the best k in any order of equal logits, so
    a constant output scores 0, not 1. An image with a logit that is NaN is not correct.

    Args:
      logits: [B, L].
      label: [B], class indices.
      mask: [B], False for padding.
      real_labels: [B, R], all correct labels of an image padded with -1, as in `Batch`; or None.

    Returns:
      float32 scalars `top1`, `top5`, `loss` and `count`. With real_labels also `real`, the number of images
      whose best class is one of their correct labels, and `real_count`, the number of those that have correct
      labels (ImageNet ReaL, Beyer et al. 2020, arXiv:2006.07159).

    Example:
      >>> import numpy as np
      >>> sums = classification_sums(np.eye(10, dtype=np.float32), np.arange(10), np.arange(10) < 8)
      >>> float(sums["top1"]), float(sums["count"])
      (8.0, 8.0)
    """
    logits = logits.astype(jnp.float32)
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    # The number of classes at least as good as the correct one, itself included. Comparisons with NaN are
    # false, so rows with NaN are excluded separately.
    rank = jnp.sum(logits >= own, axis=-1)
    valid = mask & jnp.isfinite(own[:, 0]) & ~jnp.any(jnp.isnan(logits), axis=-1)
    loss = soft_cross_entropy(logits, smooth_one_hot(label, logits.shape[-1]))
    sums: dict[str, Array] = {
        "top1": jnp.sum((rank <= 1) & valid).astype(jnp.float32),
        "top5": jnp.sum((rank <= 5) & valid).astype(jnp.float32),
        "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        "count": jnp.sum(mask).astype(jnp.float32),
    }
    return sums if real_labels is None else sums | _real_label_sums(logits, mask, real_labels)


def _real_label_sums(logits: Array, mask: Array, real_labels: Array) -> dict[str, Array]:
    """The sums `real` and `real_count`, see `classification_sums`."""
    classes = jnp.arange(logits.shape[-1], dtype=real_labels.dtype)
    correct = jnp.any(real_labels[:, :, None] == classes[None, None, :], axis=1)  # [B, L]
    best_correct = jnp.max(jnp.where(correct, logits, -jnp.inf), axis=-1)
    best_wrong = jnp.max(jnp.where(correct, -jnp.inf, logits), axis=-1)  # NaN if any is NaN: never correct
    counted = mask & jnp.any(correct, axis=-1)
    hit = counted & (best_correct > best_wrong) & jnp.isfinite(best_correct)
    return {"real": jnp.sum(hit).astype(jnp.float32), "real_count": jnp.sum(counted).astype(jnp.float32)}
