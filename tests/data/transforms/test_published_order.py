"""augment.order="published": the crop after RandAugment, and a matrix that still points at the pixels."""

import numpy as np
import pytest
import tensorflow as tf
import tiny_images

from tlvit.config import Augment
from tlvit.data.transforms import randaugment
from tlvit.data.transforms.crop import train_image
from tlvit.ops.randaugment_policy import OPS, parse_policy

POLICY = parse_policy("rand-m9-n2-mstd0.5-inc1")
AUGMENT = Augment(crop_scale=(0.3, 1.0), order="published")
SIZE, SOURCE = (40, 48), (90, 120)


def encoded():
    return tf.io.encode_png(tiny_images.position_image(0, *SOURCE))


@pytest.fixture(scope="module")
def only_moves():
    """Replaces every photometric operation by a geometric one."""
    original = randaugment.apply_op
    moves = [OPS.index(kind) for kind in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")]
    table = tf.constant([op if op in moves else moves[op % 5] for op in range(15)] + [15])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randaugment, "apply_op", lambda x, op, *more: original(x, tf.gather(table, op), *more))
        yield


def draw(label_crop, count=24):
    """(image, matrix) of the first seeds."""
    crop = tf.function(
        lambda seed: train_image(encoded(), seed, SIZE, AUGMENT, policy=POLICY, label_crop=label_crop)
    )
    return [[x.numpy() for x in crop(tf.constant([7, i], tf.int64))] for i in range(count)]


@pytest.fixture(scope="module")
def aligned(only_moves):
    return draw("aligned")


def test_the_matrix_points_at_the_pixels(aligned):
    """Flip, moves of the whole image and the crop, composed in this order."""
    flips = 0
    for image, matrix in aligned:
        expected = np.tensordot(matrix, tiny_images.pixel_centers(*SIZE), 1)
        read = image[:, :, :2].astype(np.float64).transpose(2, 0, 1) / 255
        error = np.abs(read - expected) * np.array(SOURCE[::-1])[:, None, None]
        kept = image[:, :, 2] == 0  # filled pixels have a blue of 104
        inner = np.zeros_like(kept)
        inner[1:-1, 1:-1] = (
            kept[1:-1, 1:-1] & kept[:-2, 1:-1] & kept[2:, 1:-1] & kept[1:-1, :-2] & kept[1:-1, 2:]
        )
        assert error[:, inner].max(initial=0) < 1.5
        flips += matrix[0, 0] < 0
    assert 4 < flips < 20


def test_crops_may_show_what_was_filled(aligned):
    """The difference to the other order: the move is a fraction of the whole image."""
    filled, outside = [], []
    for image, matrix in aligned:
        filled.append((image[:, :, 2] > 50).mean())
        points = np.tensordot(matrix, tiny_images.pixel_centers(*SIZE), 1)
        outside.append(((points < 0) | (points > 1)).any(0).mean())
    difference = np.subtract(filled, outside)
    assert max(filled) > 0.2
    assert abs(np.median(difference)) < 0.01
    assert difference.min() > -0.06  # a second move may bring back what the first one has filled


@pytest.mark.slow
def test_labels_of_the_crop_know_what_was_filled(aligned):
    """The matrix of labels "none" is without the flip, which fills nothing."""
    flip = np.array([[-1, 0, 1], [0, 1, 0]], np.float32)
    for (image, matrix), (same, none) in zip(aligned, draw("none", 12), strict=False):
        np.testing.assert_array_equal(image, same)
        unflipped = flip[:, :2] @ matrix + flip[:, 2:] * [0, 0, 1]
        assert np.allclose(none, matrix, atol=1e-6) or np.allclose(none, unflipped, atol=1e-5)


@pytest.mark.slow
def test_the_published_label_crop_exchanges_the_axes_after_the_move(aligned):
    """aligned = A @ crop and published = A @ (the crop with its axes exchanged), for the same A."""
    for (image, matrix), (same, published) in zip(aligned, draw("published", 12), strict=False):
        np.testing.assert_array_equal(image, same)
        # crop = [[w, 0, x], [0, h, y]] becomes [[h, 0, y], [0, w, x]]: the areas are equal.
        assert np.linalg.det(matrix[:, :2]) == pytest.approx(np.linalg.det(published[:, :2]), rel=1e-3)


def test_the_published_label_crop_without_a_move():
    plain = [
        train_image(encoded(), tf.constant([7, i], tf.int64), SIZE, AUGMENT, label_crop=crop)[1].numpy()
        for i in range(4)
        for crop in ("aligned", "published")
    ]
    for (row, column), exchanged in zip(plain[::2], plain[1::2], strict=True):
        flip, width, left = row[0] < 0, abs(row[0]), 1 - row[2] if row[0] < 0 else row[2]
        sign, start = (-1, 1 - column[2]) if flip else (1, column[2])
        wanted = [[sign * column[1], 0, start], [0, width, left]]
        np.testing.assert_allclose(exchanged, wanted, atol=1e-6)


def test_the_crop_without_randaugment():
    """The same boxes as in the other order; only the decoding differs."""
    first = Augment(crop_scale=(0.3, 1.0), antialias=True)
    last = Augment(crop_scale=(0.3, 1.0), antialias=True, order="published")
    for i in range(4):
        seed = tf.constant([3, i], tf.int64)
        (image, matrix), (other, same) = (train_image(encoded(), seed, SIZE, a) for a in (first, last))
        np.testing.assert_allclose(matrix, same, atol=1e-6)
        assert np.abs(image.numpy().astype(int) - other.numpy()).max() <= 1
