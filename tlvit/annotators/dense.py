"""`DenseAnnotator`, the interface of every annotator that is not a model of tlvit, and the checks of it."""

import os
import traceback
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tlvit.config import MAX_IMAGE_SIZE


@runtime_checkable
class DenseAnnotator(Protocol):
    """Anything that scores the cells of images: a model of another library, or a function of your own.

    These attributes are optional: `name` (for messages and for the description of the maps; default: the name
    of the class), `version` (text that changes when the scores change, so that maps of two versions are not
    mixed), `class_names` (a sequence of L names, for classes maps) and `crop_pct` (the fraction of an image
    that the annotator's own center crop keeps, for maps with the geometry "center"; default: 1).

    Attributes:
      num_classes: L, the number of classes.
      image_size: (height, width) of the images that it scores, in pixels.

    Example:
      >>> class Brightness:
      ...     num_classes, image_size = 2, (64, 64)
      ...
      ...     def dense_logits(self, images):  # dark or bright, in 8 x 8 cells
      ...         cells = images.reshape(len(images), 8, 8, 8, 8, 3).mean((2, 4, 5)) / 255
      ...         return np.stack([1 - cells, cells], -1)
      >>> tlvit.annotate(Brightness(), tlvit.open_source("photos", "train"), "photos/score_maps")
    """

    num_classes: int
    image_size: tuple[int, int]

    def dense_logits(self, images: np.ndarray) -> np.ndarray:
        """Scores the cells of images.

        Only the differences between the logits of a cell matter: logits, log-probabilities and similarities
        times a temperature are all right. All values must be finite.

        Args:
          images: uint8 [B, H, W, 3], RGB, as many as the batch size; at the end of a shard some are padding.

        Returns:
          Floats [B, h, w, L] as a NumPy array or what `np.asarray` takes. The grid (h, w) is always the same.
        """
        ...


def annotator_name(annotator: DenseAnnotator) -> str:
    """The annotator's `name`, or the name of its class."""
    return str(getattr(annotator, "name", type(annotator).__name__))


def annotator_classes(annotator: DenseAnnotator) -> tuple[str, ...] | None:
    """The names of the annotator's classes, or None.

    Raises:
      ValueError: there are not as many names as classes.
    """
    names = getattr(annotator, "class_names", None)
    if names is None:
        return None
    if len(names) != annotator.num_classes:
        name, count = annotator_name(annotator), annotator.num_classes
        raise ValueError(f"The annotator {name} has {len(names)} class names for {count} classes.")
    return tuple(str(n) for n in names)


def check_annotator(annotator: Any) -> None:
    """Checks the attributes of a DenseAnnotator.

    Raises:
      ValueError: one is missing or has another type.
    """
    name = annotator_name(annotator)
    missing = [n for n in ("dense_logits", "num_classes", "image_size") if not hasattr(annotator, n)]
    if missing:
        raise ValueError(f"The annotator {name} has no {' and no '.join(missing)}; see tlvit.DenseAnnotator.")
    classes, size = annotator.num_classes, annotator.image_size
    if not _is_integer(classes) or classes < 2:
        raise ValueError(f"num_classes of the annotator {name} must be an integer above 1, not {classes!r}.")
    is_size = isinstance(size, tuple | list) and len(size) == 2 and all(_is_integer(side) for side in size)
    if not is_size or not 1 <= min(size) <= max(size) <= MAX_IMAGE_SIZE:
        raise ValueError(
            f"image_size of the annotator {name} must be (height, width) in pixels, from 1 to "
            f"{MAX_IMAGE_SIZE}, not {size!r}."
        )


def dense_logits(annotator: DenseAnnotator, images: np.ndarray) -> np.ndarray:
    """The annotator's logits, float32 [B, h, w, L], after a check of their shape and type.

    Raises:
      ValueError: the annotator fails, or returns something else.
    """
    name = annotator_name(annotator)
    try:
        logits = np.asarray(annotator.dense_logits(images))
    except Exception as error:
        raise ValueError(f"dense_logits of the annotator {name} failed: {_described(error)}") from error
    wanted = f"[{len(images)}, h, w, {annotator.num_classes}]"
    if not np.issubdtype(logits.dtype, np.floating):
        shown = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"dense_logits of the annotator {name} must return floats {wanted}, not {shown}.")
    shape = logits.shape
    right = logits.ndim == 4 and (shape[0], shape[3]) == (len(images), annotator.num_classes)
    if not right or 0 in shape:
        raise ValueError(
            f"dense_logits of the annotator {name} must return {wanted} for {len(images)} images and "
            f"{annotator.num_classes} classes, not {list(shape)}."
        )
    return logits.astype(np.float32, copy=False)


def check_grid(annotator: DenseAnnotator, found: tuple[int, int], grid: tuple[int, int]) -> None:
    """Raises ValueError if the grid of the annotator's logits is not the one of its first ones."""
    if found != grid:
        raise ValueError(
            f"dense_logits of the annotator {annotator_name(annotator)} returned {found[0]}x{found[1]} cells "
            f"for an image, and {grid[0]}x{grid[1]} cells before."
        )


def check_finite(annotator: DenseAnnotator, logits: np.ndarray, keys: tuple[str, ...]) -> None:
    """Checks the logits of images.

    Args:
      annotator: for messages.
      logits: float32 [B, h, w, L].
      keys: the B keys of the images; "" for padding and corrupt images, which are not checked.

    Raises:
      ValueError: a logit is NaN or infinite.
    """
    wrong = np.logical_not(np.isfinite(logits)).sum((1, 2, 3))
    for key, count in zip(keys, wrong, strict=True):
        if key and count:
            raise ValueError(
                f"dense_logits of the annotator {annotator_name(annotator)} returned {count} values that are "
                f"NaN or infinite for the image {key!r}. A probability of 0 has no logarithm: clip it first."
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _described(error: Exception) -> str:
    """The kind and first line of an error, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is this file's
    at = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}{at}"
