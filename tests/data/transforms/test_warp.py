"""Rotation, shear and translation move pixels as Pillow does, and their matrices follow."""

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tiny_images

from tlvit.data.transforms import warp
from tlvit.data.transforms.randaugment import apply_op
from tlvit.ops.randaugment_policy import FILL, OPS

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.fixture(scope="module")
def photographs():
    return tiny_images.photographs()


@pytest.mark.parametrize("amount", [-0.27, -0.1, 0.3])
@pytest.mark.parametrize("kind", GEOMETRIC)
def test_geometric_operations_move_pixels_as_pillow_does(photographs, kind, amount):
    height, width = photographs.shape[1:3]
    coefficients = {
        "ShearX": (1, amount, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, amount, 1, 0),
        "TranslateXRel": (1, 0, round(amount * width), 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, round(amount * height)),
    }
    operations = {
        "Rotate": lambda x: warp.rotate(x, amount * 100),
        "ShearX": lambda x: warp.shear_x(x, amount),
        "ShearY": lambda x: warp.shear_y(x, amount),
        "TranslateXRel": lambda x: warp.translate_x(x, amount),
        "TranslateYRel": lambda x: warp.translate_y(x, amount),
    }
    how = dict(resample=PIL.Image.BILINEAR, fillcolor=FILL)
    for image in photographs:
        result, _ = operations[kind](tf.constant(image))
        picture = PIL.Image.fromarray(image)
        if kind == "Rotate":
            expected = picture.rotate(amount * 100, **how)
        else:
            expected = picture.transform(picture.size, PIL.Image.AFFINE, coefficients[kind], **how)
        difference = np.abs(result.numpy().astype(int) - np.asarray(expected))
        assert np.median(difference) <= 1
        assert difference.mean() < 1  # they differ along the edge of what is left of the image


def position_error(image, matrix):
    """Compares the positions that colors encode with those of the matrix.

    Returns the largest distance in pixels, and the fraction of the pixels that were compared.
    """
    height, width = image.shape[:2]
    expected = np.tensordot(matrix, tiny_images.pixel_centers(height, width), 1)
    inside = ((expected > 2 / min(height, width)) & (expected < 1 - 2 / min(height, width))).all(0)
    read = image[:, :, :2].transpose(2, 0, 1).astype(np.float64) / 255
    error = np.abs(read - expected) * np.array([width, height])[:, None, None]
    return error[:, inside].max(), inside.mean()


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
@pytest.mark.parametrize("kind", GEOMETRIC)
def test_the_matrix_of_a_move_points_at_its_pixels(kind, shape):
    image = tf.constant(tiny_images.position_image(0, *shape))
    corners = set()
    for level in (0.0, 0.3, 0.9, 1.0):
        for sign in (-1.0, 1.0):
            moved, matrix = apply_op(image, tf.constant(OPS.index(kind)), level, sign)
            error, seen = position_error(moved.numpy(), matrix.numpy())
            assert error < 1, (level, sign, error)
            assert seen > 0.4
            corners.add(tuple(np.round(matrix.numpy(), 4).ravel()))
    assert len(corners) == 7  # two signs of three levels, and the identity


def test_chains_of_moves_keep_their_matrix():
    """Four geometric operations in a row, each of them applied."""
    image = tf.constant(tiny_images.position_image(0, 96, 96))
    rng = np.random.default_rng(0)
    moves = [OPS.index(kind) for kind in GEOMETRIC]
    for _ in range(20):
        moved, matrix = image, np.eye(3)
        for op in rng.choice(moves, 4):
            sign = rng.choice([-1.0, 1.0])
            moved, step = apply_op(moved, tf.constant(op), rng.uniform(0, 0.7), sign)
            matrix = matrix @ np.concatenate([step.numpy(), [[0, 0, 1]]])
        error, seen = position_error(*blank_outside(moved.numpy(), matrix[:2]))
        assert error < 1
        assert seen > 0.05


def blank_outside(image, matrix):
    """Replaces the pixels that an earlier move filled (blue is 104) by the colors of their positions."""
    points = np.tensordot(matrix, tiny_images.pixel_centers(*image.shape[:2]), 1)
    expected = points.transpose(1, 2, 0) * 255
    filled = image[:, :, 2:] > 0  # the image's own blue is 0
    return np.concatenate([np.where(filled, expected, image[:, :, :2]), image[:, :, 2:]], -1), matrix


@pytest.mark.parametrize("kind", ["Rotate", "ShearX", "ShearY"])
def test_bicubic_moves_equal_pillow(photographs, kind):
    """To one gray level, where float32 and Pillow's float64 truncate to different whole numbers."""
    bicubic = dict(resample=PIL.Image.BICUBIC, fillcolor=FILL)
    for image, amount in zip(photographs, (-0.27, -0.1, 0.3), strict=True):
        picture = PIL.Image.fromarray(image)
        if kind == "Rotate":
            result, _ = warp.rotate(tf.constant(image), amount * 100, True)
            expected = picture.rotate(amount * 100, **bicubic)
        else:
            along_x = kind == "ShearX"
            result, _ = (warp.shear_x if along_x else warp.shear_y)(tf.constant(image), amount, True)
            coefficients = (1, amount, 0, 0, 1, 0) if along_x else (1, 0, 0, amount, 1, 0)
            expected = picture.transform(picture.size, PIL.Image.AFFINE, coefficients, **bicubic)
        difference = np.abs(result.numpy().astype(int) - np.asarray(expected))
        assert difference.max() <= 1
        assert difference.mean() < 0.01


def test_the_interpolation_may_be_drawn(photographs):
    image = tf.constant(photographs[0])
    cubic, linear = (warp.rotate(image, 20.0, kind)[0].numpy() for kind in (True, False))
    assert (cubic != linear).mean() > 0.1
    for expected, kind in ((cubic, True), (linear, False)):
        np.testing.assert_array_equal(warp.rotate(image, 20.0, tf.constant(kind))[0], expected)


def test_images_whose_size_is_not_known():
    """In the graph of tf.data a whole image has a size of its own: pixels and matrix are the same."""
    image = tf.constant(tiny_images.wavy_image(40, 56))

    def move(x):
        along = [warp.translate_x(x, -0.3), warp.translate_y(x, 0.2)]
        for bicubic in (False, True):
            along += [warp.rotate(x, 20.0, bicubic), warp.shear_x(x, 0.2, bicubic)]
            along += [warp.shear_y(x, -0.2, bicubic)]
        return along

    graph = tf.function(move, input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)])
    for (pixels, matrix), (expected, wanted) in zip(graph(image), move(image), strict=True):
        np.testing.assert_allclose(matrix, wanted, atol=1e-6)
        assert np.abs(pixels.numpy().astype(int) - expected.numpy()).max() <= 1
