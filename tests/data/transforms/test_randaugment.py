"""RandAugment on the host: pixels as Pillow's, matrices that say where pixels went, draws as published."""

import collections
import itertools

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFilter
import PIL.ImageOps
import pytest
import tensorflow as tf
import tiny_images
from sklearn.datasets import load_sample_images

from tlvit.data import pipeline
from tlvit.data.sources.tfds import open_source
from tlvit.data.transforms import randaugment
from tlvit.ops.randaugment_policy import FILL, OPS, AugmentPolicy, parse_policy

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.fixture(scope="module")
def photographs():
    """Crops of two photographs, uint8 [3, 224, 200, 3]; the third one is dull and dark."""
    china, flower = load_sample_images().images
    crops = [china[100:324, 200:400], flower[60:284, 300:500]]
    return np.stack([*crops, crops[0] // 3 + 20])


FACTORS = (0.1, 0.19, 0.55, 1.0, 1.45, 1.81, 1.9)
ENHANCERS = {"color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}


def add_below_128(image, amount):
    return image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)


def photometric_cases():
    """(our operation, Pillow's, their argument), named."""
    pairs = [("autocontrast", PIL.ImageOps.autocontrast), ("equalize", PIL.ImageOps.equalize)]
    for name, theirs in pairs:
        yield pytest.param(getattr(randaugment, name), theirs, None, id=name)
    arguments = {"posterize": (1, 2, 3, 4), "solarize": (0, 26, 128, 256)}
    for name, values in arguments.items():
        for n in values:
            yield pytest.param(getattr(randaugment, name), getattr(PIL.ImageOps, name), n, id=f"{name} {n}")
    for n in (0, 55, 110):
        yield pytest.param(randaugment.solarize_add, add_below_128, n, id=f"solarize_add {n}")
    for (name, kind), f in itertools.product(ENHANCERS.items(), FACTORS):
        theirs = lambda image, f, kind=kind: getattr(PIL.ImageEnhance, kind)(image).enhance(f)
        yield pytest.param(getattr(randaugment, name), theirs, f, id=f"{name} {f}")


@pytest.mark.parametrize(("ours", "theirs", "argument"), list(photometric_cases()))
def test_photometric_operations_equal_pillow(photographs, ours, theirs, argument):
    given = [] if argument is None else [argument]
    for image in photographs:
        result = ours(tf.constant(image), *given).numpy()
        expected = np.asarray(theirs(PIL.Image.fromarray(image), *given))
        assert result.dtype == np.uint8
        assert np.abs(result.astype(int) - expected).max() <= 1


def test_constant_channels_survive():
    image = np.full((20, 30, 3), 77, np.uint8)
    image[:, :, 1] = np.arange(30)
    for ours, theirs in (
        (randaugment.autocontrast, PIL.ImageOps.autocontrast),
        (randaugment.equalize, PIL.ImageOps.equalize),
    ):
        expected = np.asarray(theirs(PIL.Image.fromarray(image)))
        result = ours(tf.constant(image)).numpy()
        np.testing.assert_array_equal(result[:, :, [0, 2]], 77)
        assert np.abs(result.astype(int) - expected).max() <= 1


def test_no_bits_are_black(photographs):
    assert randaugment.posterize(tf.constant(photographs[0]), 0).numpy().max() == 0


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_close_to_pillow(photographs, radius):
    """Pillow's is three box filters in place of a Gaussian, so single pixels differ more."""
    for image in photographs:
        ours = randaugment.gaussian_blur(tf.constant(image), radius).numpy().astype(int)
        theirs = PIL.Image.fromarray(image).filter(PIL.ImageFilter.GaussianBlur(radius))
        assert np.abs(ours - np.asarray(theirs)).mean() < 0.6


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
    moves = {
        "Rotate": lambda x: randaugment.rotate(x, amount * 100),
        "ShearX": lambda x: randaugment.shear_x(x, amount),
        "ShearY": lambda x: randaugment.shear_y(x, amount),
        "TranslateXRel": lambda x: randaugment.translate_x(x, amount),
        "TranslateYRel": lambda x: randaugment.translate_y(x, amount),
    }
    how = dict(resample=PIL.Image.BILINEAR, fillcolor=FILL)
    for image in photographs:
        result, _ = moves[kind](tf.constant(image))
        picture = PIL.Image.fromarray(image)
        if kind == "Rotate":
            expected = picture.rotate(amount * 100, **how)
        else:
            expected = picture.transform(picture.size, PIL.Image.AFFINE, coefficients[kind], **how)
        difference = np.abs(result.numpy().astype(int) - np.asarray(expected))
        assert np.median(difference) <= 1
        assert difference.mean() < 1  # they differ along the edge of what is left of the image


def position_error(image, matrix):
    """Largest distance, in pixels, of what colors say of their origin and what the matrix says; the share of
    the pixels that this was taken over."""
    height, width = image.shape[:2]
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    told = np.tensordot(matrix, np.stack([x, y, np.ones_like(x)]), 1)
    inside = ((told > 2 / min(height, width)) & (told < 1 - 2 / min(height, width))).all(0)
    read = image[:, :, :2].transpose(2, 0, 1).astype(np.float64) / 255
    error = np.abs(read - told) * np.array([width, height])[:, None, None]
    return error[:, inside].max(), inside.mean()


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
@pytest.mark.parametrize("kind", GEOMETRIC)
def test_the_matrix_of_a_move_points_at_its_pixels(kind, shape):
    image = tf.constant(tiny_images.position_image(0, *shape))
    corners = set()
    for level in (0.0, 0.3, 0.9, 1.0):
        for sign in (-1.0, 1.0):
            moved, matrix = randaugment.apply_op(image, tf.constant(OPS.index(kind)), level, sign)
            error, seen = position_error(moved.numpy(), matrix.numpy())
            assert error < 1, (level, sign, error)
            assert seen > 0.4
            corners.add(tuple(np.round(matrix.numpy(), 4).ravel()))
    assert len(corners) == 7  # two signs of three levels, and the identity


def test_chains_of_moves_keep_their_matrix():
    """Only geometric operations, four of them one after the other, all always applied."""
    image = tf.constant(tiny_images.position_image(0, 96, 96))
    rng = np.random.default_rng(0)
    places = [OPS.index(kind) for kind in GEOMETRIC]
    for _ in range(20):
        moved, matrix = image, np.eye(3)
        for op in rng.choice(places, 4):
            sign = rng.choice([-1.0, 1.0])
            moved, step = randaugment.apply_op(moved, tf.constant(op), rng.uniform(0, 0.7), sign)
            matrix = matrix @ np.concatenate([step.numpy(), [[0, 0, 1]]])
        error, seen = position_error(*blank_outside(moved.numpy(), matrix[:2]))
        assert error < 1
        assert seen > 0.05


def blank_outside(image, matrix):
    """Replace what an earlier move filled in (mean color, blue 104) by the color it would have had."""
    height, width = image.shape[:2]
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    told = np.tensordot(matrix, np.stack([x, y, np.ones_like(x)]), 1).transpose(1, 2, 0) * 255
    filled = image[:, :, 2:] > 0  # the image's own blue is 0
    return np.concatenate([np.where(filled, told, image[:, :, :2]), image[:, :, 2:]], -1), matrix


def test_draws_follow_the_policy():
    """Magnitudes, signs and operations over many seeds, seen through a stand-in for the operation."""
    policy = AugmentPolicy(magnitude=9, layers=2, noise=0.5)
    seen = []
    original = randaugment.apply_op

    def spy(image, op, level, sign):
        seen.append((op, level, sign))
        return image, tf.constant([[1.0, 0, 0], [0, 1, 0]])

    randaugment.apply_op = spy
    try:

        @tf.function
        def draw(seed):
            seen.clear()
            randaugment.rand_augment(tf.zeros([4, 4, 3], tf.uint8), seed, policy)
            return [tf.stack([tf.cast(x, tf.float32) for x in layer]) for layer in seen]

        drawn = np.array([draw(tf.constant([3, i], tf.int64)) for i in range(3000)]).reshape(-1, 3)
    finally:
        randaugment.apply_op = original
    counts = collections.Counter(drawn[:, 0].astype(int))
    assert abs(counts.pop(len(OPS)) / 6000 - 0.5) < 0.03
    assert sorted(counts) == list(range(15))
    assert max(abs(n - 200) for n in counts.values()) < 60  # 4.3 standard deviations
    levels = drawn[:, 1] * 10
    assert abs(np.median(levels) - 9) < 0.05
    assert abs(np.quantile(levels, 0.16) - 8.5) < 0.05
    assert levels.max() == 10
    assert 0.01 < (levels == 10).mean() < 0.04  # two standard deviations: 2.3 %
    assert set(drawn[:, 2]) == {-1.0, 1.0}
    assert abs(drawn[:, 2].mean()) < 0.06


def test_one_seed_gives_one_image(photographs):
    policy = parse_policy("rand-m9-n2-mstd0.5-inc1")
    run = tf.function(lambda x, seed: randaugment.rand_augment(x, seed, policy))
    image = tf.constant(photographs[0])
    results = [run(image, tf.constant([1, i], tf.int64)) for i in range(12)]
    again = run(image, tf.constant([1, 5], tf.int64))
    np.testing.assert_array_equal(results[5][0], again[0])
    np.testing.assert_array_equal(results[5][1], again[1])
    assert len({result[0].numpy().tobytes() for result in results}) > 6
    assert results[0][0].shape == photographs[0].shape


def test_color_jitter_and_three_augment(photographs):
    image = tf.constant(photographs[0])
    jittered = [randaugment.color_jitter(image, tf.constant([0, i], tf.int64), 0.3).numpy() for i in range(6)]
    assert len({x.tobytes() for x in jittered}) == 6
    for x in jittered:
        assert 0.2 < np.abs(x.astype(int) - photographs[0]).mean() < 60
    expected = [
        np.asarray(PIL.ImageOps.grayscale(PIL.Image.fromarray(photographs[0])).convert("RGB")),
        np.asarray(PIL.ImageOps.solarize(PIL.Image.fromarray(photographs[0]))),
    ]
    found = collections.Counter()
    for i in range(30):
        x = randaugment.three_augment(image, tf.constant([0, i], tf.int64)).numpy().astype(int)
        which = [k for k in range(2) if np.abs(x - expected[k]).max() <= 1]
        found[which[0] if which else "blur"] += 1
        if not which:
            assert abs(x.mean() - photographs[0].mean()) < 1
    assert set(found) == {0, 1, "blur"}
    assert min(found.values()) >= 4


def test_policies_are_read():
    assert parse_policy("") is None
    assert parse_policy("rand-m9-mstd0.5-inc1") == AugmentPolicy(9, 2, 0.5)
    assert parse_policy("rand-n3-inc1-m7") == AugmentPolicy(7, 3, 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("augmix-m3", "'augmix'"),
        ("rand-m9-q3-inc1", "'q3'"),
        ("rand-m9-mstd-inc1", "'mstd'"),
        ("rand-m11-inc1", "'m11'"),
        ("rand-m9-n0-inc1", "'n0'"),
        ("rand-m9-n2.5-inc1", "'n2.5'"),
        ("rand-m9-inc0", "'inc0'"),
        ("rand-m9-m8-inc1", "'m8'"),
        ("rand-m9", "'inc1'"),
        ("rand-inc1", "'m9'"),
    ],
)
def test_a_wrong_piece_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        parse_policy(text)


def test_the_pipeline_takes_the_options(tmp_path):
    tiny_images.prepare(tmp_path, [tiny_images.position_image(i, 50, 60) for i in range(12)])
    source = open_source("tiny_images", "train", data_dir=str(tmp_path))

    def batch(**options):
        return next(pipeline.train_batches(source, batch_size=12, image_size=(32, 40), seed=3, **options))

    plain, moved = batch(), batch(randaugment="rand-m9-n3-mstd0.5-inc1")
    again = batch(randaugment="rand-m9-n3-mstd0.5-inc1", num_threads=1)
    np.testing.assert_array_equal(moved.image, again.image)
    np.testing.assert_array_equal(moved.geometry, again.geometry)
    changed = (plain.image != moved.image).any((1, 2, 3))
    turned = (plain.geometry != moved.geometry).any((1, 2))
    assert 6 < changed.sum() <= 12
    assert 1 < turned.sum() < 11
    assert not (turned & ~changed).any()
    for options in ({"three_augment": True}, {"color_jitter": 0.3}):
        other = batch(**options)
        assert (plain.image != other.image).any((1, 2, 3)).sum() > 6
        np.testing.assert_array_equal(plain.geometry, other.geometry)
    with pytest.raises(ValueError, match="'q9'"):
        batch(randaugment="rand-q9")
