"""Tests of annotators of one's own: what they must have, and the sentences for what they return wrongly."""

import dataclasses
import types

import numpy as np
import pytest
from conftest import randn

from tlvit.annotators.dense import (
    DenseAnnotator,
    annotator_classes,
    annotator_name,
    check_annotator,
    dense_logits,
)
from tlvit.annotators.host_scorer import HostScorer
from tlvit.annotators.scoring import Scoring, best_logits, merge_classes
from tlvit.data.batching import KeyedBatch, padding_batch


class Cells:
    """Logits of 8 x 8 cells: a fixed linear function of their mean color."""

    num_classes, image_size = 5, (16, 32)
    weights = 0.1 * randn(3, 5)

    def dense_logits(self, images):
        return images.reshape(len(images), 2, 8, -1, 8, 3).mean((2, 4)) @ self.weights


def batch(images, keys):
    """The images, some of them padding."""
    empty = padding_batch(len(images), images.shape[1:3], 0)
    mask = np.arange(len(images)) < len(keys)
    return KeyedBatch(dataclasses.replace(empty, image=images, mask=mask), tuple(keys))


def random_images(count, height, width):
    return np.random.RandomState(1).randint(0, 256, (count, height, width, 3)).astype(np.uint8)


def test_the_protocol():
    annotator = Cells()
    assert isinstance(annotator, DenseAnnotator)
    check_annotator(annotator)
    assert (annotator_name(annotator), annotator_classes(annotator)) == ("Cells", None)
    annotator.name, annotator.class_names = "mine", list("abcde")
    assert (annotator_name(annotator), annotator_classes(annotator)) == ("mine", tuple("abcde"))
    annotator.class_names = list("abc")
    with pytest.raises(ValueError, match="annotator mine has 3 class names for 5 classes"):
        annotator_classes(annotator)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_classes": 3}, "has no dense_logits and no image_size; see tlvit.DenseAnnotator"),
        ({"num_classes": 1}, "num_classes of the annotator .* must be an integer above 1, not 1"),
        ({"num_classes": True}, "must be an integer above 1, not True"),
        ({"image_size": 224}, r"image_size .* must be \(height, width\) in pixels, from 1 to 4096, not 224"),
        ({"image_size": (0, 3)}, r"not \(0, 3\)"),
    ],
)
def test_attributes_are_checked(attributes, message):
    complete = {"num_classes": 3, "image_size": (8, 8), "dense_logits": None}
    fields = attributes if message.startswith("has no") else complete | attributes
    with pytest.raises(ValueError, match=message):
        check_annotator(types.SimpleNamespace(**fields))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda n: np.zeros((n, 2, 4)), r"return \[2, h, w, 5\] for 2 images and 5 classes, not \[2, 2, 4\]"),
        (lambda n: np.zeros((n, 5, 2, 4)), r"not \[2, 5, 2, 4\]"),
        (lambda n: np.zeros((1, 2, 4, 5)), r"not \[1, 2, 4, 5\]"),
        (lambda n: np.zeros((n, 0, 4, 5)), r"not \[2, 0, 4, 5\]"),
        (lambda n: np.zeros((n, 2, 4, 5), int), r"return floats \[2, h, w, 5\], not int64 \[2, 2, 4, 5\]"),
        (lambda n: None, "must return floats"),
        (lambda n: {}["x"], r"dense_logits of the annotator bad failed: KeyError: 'x' \(test_dense\.py, "),
    ],
)  # fmt: skip
def test_wrong_results_are_named(result, message):
    bad = types.SimpleNamespace(
        name="bad", num_classes=5, image_size=(8, 8), dense_logits=lambda images: result(len(images))
    )
    with pytest.raises(ValueError, match=message):
        dense_logits(bad, np.zeros((2, 8, 8, 3), np.uint8))


def test_scores_of_one_view():
    images = random_images(3, 16, 32)
    scorer = HostScorer(Cells(), Scoring(logits="raw"), top_k=9, batch_size=3)
    assert (scorer.grid, scorer.top_k, scorer.num_classes, scorer.image_size) == ((2, 4), 5, 5, (16, 32))
    value, index, best = scorer.score(batch(images, ["a", "b", "c"]))
    logits = Cells().dense_logits(images)
    np.testing.assert_allclose(value, np.moveaxis(-np.sort(-logits), -1, 1), rtol=1e-5)
    np.testing.assert_array_equal(index, np.moveaxis(np.argsort(-logits), -1, 1))
    np.testing.assert_array_equal(best, logits.mean((1, 2)).argmax(-1))


def test_scores_of_crops_mirror_images_and_merged_classes():
    """This annotator sees single cells, so crops and mirror images give the cells of the whole image."""
    scoring = Scoring(crop_grid=(2, 2), flip=True, classes=(0, 1, -1, 1, 0))
    scorer = HostScorer(Cells(), scoring, top_k=1, batch_size=2)
    assert (scorer.grid, scorer.image_size, scorer.num_classes) == ((3, 7), (24, 56), 2)
    images = random_images(2, 24, 56)
    value, index, _ = scorer.score(batch(images, ["a", "b"]))
    cells = images.reshape(2, 3, 8, 7, 8, 3).mean((2, 4)) @ Cells.weights
    expected, classes = best_logits(merge_classes(cells, scoring.classes), 1, shifted=True)
    np.testing.assert_array_equal(index, np.moveaxis(classes, -1, 1))
    np.testing.assert_allclose(value, np.moveaxis(np.asarray(expected), -1, 1), atol=1e-3)


def test_logits_that_are_not_finite_are_named_with_their_image():
    """Padding may have any."""

    class Deviations(Cells):
        def dense_logits(self, images):
            deviation = images.std((1, 2, 3)).reshape(-1, 1, 1, 1)
            with np.errstate(divide="ignore", invalid="ignore"):
                return super().dense_logits(images) / deviation

    images = random_images(3, 16, 32)
    images[1:] = 0
    annotator = Deviations()
    annotator.dense_logits = lambda x: (
        np.ones((1, 2, 4, 5)) if len(x) == 1 else type(annotator).dense_logits(annotator, x)
    )
    scorer = HostScorer(annotator, Scoring(), top_k=2, batch_size=3)
    scorer.score(batch(images, ["a"]))
    with pytest.raises(ValueError, match="returned 40 values that are NaN or infinite for the image 'b'"):
        scorer.score(batch(images, ["a", "b"]))


def test_the_grid_may_not_change():
    sizes = iter([2, 4])
    changing = types.SimpleNamespace(
        num_classes=2, image_size=(8, 8), dense_logits=lambda x: np.zeros((len(x), next(sizes), 1, 2))
    )
    scorer = HostScorer(changing, Scoring(), top_k=1, batch_size=1)
    with pytest.raises(ValueError, match="returned 4x1 cells for an image, and 2x1 cells before"):
        scorer.score(batch(random_images(1, 8, 8), ["a"]))


def test_versions_of_annotators_and_classes_maps_differ():
    version = lambda annotator, **scoring: (
        HostScorer(annotator, Scoring(**scoring), top_k=1, batch_size=1).version
    )
    other = Cells()
    other.version = "2"
    found = [version(Cells()), version(other), version(Cells(), classes=(0, 0, 0, 0, 1))]
    assert len(set(found)) == 3
    assert version(Cells()) == found[0]
