"""`check_batch`: each field's type, shape and values."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randn

from tlvit import check_batch
from tlvit.types import Batch, ScoreMaps

L = 10
MAPS = ScoreMaps(
    value=randn(3, 2, 4, 4).astype(np.float16),
    index=np.random.RandomState(0).randint(0, L, (3, 2, 4, 4)).astype(np.uint16),
)
GOOD = Batch(
    image=np.zeros((3, 32, 32, 3), np.uint8),
    label=np.array([0, 9, 5], np.int32),
    mask=np.ones(3, bool),
    maps=MAPS,
    geometry=np.tile(np.eye(2, 3, dtype=np.float32), (3, 1, 1)),
    real_labels=np.array([[1, -1], [-1, -1], [9, 0]], np.int32),
)


CLASSES = np.random.RandomState(1).choice([0, 4, 9, 255], (3, 32, 32)).astype(np.uint8)


def put(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def test_good_batches():
    check_batch(GOOD, L)
    check_batch(dataclasses.replace(GOOD, maps=None, real_labels=None), L)
    check_batch(dataclasses.replace(GOOD, maps=None, segmentation=CLASSES), L)
    check_batch(dataclasses.replace(GOOD, label=jnp.asarray(GOOD.label), mask=jnp.asarray(GOOD.mask)), L)


def test_padding_is_not_checked():
    masked = {"mask": np.array([True, True, False]), "label": put(GOOD.label, 2, -1)}
    masked["geometry"] = put(GOOD.geometry, 2, np.nan)
    check_batch(dataclasses.replace(GOOD, **masked), L)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((3, 32, 32, 3), np.float32)}, r"image must be uint8 \[3, _, _, 3\], not float32"),
        ({"image": np.zeros((3, 0, 32, 3), np.uint8)}, r"image must be .* not uint8 \[3, 0, 32, 3\]"),
        ({"label": np.zeros(3)}, r"label must be integer \[3\], not float64 \[3\]"),
        ({"label": np.zeros(2, np.int32)}, r"label must be integer \[3\], not int32 \[2\]"),
        ({"label": np.array([0, 10, -1])}, r"label: 2 of 3 values are .* 0 to 9; the first is 10, at \[1\]"),
        ({"mask": np.ones(3, np.uint8)}, r"mask must be bool \[3\], not uint8"),
        ({"geometry": put(GOOD.geometry, (1, 0, 2), np.nan)}, r"geometry: 1 of 18 .* finite; .*\[1, 0, 2\]"),
        ({"geometry": np.eye(2, 3)[None]}, r"geometry must be floating \[3, 2, 3\], not float64 \[1, 2, 3\]"),
        ({"real_labels": put(GOOD.real_labels, (0, 1), -2)}, "real_labels: 1 of 6 values are not from -1"),
        ({"segmentation": CLASSES[:, :16]}, r"segmentation must be integer \[3, 32, 32\], not uint8 \[3, 16"),
        ({"segmentation": put(CLASSES, (1, 2, 3), 10)}, r"segmentation: 1 of 3,072 .* 0 to 9 or 255; .* 10"),
        ({"maps": ScoreMaps(MAPS.value, put(MAPS.index, (2, 1, 0, 3), 60000))}, r"60000, at \[2, 1, 0, 3\]"),
        ({"maps": ScoreMaps(MAPS.value, MAPS.index[:, :1])}, r"maps.index must be integer \[3, 2, 4, 4\]"),
        ({"maps": ScoreMaps(MAPS.value, MAPS.index.astype(np.float32))}, "maps.index must be integer"),
        ({"maps": ScoreMaps(put(MAPS.value, (0, 0, 0, 0), np.inf), MAPS.index)}, "maps.value: 1 of 96"),
    ],
)  # fmt: skip
def test_wrong_batches(change, message):
    with pytest.raises(ValueError, match=f"batch.{message}" if message[0].islower() else message):
        check_batch(dataclasses.replace(GOOD, **change), L)
