"""Boxes and pixels of the images for training, evaluation and annotation, and their matrices."""

import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tiny_images

from tlvit.config import Augment
from tlvit.data.transforms import randaugment
from tlvit.data.transforms.crop import align_box, eval_image, random_box, squashed_image, train_image
from tlvit.ops.geometry import compose
from tlvit.ops.randaugment_policy import OPS, parse_policy


def png(image):
    return tf.io.encode_png(image)


def jpeg(image):
    return tf.constant(tiny_images.encode_jpeg(image))


def seeds(count):
    return [tf.constant([7, i], tf.int64) for i in range(count)]


@pytest.mark.parametrize(
    ("encode", "size", "image_size"),
    [
        (png, (90, 120), (32, 32)),
        (png, (90, 120), (24, 40)),
        # A JPEG's colors are off by up to two gray levels, so a source pixel must be worth more of them.
        (jpeg, (72, 84), (32, 32)),
        (jpeg, (61, 83), (16, 24)),  # decoded at half the size, which does not divide these numbers
        (jpeg, (66, 93), (7, 9)),  # at a quarter and an eighth
    ],
)
@pytest.mark.parametrize("antialias", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_matrix_of_a_training_image_points_at_its_pixels(encode, size, image_size, antialias):
    """Colors encode the position in the source. The matrix gives it to within one source pixel."""
    encoded = encode(tiny_images.position_image(40, *size))
    augment = Augment(crop_scale=(0.1, 1.0), antialias=antialias)
    flips = 0
    for seed in seeds(24):
        image, matrix = train_image(encoded, seed, image_size, augment)
        expected = np.tensordot(matrix.numpy(), tiny_images.pixel_centers(*image_size), 1)
        read = image.numpy()[:, :, :2].astype(np.float64).transpose(2, 0, 1) / 255
        error = np.abs(read - expected)[:, 1:-1, 1:-1] * np.array(size[::-1])[:, None, None]
        assert error.max() < 1, (seed, error.max())
        flips += matrix.numpy()[0, 0] < 0
    assert 4 < flips < 20


@pytest.fixture
def only_moves(monkeypatch):
    """Replaces every photometric operation by a geometric one."""
    original = randaugment.apply_op
    moves = [OPS.index(kind) for kind in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")]
    table = tf.constant([op if op in moves else moves[op % 5] for op in range(15)] + [15])
    replaced = lambda image, op, level, sign: original(image, tf.gather(table, op), level, sign)
    monkeypatch.setattr(randaugment, "apply_op", replaced)


@pytest.mark.parametrize(
    "policy", ["rand-m9-n2-mstd0.5-inc1", pytest.param("rand-m5-n4-inc1", marks=pytest.mark.slow)]
)
def test_the_matrix_follows_randaugment(policy, only_moves):
    """Crop, flip and geometric operations; photometric ones are replaced because they change the colors."""
    encoded = png(tiny_images.position_image(0, 120, 160))
    policy = parse_policy(policy)
    augment = Augment(crop_scale=(0.3, 1.0))
    moved = 0
    for seed in seeds(40):
        image, matrix = train_image(encoded, seed, (64, 72), augment, policy=policy)
        _, plain = train_image(encoded, seed, (64, 72), augment)
        expected = np.tensordot(matrix.numpy(), tiny_images.pixel_centers(64, 72), 1)
        read = image.numpy()[:, :, :2].astype(np.float64).transpose(2, 0, 1) / 255
        error = np.abs(read - expected) * np.array([160, 120])[:, None, None]
        kept = image.numpy()[:, :, 2] == 0  # pixels from outside of the image are filled with a blue of 104
        inner = np.zeros_like(kept)
        inner[1:-1, 1:-1] = (
            kept[1:-1, 1:-1] & kept[:-2, 1:-1] & kept[2:, 1:-1] & kept[1:-1, :-2] & kept[1:-1, 2:]
        )
        assert error[:, inner].max(initial=0) < 1, (seed, error[:, inner].max())
        moved += not np.allclose(matrix, plain)
    assert 15 < moved < 40


def test_large_crops_are_decoded_smaller():
    size = tf.constant([1000, 1003])
    for side, expected in ((900, 0), (620, 0), (600, 1), (310, 1), (300, 2), (155, 2), (150, 3), (20, 3)):
        box, halvings = align_box(tf.constant([3, 5, 990, 998]), size, (side, side))
        assert halvings == expected
        factor = 2**expected
        assert (box.numpy() % factor == 0).all()
        assert (box.numpy()[:2] + box.numpy()[2:] <= size.numpy()).all()
        assert np.abs(box - [3, 5, 990, 998]).max() <= factor


def test_the_published_label_crop_exchanges_the_axes_of_the_crop_in_the_flipped_image():
    encoded = png(tiny_images.position_image(0, 60, 100))
    flipped = 0
    for seed in seeds(12):
        image, aligned = train_image(encoded, seed, (16, 16), Augment())
        same, published = train_image(encoded, seed, (16, 16), Augment(), label_crop="published")
        np.testing.assert_array_equal(image, same)
        (a, _, left), (_, h, top) = aligned.numpy()
        flip, w = a < 0, abs(a)
        if flip:
            left = 1 - left  # aligned x = 1 - (left + w x)
        expected = np.array([[h, 0, top], [0, w, left]])
        if flip:
            expected[0] = [-h, 0, 1 - top]
        np.testing.assert_allclose(published, expected, atol=1e-6)
        flipped += flip
    assert 0 < flipped < 12


def test_labels_of_the_crop_move_with_randaugment_only():
    """The matrix of labels "none" is what RandAugment adds to that of the crop."""
    encoded = png(tiny_images.position_image(0, 60, 100))
    policy = parse_policy("rand-m9-n2-mstd0.5-inc1")
    moved = 0
    for seed in seeds(12):
        _, crop = train_image(encoded, seed, (16, 16), Augment())
        _, all_of_it = train_image(encoded, seed, (16, 16), Augment(), policy=policy)
        _, matrix = train_image(encoded, seed, (16, 16), Augment(), label_crop="none", policy=policy)
        np.testing.assert_allclose(compose(crop.numpy(), matrix.numpy()), all_of_it, atol=1e-5)
        _, still = train_image(encoded, seed, (16, 16), Augment(), label_crop="none")
        np.testing.assert_array_equal(still, np.eye(2, 3))
        moved += not np.allclose(matrix, np.eye(2, 3))
    assert 0 < moved < 12


@pytest.mark.slow
def test_random_boxes_have_the_published_distribution():
    size = tf.constant([400, 600])
    draw = tf.function(lambda s: random_box(s, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)))
    boxes = np.array([draw(tf.constant([1, i], tf.int64)) for i in range(3000)], np.float64)
    top, left, height, width = boxes.T
    assert (boxes[:, :2] >= 0).all()
    assert (top + height <= 400).all()
    assert (left + width <= 600).all()
    ours = np.stack(
        [width * height / 240_000, np.log(width / height), top / (401 - height), left / (601 - width)]
    )
    theirs = published_boxes(3000, 400, 600)
    corners = theirs[:2] / (np.array([[401], [601]]) - theirs[2:])
    theirs = np.stack([theirs[3] * theirs[2] / 240_000, np.log(theirs[3] / theirs[2]), *corners])
    for i in range(2):  # area and ratio: equal quantiles, within the noise of 3,000 draws
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.quantile(ours[i], quantiles), np.quantile(theirs[i], quantiles), atol=0.035
        )
    for i in (2, 3):  # corners: uniform over the positions that fit
        assert abs(ours[i].mean() - 0.5) < 0.02
        assert abs(ours[i].std() - 12**-0.5) < 0.02
    assert np.abs(np.corrcoef(ours) - np.corrcoef(theirs)).max() < 0.08


def published_boxes(count, height, width):
    """torchvision's RandomResizedCrop in numpy: (top, left, height, width) as float64 [4, count]."""
    rng = np.random.default_rng(0)
    boxes = []
    while len(boxes) < count:
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if w <= width and h <= height:  # ten misses in a row do not happen at this shape
            boxes.append((rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w))
    return np.array(boxes, np.float64).T


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((30, 30), (0, 0, 30, 30))],
)
def test_a_box_that_never_fits_becomes_the_center(size, expected):
    """Numbers of torchvision's fallback: 13 = round(10 * 4 / 3)."""
    box = random_box(tf.constant([0, 0], tf.int64), tf.constant(size), scale=(4.0, 5.0), ratio=(3 / 4, 4 / 3))
    np.testing.assert_array_equal(box, expected)


def test_the_smallest_images_have_a_box():
    for size in ((1, 1), (1, 40), (2, 1)):
        box = random_box(
            tf.constant([0, 3], tf.int64), tf.constant(size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)
        ).numpy()
        assert (box[2:] >= 1).all()
        assert (box[:2] + box[2:] <= size).all()


@pytest.mark.parametrize("encode", [png, jpeg])
@pytest.mark.parametrize(
    ("size", "image_size", "crop_pct"),
    [
        ((375, 500), (224, 224), 0.9),
        ((301, 200), (64, 64), 1.0),
        ((40, 50), (64, 64), 0.9),
        ((120, 90), (48, 80), 0.9),
    ],
)
def test_evaluation_equals_pillow(encode, size, image_size, crop_pct):
    encoded = encode(tiny_images.wavy_image(*size))
    result, found = eval_image(encoded, image_size=image_size, crop_pct=crop_pct)

    image = PIL.Image.open(io.BytesIO(encoded.numpy()))
    targets = [int(np.floor(s / crop_pct)) for s in image_size]
    zoom = [t / s for t, s in zip(targets, size, strict=True)]
    axis = int(np.argmax(zoom))
    scaled = [targets[axis] if i == axis else int(size[i] * targets[axis] / size[axis]) for i in (0, 1)]
    top, left = (round((s - t) / 2.0) for s, t in zip(scaled, image_size, strict=True))
    image = image.resize(scaled[::-1], PIL.Image.BICUBIC)
    expected = np.asarray(image.crop((left, top, left + image_size[1], top + image_size[0])), np.float64)
    difference = np.abs(result.numpy() - expected)
    assert difference.mean() < 0.3
    assert difference.max() <= 1  # Pillow rounds to whole gray levels after each of its two passes
    matrix = [
        [image_size[1] / scaled[1], 0, left / scaled[1]],
        [0, image_size[0] / scaled[0], top / scaled[0]],
    ]
    np.testing.assert_allclose(found, matrix, atol=1e-6)


def test_the_entire_image_is_resized_for_annotation():
    image, matrix = squashed_image(png(tiny_images.position_image(9, 60, 90)), image_size=(30, 30))
    expected = np.rint(tiny_images.pixel_centers(30, 30)[:2] * 255).transpose(1, 2, 0)
    assert np.abs(image.numpy()[2:-2, 2:-2, :2] - expected[2:-2, 2:-2]).max() <= 1
    np.testing.assert_array_equal(matrix, np.eye(3)[:2])
