"""Batches have the arrays that they were built of, and padding is zero with mask False."""

import numpy as np

from tlvit.data.batching import pad_batch, padding_batch, to_batch


def make_arrays(count):
    return {
        "image": np.full((count, 4, 6, 3), 7, np.uint8),
        "label": np.arange(count, dtype=np.int32),
        "geometry": np.ones((count, 2, 3), np.float32),
    }


def test_a_training_batch_has_maps_and_no_padding():
    maps = {"value": np.ones((3, 5, 2, 2), np.float16), "index": np.zeros((3, 5, 2, 2), np.uint16)}
    batch = to_batch(make_arrays(3) | maps)
    assert batch.maps.value is maps["value"]
    assert batch.maps.index is maps["index"]
    np.testing.assert_array_equal(batch.mask, [True] * 3)
    assert batch.real_labels is None


def test_an_evaluation_batch_is_padded():
    labels = np.array([[1, 2], [3, -1], [-1, -1]], np.int64)
    batch = to_batch(make_arrays(3) | {"mask": np.array([True, False, True]), "real_labels": labels})
    padded = pad_batch(batch, 5)
    np.testing.assert_array_equal(padded.mask, [True, False, True, False, False])
    np.testing.assert_array_equal(padded.label, [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(padded.real_labels, [[1, 2], [3, -1], [-1, -1], [-1, -1], [-1, -1]])
    assert padded.real_labels.dtype == np.int32
    assert padded.image[:3].min() == 7
    assert padded.image[3:].max() == 0
    assert padded.geometry[3:].max() == 0
    assert pad_batch(batch, 3) is batch


def test_a_batch_of_padding_has_the_shapes_of_the_others():
    for max_labels in (0, 2):
        found = padding_batch(4, (4, 6), max_labels)
        fields = make_arrays(1)
        if max_labels:
            fields["real_labels"] = np.full((1, 2), -1, np.int64)
        other = pad_batch(to_batch(fields), 4)
        for name in ("image", "label", "mask", "geometry", "real_labels"):
            a, b = getattr(found, name), getattr(other, name)
            assert (a is None and b is None) or (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert not found.mask.any()
