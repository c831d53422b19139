"""Segmentation loss, sliding window, confusion matrix and IoU against published numbers and by hand."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import log_softmax, randn, softmax

from tlvit.ops.segmentation import (
    confusion_matrix,
    iou_summary,
    multi_scale_probs,
    pixel_cross_entropy,
    rescaled_size,
    segmentation_loss,
    slide_logits,
    window_starts,
)
from tlvit.types import SegmentationOutput


def random_labels(*shape, classes=4, seed=1):
    return np.random.RandomState(seed).randint(0, classes, shape).astype(np.int32)


# Loss


def test_the_loss_divides_by_all_or_by_the_labeled_pixels():
    logits, labels = randn(2, 6, 5, 4), random_labels(2, 6, 5)
    labels[0, :3] = 255
    entropy = -np.take_along_axis(log_softmax(logits), np.minimum(labels, 3)[..., None], -1)[..., 0]
    total = entropy[labels != 255].sum()
    assert float(pixel_cross_entropy(logits, labels)) == pytest.approx(total / 60, rel=1e-5)
    assert float(pixel_cross_entropy(logits, labels, normalize="valid")) == pytest.approx(
        total / 45, rel=1e-5
    )
    assert float(pixel_cross_entropy(logits, np.full_like(labels, 255), normalize="valid")) == 0.0


def test_the_auxiliary_head_is_weighted():
    labels = random_labels(2, 8, 8)
    output = SegmentationOutput(logits=randn(2, 4, 4, 4), aux=randn(2, 2, 2, 4, seed=1))
    main, aux = pixel_cross_entropy(output.logits, labels), pixel_cross_entropy(output.aux, labels)
    assert float(segmentation_loss(output, labels)) == pytest.approx(float(main + 0.4 * aux))
    assert float(segmentation_loss(output, labels, aux_weight=1.0)) == pytest.approx(float(main + aux))
    alone = SegmentationOutput(logits=output.logits)
    assert float(segmentation_loss(alone, labels)) == pytest.approx(float(main))


def test_any_label_can_be_ignored_and_wrong_ones_are_noticed():
    logits, labels = randn(1, 4, 4, 4), random_labels(1, 4, 4)
    ignored = pixel_cross_entropy(logits, labels, ignore=2)
    assert float(ignored) == pytest.approx(
        float(pixel_cross_entropy(logits, np.where(labels == 2, 255, labels)))
    )
    for wrong in (-1, 4, 255):
        labels[0, 0, 0] = wrong
        assert math.isnan(pixel_cross_entropy(logits, labels, ignore=2)), wrong
    with pytest.raises(ValueError, match="all, valid, not 'mean'"):
        pixel_cross_entropy(logits, labels, normalize="mean")


def test_gradients_of_ignored_pixels_are_zero():
    labels = random_labels(1, 4, 4)
    labels[0, 1:] = 255
    gradient = jax.grad(pixel_cross_entropy)(jnp.asarray(randn(1, 4, 4, 4)), labels)
    assert np.abs(gradient[0, 1:]).max() == 0
    assert np.abs(gradient[0, 0]).min() > 0


# Inference


def test_windows_are_the_published_ones(golden):
    z = golden("seg_visible.npz")
    config = json.loads(str(z["slide/config"]))
    (height, width), (crop, _), (stride, _) = (config[k] for k in ("image", "crop", "stride"))
    rows, columns = window_starts(height, crop, stride), window_starts(width, crop, stride)
    windows = [[y, x, y + crop, x + crop] for y in rows for x in columns]
    assert windows == z["slide/windows"].tolist()
    assert window_starts(40, 64, 43) == [0]  # a side that is shorter than the window
    assert window_starts(64, 64, 43) == [0]
    assert window_starts(65, 64, 43) == [0, 1]


def test_the_mean_over_windows_is_weighted_by_their_number(golden):
    """Each window gives the number of its call: the result is the mean of the windows over a pixel."""
    z = golden("seg_visible.npz")
    calls = []

    def apply(x):
        calls.append(x.shape)
        return jnp.full((2, 3, 5, 1), float(len(calls)))

    logits = slide_logits(apply, np.zeros((2, 150, 190, 3), np.float32), crop=64, stride=43)
    assert set(calls) == {(2, 64, 64, 3)}
    total = np.zeros((150, 190))
    for i, (y1, x1, y2, x2) in enumerate(z["slide/windows"]):
        total[y1:y2, x1:x2] += i + 1
    expected = np.broadcast_to((total / z["slide/count"])[None, :, :, None], logits.shape)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_windows_of_images_that_are_smaller():
    x = randn(1, 20, 50, 3)
    np.testing.assert_allclose(slide_logits(lambda x: x, x, crop=(32, 64), stride=(32, 64)), x, atol=1e-6)
    np.testing.assert_allclose(slide_logits(lambda x: x, x, crop=32, stride=9), x, atol=1e-6)
    inside = jax.jit(lambda x: slide_logits(lambda y: y, x, crop=32, stride=9))
    np.testing.assert_allclose(inside(x), x, atol=1e-6)
    for stride in (0, 33):
        with pytest.raises(ValueError, match=rf"stride must be in 1\.\.32, the window size, not {stride}"):
            slide_logits(lambda x: x, x, crop=32, stride=stride)


def test_sizes_keep_the_proportions_as_published(golden):
    for height, width, percent, *expected in golden("seg_visible.npz")["ops/rescale"].tolist():
        limits = (int(2048 * percent / 100), int(512 * percent / 100))
        assert list(rescaled_size((height, width), limits)) == expected


def test_probabilities_are_averaged_over_sizes_and_mirror_images():
    x = randn(1, 12, 16, 3)
    shapes = []

    def predict(images):
        shapes.append(images.shape[1:3])
        ramp = jnp.linspace(0.0, 1.0, images.shape[2])[None, None, :, None]
        return images + ramp  # depends on the column: not symmetric

    probs = multi_scale_probs(predict, x, ratios=(1.0,), scale=(16, 12))
    ramp = np.linspace(0, 1, 16)[None, None, :, None]
    expected = (softmax(x + ramp) + softmax(x + ramp[:, :, ::-1])) / 2
    np.testing.assert_allclose(probs, expected, atol=1e-6)
    probs = multi_scale_probs(predict, x, ratios=(0.5, 2.0), scale=(16, 12), flip=False)
    assert shapes == [(12, 16), (12, 16), (6, 8), (24, 32)]
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-6)


# Metrics


@pytest.mark.parametrize("prefix", ["", "zero_"])
def test_iou_equals_the_published_one(golden, prefix):
    """The sums over three images; with `zero_` label 0 is ignored and the others are one less."""
    z = golden("seg_visible.npz")
    classes = json.loads(str(z["metrics/config"]))["classes"]
    confusion = np.zeros((classes, classes))
    for i in range(3):
        label = z[f"metrics/{'raw_' if prefix else ''}label{i}"].astype(np.int32)
        if prefix:
            label = np.where((label == 0) | (label == 255), 255, label - 1)
        confusion += confusion_matrix(z[f"metrics/pred{i}"], label, classes)
    value = lambda name: z[f"metrics/{prefix}{name}"]
    np.testing.assert_array_equal(np.diag(confusion), value("area_intersect"))
    np.testing.assert_array_equal(confusion.sum(0), value("area_pred"))
    np.testing.assert_array_equal(confusion.sum(1), value("area_label"))
    summary = iou_summary(confusion)
    np.testing.assert_allclose(summary["iou"], value("IoU"), rtol=1e-12)
    np.testing.assert_allclose(summary["accuracy"], value("Acc"), rtol=1e-12)
    found = [summary[k] for k in ("aacc", "miou", "macc")]
    np.testing.assert_allclose(found, [value(k) for k in ("aAcc", "mIoU", "mAcc")], rtol=1e-12)
    np.testing.assert_allclose(np.round(100 * np.array(found), 2), value("summary_percent"))


def test_classes_without_pixels():
    """0 is right, 1 is labeled only, 2 predicted only, 3 neither."""
    confusion = np.zeros((4, 4), int)
    confusion[0, 0], confusion[1, 2] = 3, 1
    summary = iou_summary(confusion)
    np.testing.assert_array_equal(summary["iou"], [1, 0, 0, np.nan])
    np.testing.assert_array_equal(summary["accuracy"], [1, 0, np.nan, np.nan])
    assert (summary["miou"], summary["macc"], summary["aacc"]) == (1 / 3, 0.5, 0.75)
    empty = iou_summary(np.zeros((2, 2)))
    assert all(math.isnan(empty[k]) for k in ("miou", "macc", "aacc"))


def test_the_confusion_matrix_counts_pairs():
    pred, labels = random_labels(2, 9, 7, seed=2), random_labels(2, 9, 7, seed=3)
    labels[0, 0, :4] = [255, 4, -1, 3]
    expected = np.zeros((4, 4), int)
    for p, t in zip(pred.ravel(), labels.ravel(), strict=True):
        if t in range(4):
            expected[t, p] += 1
    found = jax.jit(lambda p, t: confusion_matrix(p, t, 4))(pred, labels)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(confusion_matrix(pred, labels, 4, ignore=3)[3], 0)
    small = confusion_matrix(pred.astype(np.uint8), labels.astype(np.uint8), 4)  # 4 * 4 * … overflows uint8
    np.testing.assert_array_equal(small, expected)
