"""Soft targets from the score maps of images and the geometry of their augmentation, on the device."""

import jax
import jax.numpy as jnp
from einops import rearrange

from tlvit.ops.roi_align import roi_weights
from tlvit.shapes import Float, Float32, Int
from tlvit.types import Array, ScoreMaps, TokenTargets

ROUNDING = 1e-4  # of the sum of a token's sampling weights; a single sample has a larger weight


def make_targets(
    maps: ScoreMaps,
    label: Int[Array, " B"],
    geometry: Float[Array, "B 2 3"],
    *,
    grid: tuple[int, int],
    num_classes: int,
    smoothing: float = 0.1,
) -> TokenTargets:
    """Samples the annotator's logits at the tokens of the augmented images and turns them into probabilities.

    For every token: RoIAlign over the logits (classes outside of the top K count as 0), softmax over all
    classes, smoothing p * (1 - s + s / L) + s / L. The class token's target is the same with one token for
    the entire crop. This is the published arithmetic of token labeling (Jiang et al. 2021, arXiv:2104.10858),
    sampled through an affine map instead of a box.

    The published code samples zeros outside of the map, which make a uniform target. Here only what the map
    covers is sampled: the weight of a token is the fraction of its samples inside the map, and the class
    token of an image without any coverage learns the label.

    Args:
      maps: value [B, K, hm, wm] and index [B, K, hm, wm].
      label: [B], class indices.
      geometry: [B, 2, 3], augmented image -> annotated image, see `Batch`.
      grid: (h, w) of the model's tokens, N = h * w.
      num_classes: L.
      smoothing: s, in [0, 1]; the published default is 0.1.

    Returns:
      TokenTargets in float32: cls [B, L], tokens [B, N, L], label [B, L], weight [B, N].

    Raises:
      ValueError: shapes that do not fit together, labels or class indices that are no integers, or a
        smoothing out of range. `tlvit.check_batch` checks the values.

    Example:
      >>> import numpy as np
      >>> maps = ScoreMaps(value=np.full((1, 2, 4, 4), 3, np.float16), index=np.zeros((1, 2, 4, 4), np.int32))
      >>> identity = np.array([[[1, 0, 0], [0, 1, 0]]], np.float32)
      >>> targets = make_targets(maps, np.array([0]), identity, grid=(2, 2), num_classes=5)
      >>> targets.cls.shape, targets.tokens.shape, targets.label.shape, targets.weight.tolist()
      ((1, 5), (1, 4, 5), (1, 5), [[1.0, 1.0, 1.0, 1.0]])
    """
    if maps.value.shape != maps.index.shape or maps.value.ndim != 4:
        raise ValueError(
            f"Score maps need value and index of one shape [B, K, h, w], not {maps.value.shape} "
            f"and {maps.index.shape}."
        )
    if not jnp.issubdtype(maps.index.dtype, jnp.integer):
        raise ValueError(f"The class indices of score maps must be integers, not {maps.index.dtype}.")
    batch = maps.value.shape[0]
    if label.shape != (batch,) or geometry.shape != (batch, 2, 3):
        raise ValueError(
            f"For {batch} score maps label must be [{batch}] and geometry [{batch}, 2, 3], "
            f"not {label.shape} and {geometry.shape}."
        )
    logits = _dense_logits(maps, num_classes)
    map_grid = maps.value.shape[2:]

    def targets(token_grid: tuple[int, int]) -> tuple[Array, Array]:
        weights = roi_weights(geometry, map_grid, token_grid)
        covered = jnp.sum(weights, axis=-1)
        covered = jnp.where(covered > 1 - ROUNDING, 1.0, covered)
        weights = weights / jnp.where(covered > 0, covered, 1.0)[..., None]
        sampled = jnp.einsum("bnm,bml->bnl", weights, logits, precision="highest")
        probabilities = jax.nn.softmax(sampled, axis=-1)
        return probabilities * (1 - smoothing + smoothing / num_classes) + smoothing / num_classes, covered

    one_hot = smooth_one_hot(label, num_classes, smoothing)
    tokens, weight = targets(grid)
    cls, covered = targets((1, 1))
    cls = jnp.where(covered > 0, cls[:, 0], one_hot)
    return TokenTargets(cls=cls, tokens=tokens, label=one_hot, weight=weight)


def smooth_one_hot(
    label: Int[Array, " B"], num_classes: int, smoothing: float = 0.0
) -> Float32[Array, "B L"]:
    """One-hot labels with label smoothing (Szegedy et al. 2016, arXiv:1512.00567).

    Args:
      label: [B], class indices.
      num_classes: L.
      smoothing: s, in [0, 1], spread evenly over all classes.

    Returns:
      float32 [B, L], one_hot * (1 - s) + s / L. Rows sum to 1.

    Raises:
      ValueError: the labels are no integers, or the smoothing is out of range.
    """
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(f"Labels must be class indices of an integer type, not {label.dtype}.")
    if isinstance(smoothing, int | float) and not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], not {smoothing}.")
    return jax.nn.one_hot(label, num_classes) * (1 - smoothing) + smoothing / num_classes


def _dense_logits(maps: ScoreMaps, num_classes: int) -> Array:
    """[B, hm * wm, L]: the K logits of every cell at their classes and 0 elsewhere.

    The comparison with all classes is fused by XLA and faster than a scatter on TPU.
    """
    value = rearrange(maps.value.astype(jnp.float32), "b k h w -> b k (h w) 1")
    index = rearrange(maps.index.astype(jnp.int32), "b k h w -> b k (h w) 1")
    classes = jnp.arange(num_classes, dtype=jnp.int32).reshape(1, 1, 1, num_classes)
    return jnp.sum(jnp.where(index == classes, value, 0.0), axis=1)
