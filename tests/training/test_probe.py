"""Frozen features: their extraction, the neighbors, and the linear classifier against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.ops.normalize import normalize
from tlvit.training.mesh import make_mesh
from tlvit.training.probe import extract_features, fit_linear, knn_accuracy, linear_accuracy
from tlvit.types import Batch


@pytest.fixture(scope="module")
def digits():
    """Pixels of digits as features: 400 known ones, 300 to classify."""
    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    features, labels = data.data[order].astype(np.float32), data.target[order].astype(np.int32)
    return (features[:400], labels[:400]), (features[400:700], labels[400:700])


def test_the_linear_classifier_is_scikit_learns(digits):
    """The same minimum: C is 1 / (N * strength), and the bias has no penalty."""
    (features, labels), (queries, _) = digits
    features, queries = features / 16, queries / 16
    found = fit_linear(features, labels, num_classes=10, strength=1e-3)
    expected = LogisticRegression(C=1 / (400 * 1e-3), tol=1e-6, max_iter=2000).fit(features, labels)
    logits = queries @ found["kernel"] + found["bias"]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected.predict_proba(queries), atol=5e-3)


def test_accuracies_of_pixels(digits):
    """Pixels of digits are good features: numbers of scikit-learn's classifiers on the same split."""
    train, test = digits
    neighbors = knn_accuracy(train, test, num_classes=10, ks=(1, 10, 1000))
    assert list(neighbors) == [1, 10]  # there are 400 known images
    assert 96 <= neighbors[1] <= 98.5
    assert list(knn_accuracy(train, test, num_classes=10, ks=(1000,))) == [400]
    top1, strength = linear_accuracy(train, test, num_classes=10, strength=1e-2)
    assert strength == 1e-2
    assert 92 <= top1 <= 97


@pytest.mark.slow
def test_the_strength_is_chosen_without_the_test_images(digits):
    train, (queries, labels) = digits
    top1, strength = linear_accuracy(train, (queries, labels), num_classes=10)
    shuffled = linear_accuracy(train, (queries, labels[::-1].copy()), num_classes=10)
    assert shuffled[1] == strength
    assert top1 > 92 > 20 > shuffled[0]


@pytest.mark.parametrize("name", ["vit", "regnety_002"])
def test_features_of_the_images_of_a_split(name):
    """In order and without padding; normalized by the model's own mean."""
    sizes = (
        {"dim": 16, "depth": 1, "num_heads": 2}
        if name == "vit"
        else {"widths": (8, 8), "depths": (1, 1), "group_width": 8}
    )
    options = {**sizes, **({"strides": (2, 2)} if name != "vit" else {})}
    info = ModelInfo(name, 3, (32, 32), options, preprocessing=Preprocessing(mean=(0.5, 0.4, 0.3)))
    model = info.build()
    images = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    batch = lambda image, label, mask: Batch(
        image, np.array(label, np.int32), np.array(mask), None, np.zeros((2, 2, 3), np.float32)
    )
    batches = [batch(images[:2], [2, 0], [True, True]), batch(images[[2, 2]], [1, 0], [True, False])]
    features, labels = extract_features(model, info, batches, make_mesh(jax.devices()[:1]))
    expected = model.pooled_features(normalize(jnp.asarray(images), (0.5, 0.4, 0.3)))
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert labels.tolist() == [2, 0, 1]
    # The classifier sees the same vector.
    head = model.head if name == "vit" else model.head.fc
    logits = model(normalize(jnp.asarray(images), (0.5, 0.4, 0.3))).logits
    np.testing.assert_allclose(head(jnp.asarray(features)), logits, atol=1e-4)


def test_what_has_no_features_is_refused():
    info = ModelInfo("vit", 3, (32, 32), {"dim": 16, "depth": 1, "num_heads": 2})
    model = info.build()
    with pytest.raises(ValueError, match=r"The split has no images\."):
        extract_features(model, info, [], make_mesh(jax.devices()[:1]))
    model.norm.scale[...] = jnp.full(16, jnp.nan)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    batch = Batch(images, np.zeros(1, np.int32), np.ones(1, bool), None, np.zeros((1, 2, 3), np.float32))
    with pytest.raises(ValueError, match="Features of this vit are NaN or infinite"):
        extract_features(model, info, [batch], make_mesh(jax.devices()[:1]))
    segmentation = ModelInfo("upernet", 3, (32, 32), {"dim": 16, "depth": 1, "num_heads": 2, "channels": 8})
    with pytest.raises(ValueError, match="upernet is a segmentation model"):
        extract_features(
            nnx.eval_shape(segmentation.build), segmentation, [batch], make_mesh(jax.devices()[:1])
        )
