"""Token labels: from an image's score map and the geometry of its augmentation to soft targets, on the
device."""

import jax
import jax.numpy as jnp

from tlvit.ops.roi_align import roi_weights
from tlvit.types import Array, ScoreMaps, TokenTargets


def make_targets(
    maps: ScoreMaps,
    label: Array,
    geometry: Array,
    *,
    grid: tuple[int, int],
    num_classes: int,
    smoothing: float = 0.1,
) -> TokenTargets:
    """Samples the annotator's logits where the augmented image's tokens lie and turns them into
    probabilities.

    For every token: RoIAlign over the logits (classes outside of the top K count as 0), softmax over all
    classes, smoothing p * (1 - s + s / L) + s / L. The class token's target is the same with one token for
    the whole crop. This is the published arithmetic of token labeling (Jiang et al. 2021, arXiv:2104.10858),
    sampled through one affine map instead of a box.

    Args:
      maps: value [B, K, hm, wm], index [B, K, hm, wm].
      label: int32 [B].
      geometry: float32 [B, 2, 3], final image -> map, see `Batch`.
      grid: (h, w) of the model's tokens, N = h * w.
      num_classes: L.
      smoothing: s; the published default is 0.1.

    Returns:
      TokenTargets in float32: cls [B, L], tokens [B, N, L], truth [B, L].

    Raises:
      ValueError: shapes that do not fit together.
    """
    if maps.value.shape != maps.index.shape or maps.value.ndim != 4:
        raise ValueError(
            f"Score maps need value and index of one shape [B, K, h, w], not {maps.value.shape} "
            f"and {maps.index.shape}."
        )
    batch = maps.value.shape[0]
    if label.shape != (batch,) or geometry.shape != (batch, 2, 3):
        raise ValueError(
            f"For {batch} score maps label must be [{batch}] and geometry [{batch}, 2, 3], "
            f"not {label.shape} and {geometry.shape}."
        )
    logits = _dense_logits(maps, num_classes)
    map_grid = maps.value.shape[2:]

    def targets(token_grid):
        weights = roi_weights(geometry, map_grid, token_grid)
        sampled = jnp.einsum("bnm,bml->bnl", weights, logits, precision="highest")
        share = jax.nn.softmax(sampled, axis=-1)
        return share * (1 - smoothing + smoothing / num_classes) + smoothing / num_classes

    truth = smooth_one_hot(label, num_classes, smoothing)
    return TokenTargets(cls=targets((1, 1))[:, 0], tokens=targets(grid), label=truth)


def smooth_one_hot(label: Array, num_classes: int, smoothing: float = 0.0) -> Array:
    """One-hot labels [B] -> float32 [B, L] with s spread evenly over all classes; rows sum to 1."""
    return jax.nn.one_hot(label, num_classes) * (1 - smoothing) + smoothing / num_classes


def _dense_logits(maps: ScoreMaps, num_classes: int) -> Array:
    """[B, hm * wm, L] with the K logits of every cell in their places and 0 elsewhere; by comparison, not by
    scatter, which XLA fuses and which is the fast way on TPU."""
    batch, top_k, h, w = maps.value.shape
    value = maps.value.astype(jnp.float32).reshape(batch, top_k, h * w, 1)
    index = maps.index.astype(jnp.int32).reshape(batch, top_k, h * w, 1)
    classes = jnp.arange(num_classes, dtype=jnp.int32).reshape(1, 1, 1, num_classes)
    return jnp.sum(jnp.where(index == classes, value, 0.0), axis=1)
