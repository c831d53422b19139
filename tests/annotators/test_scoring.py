"""Tests of scoring: merged classes and kept classes have the probabilities that they had before."""

import numpy as np
import pytest
from conftest import randn, softmax

from tlvit.annotators.scoring import Scoring, best_logits, merge_classes


def test_merged_classes_have_the_sum_of_the_probabilities():
    """Of those that are not dropped, as a conditional distribution."""
    logits = 3 * randn(2, 3, 4, 6)
    classes = (1, 0, -1, 1, 2, 1)
    probabilities = softmax(logits)
    expected = np.stack([probabilities[..., np.array(classes) == own].sum(-1) for own in range(3)], -1)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(softmax(merge_classes(logits, classes)), expected, rtol=1e-5)


def test_all_classes_share_a_background():
    logits = 3 * randn(2, 3, 4, 5)
    p = softmax(logits)
    expected = np.stack([p[..., 1] + p[..., 3], p[..., 0]], -1) + (p[..., 2] + p[..., 4])[..., None] / 2
    merged = merge_classes(logits, (1, 0, -2, 0, -2))
    np.testing.assert_allclose(softmax(merged), expected, rtol=1e-5)


def test_merging_keeps_extreme_logits_and_single_classes():
    logits = np.array([[[[500.0, -500.0, 499.0]]]], np.float32)
    merged = np.asarray(merge_classes(logits, (0, 1, 0)))[0, 0, 0]
    np.testing.assert_allclose(merged, [500 + np.log1p(np.exp(-1)), -500], rtol=1e-6)
    assert merge_classes(logits, None) is logits


def implied(value, index, num_classes):
    """The probabilities that training makes of a cell: logits of other classes are 0."""
    dense = np.zeros((*value.shape[:-1], num_classes), np.float32)
    np.put_along_axis(dense, np.asarray(index), np.asarray(value), -1)
    return softmax(dense)


@pytest.mark.parametrize("offset", [-40.0, 0.0, 90.0])
@pytest.mark.parametrize("top_k", [1, 3, 6, 7])
def test_shifted_logits_have_the_annotators_probabilities(top_k, offset):
    """Of the K classes; the others share the rest. A constant of all logits does not matter."""
    logits = 4 * randn(2, 3, 3, 7) + np.float32(offset)
    value, index = best_logits(logits, top_k, shifted=True)
    probabilities = softmax(logits)
    found = implied(value, index, 7)
    kept = np.take_along_axis(probabilities, np.asarray(index), -1)
    np.testing.assert_allclose(np.take_along_axis(found, np.asarray(index), -1), kept, rtol=1e-4)
    assert (np.diff(value, axis=-1) <= 0).all()


def test_raw_negative_logits_would_favor_the_other_classes():
    """Why logits of other libraries are shifted: their K best classes may all be below 0."""
    logits = np.full((1, 1, 1, 1000), -9.0, np.float32)
    logits[..., 17] = -1.0
    raw, shifted = (
        implied(*best_logits(logits, 5, shifted=choice), 1000)[0, 0, 0, 17] for choice in (False, True)
    )
    assert raw < 0.001
    assert shifted == pytest.approx(softmax(logits)[0, 0, 0, 17], rel=1e-4)


def test_shifted_logits_with_equal_and_with_far_lower_others():
    equal, _ = best_logits(np.zeros((1, 1, 1, 6), np.float32), 2, shifted=True)
    np.testing.assert_allclose(equal, 0, atol=1e-6)
    far, index = best_logits(np.array([[[[0, 800, 0, 0]]]], np.float32), 1, shifted=True)
    np.testing.assert_allclose(far, 800)
    assert index.item() == 1


def test_raw_logits_are_the_highest():
    logits = randn(1, 2, 2, 5)
    value, index = best_logits(logits, 3, shifted=False)
    order = np.argsort(-logits, -1)[..., :3]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(value, np.take_along_axis(logits, order, -1))


@pytest.mark.slow
def test_70000_classes():
    """The index of a class above 65,535 is kept."""
    logits = randn(1, 2, 2, 70_000)
    logits[0, 1, 0, 69_999] = 50
    _, index = best_logits(merge_classes(logits, tuple(range(70_000))), 5, shifted=True)
    assert index[0, 1, 0, 0] == 69_999


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_grid": (0, 1)}, r"crop_grid must be \(rows, columns\), each from 1 to 64, not \(0, 1\)"),
        ({"crop_grid": (2,)}, "crop_grid must be"),
        ({"logits": "soft"}, "logits must be auto, raw or shifted, not 'soft'"),
        ({"geometry": "left"}, "geometry must be auto, full or center, not 'left'"),
        ({"classes": (-1, -1)}, "drops all classes"),
    ],
)
def test_values_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**values)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((0, 1), "2 classes for 3 of the annotator"),
        ((0, 1, 2), "has the class 2; the images have 0 to 1"),
        ((0, 1, -3), "has the class -3"),
        ((0, 0, -1), "no class of the annotator for 1 of the 2 classes of the images, such as 1"),
    ],
)
def test_the_classes_map_fits_annotator_and_images(classes, message):
    Scoring(classes=(1, 0, -1)).check_classes(3, 2)
    Scoring().check_classes(3, 2)  # the writer compares the numbers
    with pytest.raises(ValueError, match=message):
        Scoring(classes=classes).check_classes(3, 2)


def test_logits_are_shifted_unless_they_are_as_published():
    assert not Scoring().is_shifted(foreign=False)
    assert Scoring().is_shifted(foreign=True)
    assert Scoring(classes=(0,)).is_shifted(foreign=False)
    assert not Scoring(logits="raw").is_shifted(foreign=True)
    assert Scoring(logits="shifted").is_shifted(foreign=False)


def test_geometry():
    assert Scoring().center_fraction("full", 0.9, (32, 32)) is None
    assert Scoring().center_fraction("center", 0.9, (32, 32)) == 0.9
    assert Scoring(crop_grid=(1, 2)).center_fraction("center", 0.9, (32, 56)) is None
    assert Scoring(geometry="full").center_fraction("center", 0.9, (32, 32)) is None
    assert Scoring(geometry="center").center_fraction("full", 0.8, (32, 32)) == 0.8
    with pytest.raises(ValueError, match="32x56 pixels, but a center crop is a square"):
        Scoring(crop_grid=(1, 2), geometry="center").center_fraction("full", 0.9, (32, 56))


def test_the_description_names_what_differs():
    assert Scoring().describe("a", foreign=False) == "a"
    scoring = Scoring(crop_grid=(2, 3), flip=True, classes=(0, 0, -1, 1))
    expected = "a, crops 2x3, flip, 3 of 4 classes mapped to 2, shifted logits"
    assert scoring.describe("a", foreign=False) == expected
