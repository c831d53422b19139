"""Checks the values of a batch, which the compiled functions cannot see."""

import numpy as np

from tlvit.types import IGNORE, Array, Batch


def check_batch(batch: Batch, num_classes: int) -> None:
    """Checks types, shapes and values of a batch on the host.

    A compiled step cannot raise an error for a value: a label out of range has no target, and a NaN makes the
    loss NaN. This function waits for the arrays, so call it for the first batches of a new data set and not
    in every step. Rows with mask False are padding, and their values are not checked.

    Args:
      batch: NumPy or JAX arrays.
      num_classes: L. Labels, the classes of score maps and those of pixels must be in [0, L). The class of a
        pixel may also be IGNORE, 255.

    Raises:
      ValueError: names the field, the number of wrong values and the first of them.

    Example:
      >>> batch = Batch(
      ...     image=np.zeros((2, 32, 32, 3), np.uint8),
      ...     label=np.array([3, 10]),
      ...     mask=np.ones(2, bool),
      ...     maps=None,
      ...     geometry=np.tile(np.eye(2, 3, dtype=np.float32), (2, 1, 1)),
      ... )
      >>> check_batch(batch, num_classes=10)
      Traceback (most recent call last):
      ValueError: batch.label: 1 of 2 values are not from 0 to 9; the first is 10, at [1].
    """
    count = batch.image.shape[0]
    _check_type("image", batch.image, "uint8", (count, None, None, 3))
    _check_type("label", batch.label, "integer", (count,))
    _check_type("mask", batch.mask, "bool", (count,))
    _check_type("geometry", batch.geometry, "floating", (count, 2, 3))
    mask = np.asarray(batch.mask)
    _check_range("label", batch.label, mask, 0, num_classes - 1)
    _check_finite("geometry", batch.geometry, mask)
    if batch.real_labels is not None:
        _check_type("real_labels", batch.real_labels, "integer", (count, None))
        _check_range("real_labels", batch.real_labels, mask, -1, num_classes - 1)
    if batch.segmentation is not None:
        _check_type("segmentation", batch.segmentation, "integer", batch.image.shape[:3])
        classes = np.asarray(batch.segmentation)
        wrong = (classes < 0) | ((classes >= num_classes) & (classes != IGNORE))
        _report("segmentation", classes, wrong, mask, f"from 0 to {num_classes - 1} or {IGNORE}")
    if batch.maps is not None:
        _check_type("maps.value", batch.maps.value, "floating", (count, None, None, None))
        _check_type("maps.index", batch.maps.index, "integer", batch.maps.value.shape)
        _check_range("maps.index", batch.maps.index, mask, 0, num_classes - 1)
        _check_finite("maps.value", batch.maps.value, mask)


def _check_type(name: str, array: Array, kind: str, shape: tuple[int | None, ...]) -> None:
    """`kind` is a type of NumPy; None in a shape is any size above 0."""
    sizes = zip(array.shape, shape, strict=False)
    fits = array.ndim == len(shape) and all(n == m or (m is None and n > 0) for n, m in sizes)
    if not fits or not np.issubdtype(array.dtype, getattr(np, kind)):
        wanted = ", ".join("_" if size is None else str(size) for size in shape)
        raise ValueError(f"batch.{name} must be {kind} [{wanted}], not {array.dtype} {list(array.shape)}.")


def _check_range(name: str, array: Array, mask: np.ndarray, low: int, high: int) -> None:
    values = np.asarray(array)
    _report(name, values, (values < low) | (values > high), mask, f"from {low} to {high}")


def _check_finite(name: str, array: Array, mask: np.ndarray) -> None:
    values = np.asarray(array)
    _report(name, values, ~np.isfinite(values), mask, "finite")


def _report(name: str, values: np.ndarray, wrong: np.ndarray, mask: np.ndarray, wanted: str) -> None:
    wrong = wrong & mask.reshape(-1, *(1,) * (values.ndim - 1))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"batch.{name}: {wrong.sum():,} of {values.size:,} values are not {wanted}; the first is "
            f"{values[at]}, at {list(at)}."
        )
