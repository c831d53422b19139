"""Votes of the nearest neighbors against NumPy."""

import numpy as np
import pytest
from conftest import randn

from tlvit.ops.knn import knn_scores


def test_votes_of_the_nearest_images():
    """exp(cosine / temperature) of each of the k nearest, up to a factor of the query."""
    queries, features, labels = randn(7, 5, seed=1), randn(40, 5, seed=2), np.arange(40) % 3
    found = np.asarray(knn_scores(queries, features, labels, ks=(1, 4, 40), num_classes=3))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosines = unit(queries.astype(np.float64)) @ unit(features.astype(np.float64)).T
    for k, scores in zip((1, 4, 40), found, strict=True):
        for row, cosine in zip(scores, cosines, strict=True):
            nearest = np.argsort(-cosine)[:k]
            votes = np.zeros(3)
            np.add.at(votes, labels[nearest], np.exp(cosine[nearest] / 0.07))
            np.testing.assert_allclose(row / row.sum(), votes / votes.sum(), atol=1e-5)


def test_lengths_do_not_count_and_zeros_are_allowed():
    features = np.array([[1, 0], [0, 1]], np.float32)
    scores = knn_scores(
        np.array([[0, 1e-3], [0, 0]], np.float32), 100 * features, np.array([0, 1]), ks=(1,), num_classes=2
    )
    assert np.asarray(scores)[0, 0].tolist() == [0, 1]
    assert np.isfinite(np.asarray(scores)).all()


def test_more_neighbors_than_images_are_refused():
    with pytest.raises(ValueError, match=r"k must be from 1 to 4, the number of known images, not \(2, 5\)"):
        knn_scores(randn(1, 3), randn(4, 3), np.zeros(4, np.int32), ks=(2, 5), num_classes=2)
