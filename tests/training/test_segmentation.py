"""The segmentation task: its loss, and confusion matrices over exactly the pixels that count."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import log_softmax, randn
from flax import nnx

from tlvit.checkpoints.model_info import Preprocessing
from tlvit.config import Segmentation, resolve
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.ops.segmentation import segmentation_loss
from tlvit.training.evaluation import evaluate
from tlvit.training.mesh import make_mesh
from tlvit.training.segmentation import HALF, SEGMENTATION, eval_step, means, objective, zero_padding
from tlvit.types import Batch, SegmentationOutput

CLASSES = 3
KERNEL = randn(3, CLASSES, seed=3)


class PixelClassifier(nnx.Module):
    """A linear classifier of single pixels."""

    def __init__(self):
        self.kernel = nnx.Param(jax.numpy.asarray(KERNEL))

    def __call__(self, images, *, key=None):
        return SegmentationOutput(logits=images @ self.kernel[...])


def batch(size=(8, 12), count=3, geometry=None, seed=0):
    """Random images. The last one is padding; the first row of all others does not count."""
    random = np.random.RandomState(seed)
    classes = random.randint(0, CLASSES, (count, *size)).astype(np.uint8)
    classes[:, 0] = 255
    classes[-1] = 255
    return Batch(
        image=random.randint(0, 256, (count, *size, 3)).astype(np.uint8),
        label=np.zeros(count, np.int32),
        mask=np.arange(count) < count - 1,
        maps=None,
        geometry=np.tile(np.eye(2, 3, dtype=np.float32), (count, 1, 1)) if geometry is None else geometry,
        segmentation=classes,
    )


@pytest.mark.parametrize("normalize_by", ["all", "valid"])
def test_the_objective_is_the_loss_of_both_heads_with_the_settings(normalize_by):
    config = resolve({
        "task": "segmentation", "token_labels": False, "image_size": (8, 12),
        "augment": {"randaugment": "", "random_erasing": 0.0},
        "segmentation": {"num_classes": CLASSES, "aux_weight": 0.7, "normalize": normalize_by},
    })  # fmt: skip
    output = SegmentationOutput(logits=randn(3, 4, 6, CLASSES), aux=randn(3, 2, 3, CLASSES, seed=1))
    loss = objective(None, None, config, None, None, 1)
    given = batch()
    value, stats = loss(lambda images: (output, "statistics"), randn(3, 8, 12, 3), given, None, ())
    classes = given.segmentation.astype(np.int32)
    wanted = segmentation_loss(output, classes, aux_weight=0.7, normalize=normalize_by)
    assert float(value) == pytest.approx(float(wanted))
    assert stats == "statistics"


def test_a_batch_without_annotations_is_refused():
    given = dataclasses.replace(batch(), segmentation=None)
    loss = objective(None, None, resolve({}), None, None, 1)
    with pytest.raises(ValueError, match="needs the class of every pixel"):
        loss(lambda images: (SegmentationOutput(logits=images), None), randn(3, 8, 12, 3), given, None, ())


def test_pixels_outside_of_the_image_are_zero():
    """Views of 8 x 12 pixels whose last 2 rows and 3 columns are beyond the image. The second is mirrored."""
    right = [[12 / 9, 0, 0], [0, 8 / 6, 0]]
    mirrored = [[-12 / 9, 0, 12 / 9], [0, 8 / 6, 0]]
    images = np.ones((2, 8, 12, 3), np.float32)
    found = np.asarray(zero_padding(images, np.array([right, mirrored], np.float32)))
    expected = np.zeros((2, 8, 12, 3), np.float32)
    expected[0, :6, :9] = 1
    expected[1, :6, 3:] = 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("window", [0, 6])
def test_an_evaluation_counts_the_labeled_pixels_of_images_of_several_sizes(window):
    net, params, stats = functionalize(PixelClassifier())
    rule = Preprocessing(crop_pct=1.0, scale=(12, 8), window=window, stride=4 if window else 0)
    mesh = make_mesh(jax.devices()[:1])
    step = eval_step(net, mesh, rule, Segmentation(num_classes=CLASSES))
    batches = [batch((8, 12)), batch((12, 8), seed=1)]
    found = evaluate(step, {"raw": {"params": params, "stats": stats}}, batches, SEGMENTATION)["raw"]
    labels, predicted, losses = [], [], []
    for given in batches:
        logits = np.asarray(normalize(given.image, rule.mean, rule.std)) @ KERNEL
        counted = given.segmentation != 255
        labels.append(given.segmentation[counted])
        predicted.append(logits.argmax(-1)[counted])
        losses.append(-log_softmax(logits)[counted][np.arange(len(labels[-1])), labels[-1]])
    label, guess = np.concatenate(labels), np.concatenate(predicted)
    both = [np.sum((label == c) & (guess == c)) for c in range(CLASSES)]
    either = [np.sum((label == c) | (guess == c)) for c in range(CLASSES)]
    assert found["count"] == 4
    assert found["miou"] == pytest.approx(100 * np.mean(np.divide(both, either)))
    assert found["macc"] == pytest.approx(100 * np.mean(np.divide(both, np.bincount(label))))
    assert found["aacc"] == pytest.approx(100 * np.mean(label == guess))
    assert found["loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-4)


def test_counts_above_the_range_of_int32_are_exact():
    """Three billion pixels of one class and one of another."""
    counts = np.array([[3 * 10**9, 0], [1, 0]], np.int64)
    found = means({"low": counts % HALF, "high": counts // HALF, "loss": 6e9, "images": 5})
    assert found["count"] == 5
    assert found["aacc"] == pytest.approx(100 * 3e9 / (3e9 + 1), rel=1e-12)
    assert found["macc"] == 50
    assert found["miou"] == pytest.approx(50 * 3e9 / (3e9 + 1), rel=1e-12)
    assert found["loss"] == pytest.approx(6e9 / (3e9 + 1))
