"""Tests of the drawing of digit scenes: determinism, disjoint splits, position and class of the digits."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from tlvit.data.sources import digit_drawing as digits
from tlvit.data.sources.digit_drawing import SceneOptions, make_scenes


def test_a_scene_depends_on_its_own_index_only():
    few, many = make_scenes("train", 3), make_scenes("train", 9)
    np.testing.assert_array_equal(few.image, many.image[:3])
    np.testing.assert_array_equal(few.label, many.label[:3])
    np.testing.assert_array_equal(few.box, many.box[:3])
    again = make_scenes("train", 9)
    np.testing.assert_array_equal(many.image, again.image)
    assert (many.image != make_scenes("train", 9, seed=1).image).any()
    assert (many.image != make_scenes("test", 9).image).any()


def test_types_shapes_and_classes():
    scenes = make_scenes("test", 400, SceneOptions(size=32))
    assert scenes.image.shape == (400, 32, 32, 3)
    assert scenes.image.dtype == np.uint8
    assert scenes.label.dtype == np.int32
    assert scenes.box.dtype == np.float32
    counts = np.bincount(scenes.label, minlength=10)
    assert counts.min() >= 20, counts  # 40 expected


def test_the_digits_of_the_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    (train, train_labels), (test, test_labels) = map(digits.load_digit_images, digits.SPLITS)
    assert len(train) + len(test) == 1797
    rows = {d.tobytes() for d in train}
    assert not any(d.tobytes() in rows for d in test)
    everything = {d.tobytes() for d in load_digits().images / 16.0}
    assert rows | {d.tobytes() for d in test} == everything
    fraction = np.bincount(test_labels) / (np.bincount(train_labels) + np.bincount(test_labels))
    np.testing.assert_allclose(fraction, digits.TEST_FRACTION, atol=0.005)


def test_scenes_use_digits_of_their_split_only(monkeypatch):
    drawn = []
    render = digits.render_digit
    monkeypatch.setattr(
        digits, "render_digit", lambda rng, digit, height: drawn.append(digit) or render(rng, digit, height)
    )
    make_scenes("train", 5)
    split = {d.tobytes() for d in digits.load_digit_images("train")[0]}
    assert len(drawn) >= 5 * 3
    assert all(d.tobytes() in split for d in drawn)


def test_the_other_digits_are_of_other_classes_and_smaller(monkeypatch):
    heights = []
    render = digits.render_digit
    monkeypatch.setattr(
        digits,
        "render_digit",
        lambda rng, digit, height: heights.append(height) or render(rng, digit, height),
    )
    options = SceneOptions(digit_scale=(0.5, 0.5), distractors=(3, 3), distractor_scale=(0.25, 0.25))
    make_scenes("train", 1, options)
    assert heights == [24, 12, 12, 12]
    labels = digits.load_digit_images("train")[1]
    for seed in range(50):
        chosen = digits.choose_digits(np.random.default_rng(seed), labels, 3)
        assert len({int(labels[i]) for i in chosen}) == 4


def test_the_box_encloses_the_ink_of_the_class_digit():
    # Without other digits and texture, only the class digit differs from the background.
    options = SceneOptions(distractors=(0, 0), texture=0.0, noise=0.0, size=64)
    scenes = make_scenes("train", 20, options)
    for image, box in zip(scenes.image.astype(int), scenes.box, strict=True):
        background = np.median(image.reshape(-1, 3), axis=0)
        difference = np.abs(image - background).mean(axis=-1)
        ink = difference > 0.5 * difference.max()
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        found = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / 64
        np.testing.assert_allclose(box, found, atol=1.01 / 64)
        assert 0.4 <= box[2] - box[0] <= 0.75  # its height is the digit's scale
        assert box.min() >= 0
        assert box.max() <= 1


def test_the_class_digit_can_be_anywhere():
    box = make_scenes("train", 200).box
    center = np.stack([box[:, 0] + box[:, 2], box[:, 1] + box[:, 3]], 1) / 2
    assert (center.min(0) < 0.33).all()
    assert (center.max(0) > 0.67).all()
    np.testing.assert_allclose(center.mean(0), 0.5, atol=0.05)


def test_a_drawn_digit_is_upright_and_of_its_class():
    # The nearest neighbor of the downsampled ink among the original digits has the same class.
    images, labels = digits.load_digit_images("train")
    right = 0
    for i in range(50):
        ink = digits.render_digit(np.random.default_rng(i), images[i], 32)
        small = ink.reshape(8, 4, 8, 4).mean(axis=(1, 3))
        distance = ((small[None] - images) ** 2).sum(axis=(1, 2))
        right += labels[distance.argmin()] == labels[i]
    assert right >= 45, right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(split="validation"), "split"),
        (dict(count=-1), "negative"),
        (dict(seed=-1), "negative"),
    ],
)
def test_bad_arguments_raise_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        make_scenes(**{"split": "train", "count": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=8), "16 pixels, got 8"),
        (dict(digit_scale=(0.7, 0.5)), "digit_scale"),
        (dict(distractor_scale=(0.0, 0.5)), "distractor_scale"),
        (dict(distractors=(2, 10)), "distractors"),
        (dict(contrast=0.9), r"contrast must be in \[0, 0.5\], got 0.9"),
    ],
)
def test_bad_scene_options_raise_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        SceneOptions(**options)


def test_the_pixels_are_those_of_version_0_1():
    """SHA-256 of images drawn by version 0.1."""
    digest = lambda scenes: hashlib.sha256(scenes.image.tobytes()).hexdigest()[:12]
    assert digest(make_scenes("train", 60)) == "54d1b8076813"
    assert digest(make_scenes("test", 40, SceneOptions(size=32), seed=3)) == "4149fbd30346"


def test_drawing_needs_no_tensorflow():
    # Imports the file alone, because importing the package `tlvit.data` imports TensorFlow.
    code = (
        "import sys, importlib.abc, importlib.util\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] == 'tensorflow': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"spec = importlib.util.spec_from_file_location('digits', {digits.__file__!r})\n"
        "module = sys.modules['digits'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.make_scenes('train', 2).image.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 48, 48, 3)"
