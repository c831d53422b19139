"""Builds `Batch` objects from the arrays that tf.data gives, and pads the last batch of an evaluation."""

import dataclasses

import numpy as np

from tlvit.types import IGNORE, Batch, ScoreMaps


@dataclasses.dataclass(frozen=True)
class KeyedBatch:
    """A batch and the keys of its images. Padding, which comes last and has mask False, has no keys."""

    batch: Batch
    keys: tuple[str, ...]


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """Builds a batch.

    Args:
      arrays: "image", "label" and "geometry"; optionally "value" and "index" of the score maps, "mask",
        "real_labels" and "segmentation".
    """
    maps = ScoreMaps(value=arrays["value"], index=arrays["index"]) if "value" in arrays else None
    return Batch(
        image=arrays["image"],
        label=arrays["label"],
        mask=arrays["mask"] if "mask" in arrays else np.ones(len(arrays["label"]), bool),
        maps=maps,
        geometry=arrays["geometry"],
        real_labels=arrays["real_labels"].astype(np.int32) if "real_labels" in arrays else None,
        segmentation=arrays.get("segmentation"),
    )


def pad_batch(batch: Batch, size: int) -> Batch:
    """Pads a batch without score maps to `size` images. The padding is zero, in
    segmentation of the class IGNORE, and has mask False."""
    count = size - len(batch.label)
    if not count:
        return batch
    pad = lambda x, value=0: np.concatenate([x, np.full((count, *x.shape[1:]), value, x.dtype)])
    return Batch(
        image=pad(batch.image),
        label=pad(batch.label),
        mask=pad(batch.mask),
        maps=None,
        geometry=pad(batch.geometry),
        real_labels=None if batch.real_labels is None else pad(batch.real_labels, -1),
        segmentation=None if batch.segmentation is None else pad(batch.segmentation, IGNORE),
    )


def padding_batch(size: int, image_size: tuple[int, int], max_labels: int) -> Batch:
    """A batch of padding only."""
    empty = Batch(
        image=np.zeros((0, *image_size, 3), np.uint8),
        label=np.zeros(0, np.int32),
        mask=np.zeros(0, bool),
        maps=None,
        geometry=np.zeros((0, 2, 3), np.float32),
        real_labels=np.zeros((0, max_labels), np.int32) if max_labels else None,
    )
    return pad_batch(empty, size)
