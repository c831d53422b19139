"""`Scoring`: what is scored of an image, and how an annotator's logits become those of a score map."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tlvit.annotators.views import Views
from tlvit.types import Array

MAX_CROPS = 64  # in a row or a column
DROPPED, SHARED = -1, -2  # in place of a class of the images
LOGITS = ("auto", "raw", "shifted")
GEOMETRIES = ("auto", "full", "center")


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the images of a data set are scored.

    Attributes:
      crop_grid: (rows, columns) of overlapping crops, each as large as the annotator's input, for images with
        high resolution or small objects. (1, 1) scores the image as a whole.
      flip: also scores the mirror image and averages the logits.
      classes: the images' class of each of the annotator's classes; -1 for those that are dropped, -2 for
        those whose probability all classes of the images share evenly. None: both have the same classes. See
        `tlvit.annotators.classes_map.read_classes_map`.
      logits: "raw" keeps the logits as they are, as published. "shifted" adds a constant to all logits of a
        cell, so that the classes that are not kept have a mean exp(logit) of 1, which is what training
        assumes of them. "auto": "raw" for models of tlvit without a classes map, else "shifted".
      geometry: what a map covers: "full", the entire image, resized without keeping its aspect ratio; or
        "center", the annotator's own center crop. "auto": the annotator's own (models of timm: their own
        preprocessing; all others: "full"); "full" for several crops.

    Raises:
      ValueError: a value is out of its range.

    Example:
      >>> scoring = tlvit.Scoring(crop_grid=(2, 3), flip=True)
      >>> tlvit.annotate(tlvit.load("runs/annotator"), source, "photos/score_maps", scoring=scoring)
    """

    crop_grid: tuple[int, int] = (1, 1)
    flip: bool = False
    classes: tuple[int, ...] | None = None
    logits: Literal["auto", "raw", "shifted"] = "auto"
    geometry: Literal["auto", "full", "center"] = "auto"

    def __post_init__(self) -> None:
        if len(self.crop_grid) != 2 or not 1 <= min(self.crop_grid) <= max(self.crop_grid) <= MAX_CROPS:
            raise ValueError(
                f"crop_grid must be (rows, columns), each from 1 to {MAX_CROPS}, not {tuple(self.crop_grid)}."
            )
        for name, value, known in (
            ("logits", self.logits, LOGITS),
            ("geometry", self.geometry, GEOMETRIES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not {value!r}.")
        if self.classes is not None and max(self.classes, default=-1) < 0:
            raise ValueError("The classes map drops all classes of the annotator.")

    @property
    def num_own_classes(self) -> int | None:
        """One more than the largest class of the images in `classes`; None without a classes map."""
        return None if self.classes is None else max(self.classes) + 1

    def check_classes(self, num_classes: int, own: int) -> None:
        """Checks the classes map.

        Args:
          num_classes: number of the annotator's classes.
          own: number of the images' classes.

        Raises:
          ValueError: the map has another number of classes than the annotator, a class that the images do not
            have, or no class for one of theirs.
        """
        if self.classes is None:
            return
        if len(self.classes) != num_classes:
            raise ValueError(
                f"The classes map has {len(self.classes)} classes for {num_classes} of the annotator."
            )
        found = set(self.classes) - {DROPPED, SHARED}
        if min(found) < 0 or max(found) >= own:
            wrong = min(found) if min(found) < 0 else max(found)
            raise ValueError(f"The classes map has the class {wrong}; the images have 0 to {own - 1}.")
        absent = sorted(set(range(own)) - found)
        if absent:
            raise ValueError(
                f"The classes map has no class of the annotator for {len(absent)} of the {own} classes of "
                f"the images, such as {absent[0]}: such images would get wrong maps."
            )

    def views(self, crop: tuple[int, int], cells: tuple[int, int]) -> Views:
        """The views of an image, for an annotator with inputs (H, W) and logits of (h, w) cells."""
        return Views(crop, cells, tuple(self.crop_grid), self.flip)

    def center_fraction(self, own: str, crop_pct: float, image_size: tuple[int, int]) -> float | None:
        """The side of the square that a map covers, as a fraction of the image's shorter side.

        Args:
          own: the annotator's own geometry, "full" or "center".
          crop_pct: the fraction that its center crop keeps.
          image_size: (height, width) of the image that is scored.

        Returns:
          None for the entire image.

        Raises:
          ValueError: `geometry` is "center" and the image that is scored is no square.
        """
        several = tuple(self.crop_grid) != (1, 1)
        geometry = ("full" if several else own) if self.geometry == "auto" else self.geometry
        if geometry == "full":
            return None
        if image_size[0] != image_size[1]:
            raise ValueError(
                f"The annotator scores images of {image_size[0]}x{image_size[1]} pixels, but a center crop "
                "is a square: choose a square size, as many rows of crops as columns, or the geometry full."
            )
        return crop_pct

    def is_shifted(self, *, foreign: bool) -> bool:
        """Whether the logits are shifted; `foreign` says that the annotator is not a model of tlvit."""
        by_default = foreign or self.classes is not None
        return by_default if self.logits == "auto" else self.logits == "shifted"

    def describe(self, name: str, *, foreign: bool) -> str:
        """The name of the annotator with what differs from scoring the whole image once."""
        parts = [name]
        if tuple(self.crop_grid) != (1, 1):
            parts.append("crops {}x{}".format(*self.crop_grid))
        parts += ["flip"] * self.flip
        if self.classes is not None:
            kept, shared = sum(c >= 0 for c in self.classes), self.classes.count(SHARED)
            parts.append(f"{kept} of {len(self.classes)} classes mapped to {self.num_own_classes}")
            parts += [f"{shared} shared"] if shared else []
        parts += ["shifted logits"] * self.is_shifted(foreign=foreign)
        return ", ".join(parts)


def merge_classes(logits: Array, classes: tuple[int, ...] | None) -> Array:
    """The logits of the images' classes: the logsumexp of those of the annotator's classes.

    With p = softmax(z), the probability of a union of classes j is the sum of p_j, and its logit is
    log(sum exp(z_j)) up to the same constant for all unions. Classes that are dropped leave the softmax, so
    the result is the distribution given that one of the others is right. The probability of shared classes is
    divided evenly among all L classes of the images: logaddexp(z, logsumexp(z of shared) - log L).

    Args:
      logits: [B, h, w, L] of the annotator.
      classes: see `Scoring.classes`. None returns the logits.

    Returns:
      float32 [B, h, w, L of the images].
    """
    if classes is None:
        return logits
    own = max(classes) + 1
    kept = np.array([i for i, c in enumerate(classes) if c >= 0], np.int32)
    target = jnp.asarray([c for c in classes if c >= 0], jnp.int32)
    by_class = jnp.moveaxis(jnp.asarray(logits, jnp.float32)[..., kept], -1, 0)
    highest = jax.ops.segment_max(by_class, target, own)
    total = jax.ops.segment_sum(jnp.exp(by_class - highest[target]), target, own)
    merged = jnp.moveaxis(highest + jnp.log(total), 0, -1)
    shared = np.flatnonzero(np.array(classes) == SHARED)
    if not shared.size:
        return merged
    of_all = jax.nn.logsumexp(jnp.asarray(logits, jnp.float32)[..., shared], axis=-1, keepdims=True)
    return jnp.logaddexp(merged, of_all - math.log(own))


def best_logits(logits: Array, top_k: int, *, shifted: bool) -> tuple[Array, Array]:
    """The K highest logits of every cell and their classes.

    A score map has no logits of the other L - K classes; training takes them as 0, so their sum of exp(logit)
    is L - K. With `shifted`, the constant that makes this true is subtracted from the K logits, so that the
    softmax of a cell has the annotator's probabilities of the K classes. With K = L it is the mean logit.

    Args:
      logits: [B, h, w, L].
      top_k: K, at most L.
      shifted: whether the constant is subtracted.

    Returns:
      value float32 and index int32, [B, h, w, K].
    """
    logits = jnp.asarray(logits, jnp.float32)
    value, index = jax.lax.top_k(logits, top_k)
    others = logits.shape[-1] - top_k
    if not shifted:
        return value, index
    if not others:
        return value - jnp.mean(logits, axis=-1, keepdims=True), index
    # The sum over the others, relative to the largest of them: over all that are not larger, less the kept
    # ones that are equal.
    largest = jax.lax.top_k(logits, top_k + 1)[0][..., top_k:]
    total = jnp.sum(jnp.where(logits <= largest, jnp.exp(logits - largest), 0), axis=-1, keepdims=True)
    total = total - jnp.sum(value == largest, axis=-1, keepdims=True)
    return value - (largest + jnp.log(total / others)), index
