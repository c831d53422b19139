"""Soft targets on the device: from stored score maps and the geometry of the augmentation, or from the logits
of an annotator that scores the augmented images."""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from tlvit.ops.roi_align import roi_weights
from tlvit.shapes import Float, Float32, Int
from tlvit.types import Array, ScoreMaps, TokenTargets

POINTS = 4  # along each side of a token, at which its padding is looked for
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
        return _probabilities(sampled, smoothing), covered

    one_hot = smooth_one_hot(label, num_classes, smoothing)
    tokens, weight = targets(grid)
    cls, covered = targets((1, 1))
    cls = jnp.where(covered > 0, cls[:, 0], one_hot)
    return TokenTargets(cls=cls, tokens=tokens, label=one_hot, weight=weight)


def make_online_targets(
    logits: Float[Array, "B hm wm L"],
    label: Int[Array, " B"],
    geometry: Float[Array, "B 2 3"],
    *,
    grid: tuple[int, int],
    smoothing: float = 0.1,
) -> TokenTargets:
    """The targets of images that the annotator has scored as they are: augmented, and with all classes.

    They equal those of `make_targets` for score maps that keep all L classes and the identity as geometry,
    up to the float16 of stored maps: RoIAlign from the annotator's cells to the tokens, softmax over all
    classes, smoothing. The class token's target is that of the whole image.

    The geometry only says which parts of an image are padding of its augmentation. The weight of a token is
    the fraction of it that is not, and the class token learns the mean of the other cells, or the label if
    there are none.

    Args:
      logits: [B, hm, wm, L], the annotator's dense logits of the augmented images.
      label: [B], class indices.
      geometry: [B, 2, 3], augmented image -> the same image before its padding, see `Batch`.
      grid: (h, w) of the model's tokens, N = h * w.
      smoothing: s, in [0, 1].

    Returns:
      TokenTargets in float32: cls [B, L], tokens [B, N, L], label [B, L], weight [B, N].

    Raises:
      ValueError: labels that are no integers, or a smoothing out of range.

    Example:
      >>> identity = jnp.array([[[1.0, 0, 0], [0, 1, 0]]])
      >>> targets = make_online_targets(jnp.zeros((1, 4, 4, 5)), jnp.array([0]), identity, grid=(2, 2))
      >>> targets.cls.shape, targets.tokens.shape, targets.weight.tolist()
      ((1, 5), (1, 4, 5), [[1.0, 1.0, 1.0, 1.0]])
    """
    map_grid = (logits.shape[1], logits.shape[2])
    one_hot = smooth_one_hot(label, logits.shape[-1], smoothing)
    cells = rearrange(logits.astype(jnp.float32), "b h w l -> b (h w) l")
    identity = jnp.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    sampling = roi_weights(identity, map_grid, grid)[0]  # [N, M], the same for all images
    tokens = jnp.einsum("nm,bml->bnl", sampling, cells, precision="highest")
    covered = _inside(geometry, map_grid)
    total = jnp.sum(covered, axis=1, keepdims=True)
    mean = jnp.einsum("bm,bml->bl", covered / jnp.maximum(total, ROUNDING), cells, precision="highest")
    return TokenTargets(
        cls=jnp.where(total > 0, _probabilities(mean, smoothing), one_hot),
        tokens=_probabilities(tokens, smoothing),
        label=one_hot,
        weight=_inside(geometry, grid),
    )


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


def _probabilities(logits: Array, smoothing: float) -> Array:
    """softmax, then p * (1 - s + s / L) + s / L."""
    num_classes = logits.shape[-1]
    probabilities = jax.nn.softmax(logits, axis=-1)
    return probabilities * (1 - smoothing + smoothing / num_classes) + smoothing / num_classes


def _inside(geometry: Array, grid: tuple[int, int]) -> Array:
    """[B, h * w]: the fraction of POINTS x POINTS points of each cell that the geometry maps into
    [0, 1] x [0, 1]."""
    y, x = ((jnp.arange(POINTS * side) + 0.5) / (POINTS * side) for side in grid)
    points = jnp.stack(jnp.broadcast_arrays(x[None, :], y[:, None]))
    source = jnp.einsum("bij,jyx->biyx", geometry[:, :, :2], points, precision="highest")
    source += geometry[:, :, 2, None, None]
    inside = jnp.all((source >= 0) & (source <= 1), axis=1).astype(jnp.float32)
    return reduce(inside, "b (h y) (w x) -> b (h w)", "mean", y=POINTS, x=POINTS)


def _dense_logits(maps: ScoreMaps, num_classes: int) -> Array:
    """[B, hm * wm, L]: the K logits of every cell at their classes and 0 elsewhere.

    The comparison with all classes is fused by XLA and faster than a scatter on TPU.
    """
    value = rearrange(maps.value.astype(jnp.float32), "b k h w -> b k (h w) 1")
    index = rearrange(maps.index.astype(jnp.int32), "b k h w -> b k (h w) 1")
    classes = jnp.arange(num_classes, dtype=jnp.int32).reshape(1, 1, 1, num_classes)
    return jnp.sum(jnp.where(index == classes, value, 0.0), axis=1)
