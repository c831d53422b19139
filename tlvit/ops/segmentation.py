"""Semantic segmentation: loss, sliding-window and multi-scale inference, confusion matrix and IoU.

Letters for axes as in `tlvit.types`; h and w are rows and columns of logits at any resolution.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlvit.ops.losses import soft_cross_entropy
from tlvit.ops.resize import resize_bilinear
from tlvit.shapes import Float, Float32, Int32, Integer, Num
from tlvit.types import Array, SegmentationOutput

NORMALIZE = ("all", "valid")
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def segmentation_loss(
    output: SegmentationOutput,
    labels: Integer[Array, "B H W"],
    *,
    aux_weight: float = 0.4,
    ignore: int = 255,
    normalize: str = "all",
) -> Float32[Array, ""]:
    """Cross entropy of the decode head plus `aux_weight` times that of the auxiliary head.

    Args:
      output: logits at any resolution. They are resized to that of the labels, bilinearly.
      labels: class index of every pixel.
      aux_weight: weight of the auxiliary head, 0.4 as published. Not used without an auxiliary head.
      ignore: label of the pixels that do not count.
      normalize: "all" divides the sum over the labeled pixels by the number of all pixels, as published;
        "valid" divides by the number of labeled pixels.

    Returns:
      float32 scalar. NaN if a label is neither a class nor `ignore`.

    Raises:
      ValueError: an unknown `normalize`.

    Example:
      >>> output = SegmentationOutput(logits=jnp.zeros((1, 4, 4, 2)))
      >>> labels = jnp.zeros((1, 8, 8), jnp.int32).at[:, 4:].set(255)
      >>> [round(float(segmentation_loss(output, labels, normalize=n)), 4) for n in ("all", "valid")]
      [0.3466, 0.6931]
    """
    entropy = functools.partial(pixel_cross_entropy, labels=labels, ignore=ignore, normalize=normalize)
    loss = entropy(output.logits)
    return loss if output.aux is None else loss + aux_weight * entropy(output.aux)


def pixel_cross_entropy(
    logits: Float[Array, "B _ _ L"],
    labels: Integer[Array, "B H W"],
    *,
    ignore: int = 255,
    normalize: str = "all",
) -> Float32[Array, ""]:
    """The term of one head in `segmentation_loss`, with the same arguments."""
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, not {normalize!r}.")
    num_classes = logits.shape[-1]
    logits = resize_bilinear(logits.astype(jnp.float32), labels.shape[1:])
    loss = soft_cross_entropy(logits, jax.nn.one_hot(labels, num_classes))
    loss = jnp.where((labels >= 0) & (labels < num_classes), loss, jnp.nan)
    counted = labels != ignore
    total = labels.size if normalize == "all" else jnp.maximum(jnp.sum(counted), 1)
    return jnp.sum(jnp.where(counted, loss, 0.0)) / total


def slide_logits(
    apply: Callable[[Array], Array],
    images: Float[Array, "B H W C"],
    *,
    crop: int | Sequence[int],
    stride: int | Sequence[int],
) -> Float32[Array, "B H W L"]:
    """Logits of large images: the mean over windows, as in mmsegmentation.

    Windows start at multiples of the stride. The last one of a row or column is moved back to end at the
    border. An axis shorter than the window has one window of the axis' size. All windows of an image have
    the same size, so `apply` under `jax.jit` compiles once for all images that are larger than the window.

    Args:
      apply: maps images [B, h, w, C] to logits [B, h', w', L], which are resized to the window.
      images: normalized.
      crop: window size in pixels, one number or (height, width). Published: 512.
      stride: distance of windows in pixels, at most the window size. Published: 341.

    Returns:
      float32 [B, H, W, L].

    Raises:
      ValueError: the stride is not in [1, crop].

    Example:
      >>> apply = jax.jit(lambda x: net.apply(params, stats, x)[0].logits)
      >>> logits = slide_logits(apply, images, crop=512, stride=341)
    """
    sides = [(side, side) if isinstance(side, int) else side for side in (crop, stride)]
    starts, sizes = [], []
    for length, window, step in zip(images.shape[1:3], *sides, strict=True):
        starts.append(window_starts(length, window, step))
        sizes.append(min(window, length))
    total = None
    for y in starts[0]:
        for x in starts[1]:
            logits = apply(images[:, y : y + sizes[0], x : x + sizes[1]])
            if total is None:
                total = jnp.zeros((*images.shape[:3], logits.shape[-1]), jnp.float32)
            total = _add_window(total, logits, (y, x), size=tuple(sizes))
    rows, columns = (
        _count_windows(*arguments) for arguments in zip(starts, sizes, images.shape[1:3], strict=True)
    )
    return total / (rows[None, :, None, None] * columns[None, None, :, None])


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis, see `slide_logits`.

    Raises:
      ValueError: the stride is not in [1, window].
    """
    if not 1 <= stride <= window:
        raise ValueError(f"The stride must be in 1..{window}, the window size, not {stride}.")
    count = -(-max(length - window, 0) // stride) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def multi_scale_probs(
    predict: Callable[[Array], Array],
    images: Float[Array, "B H W C"],
    *,
    ratios: Sequence[float] = RATIOS,
    scale: tuple[int, int] = (2048, 512),
    flip: bool = True,
) -> Float32[Array, "B H W L"]:
    """Class probabilities averaged over several image sizes and, if `flip`, over the mirrored images.

    Args:
      predict: maps images [B, h, w, C] to logits at any resolution, for example
        `functools.partial(slide_logits, apply, crop=512, stride=341)`.
      images: normalized. They are resized bilinearly, without antialiasing.
      ratios: factors of `scale`. The published ones are the default.
      scale: limits of the longer and the shorter side, pixels. The image is resized to the largest size
        within them that keeps its proportions.
      flip: also predicts every size mirrored.

    Returns:
      float32 [B, H, W, L]. The sum over classes is 1.

    Example:
      >>> apply = jax.jit(lambda x: net.apply(params, stats, x)[0].logits)
      >>> predict = functools.partial(slide_logits, apply, crop=512, stride=341)
      >>> classes = multi_scale_probs(predict, images).argmax(-1)
    """
    size = images.shape[1:3]
    parts = []
    for ratio in ratios:
        limits = (int(scale[0] * ratio), int(scale[1] * ratio))
        resized = resize_bilinear(images, rescaled_size(size, limits))
        parts.append(_probs(predict, resized, size))
        if flip:
            parts.append(_probs(predict, resized[:, :, ::-1], size)[:, :, ::-1])
    return sum(parts[1:], parts[0]) / len(parts)


def rescaled_size(size: Sequence[int], scale: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) within limits of the longer and the shorter side, at the same proportions.

    Example:
      >>> rescaled_size((683, 512), (2048, 512))
      (683, 512)
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    height, width = (int(side * factor + 0.5) for side in size)
    return height, width


def confusion_matrix(
    pred: Integer[Array, "*shape"], labels: Integer[Array, "*shape"], num_classes: int, *, ignore: int = 255
) -> Int32[Array, "{num_classes} {num_classes}"]:
    """Counts the pixels of every pair of label and predicted class.

    Add the matrices of many batches up on the host, in int64 or float64: one of int32 counts to 2 billion.

    Args:
      pred: predicted class indices.
      labels: class indices. Pixels with the label `ignore` or any other that is not a class do not count.
      num_classes: L.
      ignore: label of the pixels that do not count.

    Returns:
      int32 [L, L]: rows are labels, columns are predictions.

    Example:
      >>> confusion_matrix(jnp.array([0, 1, 1]), jnp.array([0, 0, 255]), 2).tolist()
      [[1, 1], [0, 0]]
    """
    pred, labels = jnp.asarray(pred, jnp.int32), jnp.asarray(labels, jnp.int32)
    is_class = lambda x: (x >= 0) & (x < num_classes)
    counted = (labels != ignore) & is_class(labels) & is_class(pred)
    pair = jnp.where(counted, labels * num_classes + pred, num_classes**2)
    counts = jnp.bincount(pair.ravel(), length=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


def iou_summary(confusion: Num[Array, "L L"]) -> dict[str, np.ndarray | float]:
    """Intersection over union and accuracies of a confusion matrix, computed in float64.

    Args:
      confusion: as from `confusion_matrix`, or a sum of such.

    Returns:
      `iou` [L], the pixels that have the class in labels and prediction, divided by those that have it in
      either; `accuracy` [L], the fraction of a class's pixels that are predicted; their means `miou` and
      `macc`; and `aacc`, the fraction of all pixels that are predicted. All are in [0, 1]. A quotient 0 / 0
      is NaN, and the means leave it out: a class without labels counts in `miou` (as 0) if it is predicted.

    Example:
      >>> summary = iou_summary(np.array([[2, 1], [0, 1]]))
      >>> summary["iou"].round(3).tolist(), summary["aacc"]
      ([0.667, 0.5], 0.75)
    """
    counts = np.asarray(confusion, np.float64)
    hits, labeled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    iou, accuracy = _divide(hits, labeled + predicted - hits), _divide(hits, labeled)
    return {
        "iou": iou,
        "accuracy": accuracy,
        "miou": _mean(iou),
        "macc": _mean(accuracy),
        "aacc": float(_divide(hits.sum(), labeled.sum())),
    }


@functools.partial(jax.jit, static_argnames="size", donate_argnums=0)
def _add_window(total: Array, logits: Array, corner: Sequence[Any], *, size: tuple[int, int]) -> Array:
    """Adds the logits of a window whose first row and column are `corner`, resized to `size`."""
    logits = resize_bilinear(logits.astype(jnp.float32), size)
    start = (0, *corner, 0)
    old = jax.lax.dynamic_slice(total, start, logits.shape)
    return jax.lax.dynamic_update_slice(total, old + logits, start)


def _count_windows(starts: Sequence[int], size: int, length: int) -> Float32[np.ndarray, " {length}"]:
    """The number of windows that cover each pixel of an axis."""
    count = np.zeros(length, np.float32)
    for start in starts:
        count[start : start + size] += 1
    return count


@functools.partial(jax.jit, static_argnums=1)
def _resized_probs(logits: Array, sizes: tuple[tuple[int, int], ...]) -> Array:
    """Softmax of logits, resized to one size after the other."""
    logits = logits.astype(jnp.float32)
    for size in sizes:
        logits = resize_bilinear(logits, size)
    return jax.nn.softmax(logits, axis=-1)


def _probs(predict: Callable[[Array], Array], images: Array, size: Sequence[int]) -> Array:
    """Class probabilities at `size`. The logits are first resized to the images, as published."""
    return _resized_probs(predict(images), (tuple(images.shape[1:3]), tuple(size)))


def _divide(a: Any, b: Any) -> Any:
    with np.errstate(invalid="ignore"):
        return a / b


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
