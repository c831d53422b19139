"""Transforms: boxes, pixels, and the matrix that says where the pixels come from."""

import contextlib
import io

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
import tiny_images
from sklearn.datasets import load_sample_images

from tlvit.data.transforms import crop as transforms
from tlvit.data.transforms import randaugment
from tlvit.ops.randaugment_policy import OPS, parse_policy


def png(image):
    return tf.io.encode_png(image)


def jpeg(image, quality=100):
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling=0)
    return tf.constant(stream.getvalue())


def seeds(count):
    return [tf.constant([7, i], tf.int64) for i in range(count)]


def centers(height, width):
    """(x, y, 1) of the pixel centers [3, H, W]."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([x, y, np.ones_like(x)])


def photograph(height, width, seed=0):
    """Waves, an edge and a little noise, away from 0 and 255 (Pillow clips between its two passes)."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = [np.sin(rng.uniform(3, 25) * x + rng.uniform(3, 25) * y + rng.uniform(0, 6)) for _ in range(3)]
    edges = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.05)[:, :, None] * rng.uniform(-40, 40, 3)
    image = 128 + 45 * np.stack(waves, -1) + edges + rng.normal(0, 4, (height, width, 3))
    return np.rint(image).astype(np.uint8)


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
@pytest.mark.parametrize("exact_resize", [False, True])
def test_the_matrix_of_a_training_image_points_at_its_pixels(encode, size, image_size, exact_resize):
    """Colors encode the position in the source; the matrix gives the same position within a source pixel."""
    encoded = encode(tiny_images.position_image(40, *size))
    flips = 0
    for seed in seeds(24):
        image, geometry = transforms.train_image(
            encoded, seed, image_size=image_size, scale=(0.1, 1.0), exact_resize=exact_resize
        )
        expected = np.tensordot(geometry.numpy(), centers(*image_size), 1)
        read = image.numpy()[:, :, :2].astype(np.float64).transpose(2, 0, 1) / 255
        error = np.abs(read - expected)[:, 1:-1, 1:-1] * np.array(size[::-1])[:, None, None]
        assert error.max() < 1, (seed, error.max())
        flips += geometry.numpy()[0, 0] < 0
    assert 4 < flips < 20


@pytest.mark.parametrize("policy", ["rand-m9-n2-mstd0.5-inc1", "rand-m5-n4-inc1"])
def test_the_matrix_follows_randaugment(policy):
    """Crop, flip and moves; photometric operations become moves too, as colors are the proof."""
    encoded = png(tiny_images.position_image(0, 120, 160))
    policy = parse_policy(policy)
    moved = 0
    for seed in seeds(40):
        options = dict(image_size=(64, 72), scale=(0.3, 1.0))
        with only_moves():
            image, geometry = transforms.train_image(encoded, seed, **options, randaugment_policy=policy)
        _, plain = transforms.train_image(encoded, seed, **options)
        geometry = geometry.numpy()
        expected = np.tensordot(geometry, centers(64, 72), 1)
        read = image.numpy()[:, :, :2].astype(np.float64).transpose(2, 0, 1) / 255
        error = np.abs(read - expected) * np.array([160, 120])[:, None, None]
        kept = image.numpy()[:, :, 2] == 0  # blue tells what was filled in
        inner = np.zeros_like(kept)
        inner[1:-1, 1:-1] = (
            kept[1:-1, 1:-1] & kept[:-2, 1:-1] & kept[2:, 1:-1] & kept[1:-1, :-2] & kept[1:-1, 2:]
        )
        assert error[:, inner].max(initial=0) < 1, (seed, error[:, inner].max())
        moved += not np.allclose(geometry, plain)
    assert 15 < moved < 40


@contextlib.contextmanager
def only_moves():
    """Every photometric operation becomes a geometric one."""
    original = randaugment.apply_op
    places = [OPS.index(kind) for kind in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")]
    table = tf.constant([op if op in places else places[op % 5] for op in range(15)] + [15])
    randaugment.apply_op = lambda image, op, level, sign: original(image, tf.gather(table, op), level, sign)
    try:
        yield
    finally:
        randaugment.apply_op = original


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "zoom", [0.7, 1.0, 1.19, 1.21, 1.4, 1.6, 1.62, 1.63, 1.65, 1.9, 2.4, 3.2, 3.3, 4.5, 6.4, 7]
)
def test_the_fast_resize_stays_near_pillow(method, zoom):
    """Crops `zoom` times the final size: over two photographs, the mean difference is below 4 gray levels."""
    differences = []
    for photo in load_sample_images().images:
        encoded = jpeg(photo, 90)
        pixels = np.asarray(PIL.Image.open(io.BytesIO(encoded.numpy())))
        side = min(int(380 / zoom), 224)
        wanted = tf.constant([17, 101, round(side * zoom), round(side * zoom)])
        snap = lambda size, wanted=wanted, side=side: transforms.snap_box(wanted, size, (side, side))
        crop, box, _ = transforms.decode_and_crop(
            encoded, lambda size, snap=snap: (*snap(size), snap(size)[0])
        )
        top, left, height, width = box.numpy()
        assert np.abs(box - wanted).max() <= 8
        result = transforms.fast_resize(crop, (side, side), method).numpy()
        image = PIL.Image.fromarray(pixels[top : top + height, left : left + width])
        image = image.resize((side, side), getattr(PIL.Image, method.upper()))
        difference = result.astype(int) - np.asarray(image)
        differences.append(np.abs(difference).mean())
        assert abs(difference.mean()) < 0.6
    assert np.mean(differences) < (0.5 if zoom < 1 else 4)


def test_large_crops_are_decoded_smaller():
    size = tf.constant([1000, 1003])
    for side, expected in ((900, 0), (620, 0), (600, 1), (310, 1), (300, 2), (155, 2), (150, 3), (20, 3)):
        box, halvings = transforms.snap_box(tf.constant([3, 5, 990, 998]), size, (side, side))
        assert halvings == expected
        factor = 2**expected
        assert (box.numpy() % factor == 0).all()
        assert (box.numpy()[:2] + box.numpy()[2:] <= size.numpy()).all()
        assert np.abs(box - [3, 5, 990, 998]).max() <= factor


def test_the_published_label_crop_exchanges_the_axes_of_the_crop_in_the_flipped_image():
    encoded = png(tiny_images.position_image(0, 60, 100))
    flipped = 0
    for seed in seeds(12):
        image, aligned = transforms.train_image(encoded, seed, image_size=(16, 16))
        same, published = transforms.train_image(encoded, seed, image_size=(16, 16), label_crop="published")
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


def test_the_top_half_is_taught_with_the_left_half_when_published():
    """The example of the published defect: crop = top half."""
    box, size = tf.constant([0, 0, 50, 100]), tf.constant([100, 100])
    np.testing.assert_allclose(transforms.crop_matrix(box, size), [[1, 0, 0], [0, 0.5, 0]])
    np.testing.assert_allclose(transforms.crop_matrix(box, size, transposed=True), [[0.5, 0, 0], [0, 1, 0]])


def test_random_boxes_have_the_published_distribution():
    size = tf.constant([400, 600])
    draw = tf.function(lambda s: transforms.random_box(s, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)))
    boxes = np.array([draw(tf.constant([1, i], tf.int64)) for i in range(3000)], np.float64)
    top, left, height, width = boxes.T
    assert (boxes[:, :2] >= 0).all()
    assert (top + height <= 400).all()
    assert (left + width <= 600).all()
    ours = np.stack(
        [width * height / 240_000, np.log(width / height), top / (401 - height), left / (601 - width)]
    )
    theirs = published_boxes(3000, 400, 600)
    places = theirs[:2] / (np.array([[401], [601]]) - theirs[2:])
    theirs = np.stack([theirs[3] * theirs[2] / 240_000, np.log(theirs[3] / theirs[2]), *places])
    for i in range(2):  # area and ratio: equal quantiles, within the noise of 3,000 draws
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.quantile(ours[i], quantiles), np.quantile(theirs[i], quantiles), atol=0.035
        )
    for i in (2, 3):  # corners: uniform over the places that are left
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
    box = transforms.random_box(
        tf.constant([0, 0], tf.int64), tf.constant(size), scale=(4.0, 5.0), ratio=(3 / 4, 4 / 3)
    )
    np.testing.assert_array_equal(box, expected)


def test_the_smallest_images_have_a_box():
    for size in ((1, 1), (1, 40), (2, 1)):
        box = transforms.random_box(
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
    encoded = encode(photograph(*size))
    result, geometry = transforms.eval_image(encoded, image_size=image_size, crop_pct=crop_pct)

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
    np.testing.assert_allclose(geometry, matrix, atol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resize_equals_pillow(method):
    image = photograph(150, 211)
    expected = PIL.Image.fromarray(image).resize((96, 64), getattr(PIL.Image, method.upper()))
    difference = np.abs(
        transforms.resize(image, (64, 96), method).numpy().astype(int) - np.asarray(expected, int)
    )
    assert difference.max() <= 1
    assert difference.mean() < 0.3


def test_random_interpolation_takes_both():
    image = photograph(40, 40)
    both = [transforms.resize(image, (64, 64), method).numpy() for method in ("bilinear", "bicubic")]
    drawn = [transforms.resize(image, (64, 64), "random", seed).numpy() for seed in seeds(12)]
    hits = [sum((d == b).all() for d in drawn) for b in both]
    assert sum(hits) == 12
    assert min(hits) >= 2


def test_the_whole_image_is_squashed():
    image, geometry = transforms.whole_image(png(tiny_images.position_image(9, 60, 90)), image_size=(30, 30))
    expected = np.rint(centers(30, 30)[:2] * 255).transpose(1, 2, 0)
    assert np.abs(image.numpy()[2:-2, 2:-2, :2] - expected[2:-2, 2:-2]).max() <= 1
    np.testing.assert_array_equal(geometry, np.eye(3)[:2])


def test_compose_applies_the_inner_matrix_first():
    outer, inner = transforms.flip_matrix(), tf.constant([[0.5, 0.0, 0.25], [0.0, 1.0, 0.0]])
    point = transforms.compose(outer, inner).numpy() @ [0.5, 0.5, 1]
    np.testing.assert_allclose(point, [1 - (0.5 * 0.5 + 0.25), 0.5])


def test_gray_palette_cmyk_and_animated_files_become_rgb():
    image = PIL.Image.fromarray(photograph(20, 30))
    for mode, kind in (
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("P", "GIF"),
    ):
        stream = io.BytesIO()
        image.convert(mode).save(stream, kind, **({"quality": 98} if kind == "JPEG" else {}))
        decoded = transforms.decode(tf.constant(stream.getvalue())).numpy()
        expected = np.asarray(image.convert(mode).convert("RGB"), np.float64)
        assert decoded.shape == (20, 30, 3)
        assert np.abs(decoded - expected).mean() < 4, (mode, kind)
        out, _ = transforms.train_image(tf.constant(stream.getvalue()), seeds(1)[0], image_size=(8, 8))
        assert out.shape == (8, 8, 3)
