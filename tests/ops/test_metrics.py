"""Evaluation sums: ties, padding and NaN."""

import numpy as np
import pytest

from tlvit.ops.metrics import classification_sums


def sums(logits, label, mask=None):
    logits = np.asarray(logits, np.float32)
    mask = np.ones(len(logits), bool) if mask is None else np.asarray(mask)
    return {k: float(v) for k, v in classification_sums(logits, np.asarray(label, np.int32), mask).items()}


def test_against_numpy():
    rng = np.random.RandomState(0)
    logits, label, mask = rng.standard_normal((64, 12)), rng.randint(12, size=64), rng.rand(64) < 0.8
    order = np.argsort(-logits, axis=1)
    expected = {
        "top1": ((order[:, 0] == label) & mask).sum(),
        "top5": ((order[:, :5] == label[:, None]).any(1) & mask).sum(),
        "loss": ((np.log(np.exp(logits).sum(1)) - logits[np.arange(64), label]) * mask).sum(),
        "count": mask.sum(),
    }
    got = sums(logits, label, mask)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5)


@pytest.mark.slow
def test_ties_count_against_the_model():
    assert sums(np.zeros((3, 10)), [0, 4, 9])["top5"] == 0
    two_best = [[1, 1, 0, 0, 0, 0]]
    assert sums(two_best, [0])["top1"] == 0
    assert sums(two_best, [0])["top5"] == 1
    assert sums([[0, 1, 0, 0, 0, 0]], [2])["top5"] == 0  # five others are as good
    assert sums(np.zeros((1, 4)), [1])["top5"] == 1  # fewer than five classes


def test_padding_counts_nowhere_even_if_it_is_nan():
    logits = np.array([[2.0, 1.0], [np.nan, np.nan], [0.0, 3.0]])
    got = sums(logits, [0, 0, 0], [True, False, True])
    assert (got["top1"], got["count"]) == (1, 2)
    np.testing.assert_allclose(got["loss"], np.log1p(np.exp(-1)) + np.log1p(np.exp(3)), rtol=1e-5)
    got = sums(logits, [0, -1, 0], [False, False, False])
    assert got == {"top1": 0, "top5": 0, "loss": 0, "count": 0}


def test_nan_is_never_correct_and_makes_the_loss_nan():
    got = sums([[np.nan, np.nan, np.nan]], [0])
    assert (got["top1"], got["top5"]) == (0, 0)
    assert np.isnan(got["loss"])
    got = sums([[np.nan, 1.0, np.nan]], [1])
    assert (got["top1"], got["top5"]) == (0, 0)  # a row with NaN is never correct


def test_images_with_several_labels():
    """Correct if the best class is one of the labels; images without labels are not counted."""
    logits = np.array([[3, 1, 2, 0]] * 4 + [[3, 3, 2, 0], [np.nan, 1, 2, 0]])
    real_labels = np.array([[0, -1], [2, 0], [1, 2], [-1, -1], [1, -1], [1, 2]], np.int32)
    label, mask = np.zeros(6, np.int32), np.ones(6, bool)
    got = {
        k: float(v)
        for k, v in classification_sums(logits.astype(np.float32), label, mask, real_labels).items()
    }
    assert (got["real"], got["real_count"], got["count"]) == (2, 5, 6)  # ties and NaN count against
    mask[1] = False
    got = classification_sums(logits.astype(np.float32), label, mask, real_labels)
    assert (float(got["real"]), float(got["real_count"])) == (1, 4)
    assert "real" not in classification_sums(logits.astype(np.float32), label, mask)
