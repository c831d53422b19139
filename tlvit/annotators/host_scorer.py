"""Scores batches with a `DenseAnnotator`, which computes outside of JAX."""

import functools
import hashlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from tlvit.annotators.dense import (
    DenseAnnotator,
    annotator_name,
    check_annotator,
    check_finite,
    check_grid,
    dense_logits,
)
from tlvit.annotators.scoring import Scoring, best_logits, merge_classes
from tlvit.types import Array

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow
    from tlvit.data.batching import KeyedBatch


class HostScorer:
    """Scores batches of images on the host.

    Args:
      annotator: the annotator. It scores one gray image at once, which gives its grid.
      scoring: what is scored.
      top_k: largest number of classes kept for each cell.
      batch_size: images in a batch.

    Attributes:
      name: of the annotator, with what `scoring` changes.
      version: a hash that changes with the annotator's version and the classes map.
      image_size: (H, W) of the images to score.
      num_classes: number of classes of the maps.
      top_k: K of the maps.
      grid: (h, w) of the maps.
      center_fraction: what a map covers, see `Scoring.center_fraction`.

    Raises:
      ValueError: the annotator is none, or returns something else than logits.
    """

    def __init__(self, annotator: DenseAnnotator, scoring: Scoring, *, top_k: int, batch_size: int):
        check_annotator(annotator)
        self.annotator, self.batch_size = annotator, batch_size
        size = (int(annotator.image_size[0]), int(annotator.image_size[1]))
        gray = np.full((1, *size, 3), 128, np.uint8)
        cells = dense_logits(annotator, gray).shape[1:3]
        self._views = scoring.views(size, cells)
        self.image_size, self.grid = self._views.image_size, self._views.grid
        own = scoring.num_own_classes
        self.num_classes = int(annotator.num_classes) if own is None else own
        self.num_annotator_classes = int(annotator.num_classes)
        self.top_k = min(top_k, self.num_classes)
        self.name = scoring.describe(annotator_name(annotator), foreign=True)
        version = f"{annotator_name(annotator)}\0{getattr(annotator, 'version', '')}\0{scoring.classes}"
        self.version = hashlib.sha256(version.encode()).hexdigest()
        self.center_fraction = scoring.center_fraction(
            getattr(annotator, "geometry", "full"), getattr(annotator, "crop_pct", 1.0), self.image_size
        )
        self._merge_classes = jax.jit(functools.partial(merge_classes, classes=scoring.classes))
        shifted = scoring.is_shifted(foreign=True)
        self._select = jax.jit(functools.partial(_select, top_k=self.top_k, shifted=shifted))

    def score(self, item: "KeyedBatch") -> tuple[Array, Array, Array]:
        """Scores a batch.

        Returns:
          value and index [B, K, h, w], and the best class of the mean map [B].

        Raises:
          ValueError: the annotator fails, or returns another shape or logits that are not finite.
        """
        mask = item.batch.mask
        padding = len(mask) - len(item.keys)
        keys = tuple(
            key if real else "" for key, real in zip([*item.keys, *[""] * padding], mask, strict=True)
        )
        parts = (self._own_logits(np.asarray(view), keys) for view in self._views.cut(item.batch.image))
        with jax.default_device(_cpu()):  # the memory of the accelerator is the annotator's
            return self._select(self._views.merge(parts))

    def _own_logits(self, images: np.ndarray, keys: tuple[str, ...]) -> np.ndarray:
        """The logits of one view, of the images' classes [B, h, w, L]."""
        logits = dense_logits(self.annotator, np.ascontiguousarray(images))
        check_grid(self.annotator, logits.shape[1:3], self._views.cells)
        check_finite(self.annotator, logits, keys)
        return np.asarray(self._merge_classes(logits))


def _cpu() -> jax.Device:
    """JAX's CPU, or its first device where JAX may not use the CPU (JAX_PLATFORMS)."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _select(logits: Array, *, top_k: int, shifted: bool) -> tuple[Array, Array, Array]:
    """[B, h, w, L] -> value and index [B, K, h, w], best class of the mean map [B]."""
    value, index = best_logits(logits, top_k, shifted=shifted)
    best = jnp.argmax(jnp.mean(logits, axis=(1, 2)), axis=-1)
    return jnp.moveaxis(value, -1, 1), jnp.moveaxis(index, -1, 1), best
