"""Digit scenes: determinism, disjoint splits, the class digit's place, and the prepared data set."""

import subprocess
import sys

import numpy as np
import pytest

from tlvit.data.sources import digit_scenes as digits


def test_scene_depends_on_its_own_number_only():
    few, many = digits.make_scenes("train", 3), digits.make_scenes("train", 9)
    np.testing.assert_array_equal(few.image, many.image[:3])
    np.testing.assert_array_equal(few.label, many.label[:3])
    np.testing.assert_array_equal(few.box, many.box[:3])
    again = digits.make_scenes("train", 9)
    np.testing.assert_array_equal(many.image, again.image)
    assert (many.image != digits.make_scenes("train", 9, seed=1).image).any()
    assert (many.image != digits.make_scenes("test", 9).image).any()


def test_types_shapes_and_classes():
    scenes = digits.make_scenes("test", 400, size=32)
    assert scenes.image.shape == (400, 32, 32, 3)
    assert scenes.image.dtype == np.uint8
    assert scenes.label.dtype == np.int32
    assert scenes.box.dtype == np.float32
    counts = np.bincount(scenes.label, minlength=10)
    assert counts.min() >= 20, counts  # 40 expected


def test_digits_of_the_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    (train, train_labels), (test, test_labels) = map(digits.load_digit_images, digits.SPLITS)
    assert len(train) + len(test) == 1797
    rows = {d.tobytes() for d in train}
    assert not any(d.tobytes() in rows for d in test)
    everything = {d.tobytes() for d in load_digits().images / 16.0}
    assert rows | {d.tobytes() for d in test} == everything
    share = np.bincount(test_labels) / (np.bincount(train_labels) + np.bincount(test_labels))
    np.testing.assert_allclose(share, digits.TEST_SHARE, atol=0.005)


def test_scenes_draw_digits_of_their_own_split_only(monkeypatch):
    drawn = []
    render = digits.render_digit
    monkeypatch.setattr(
        digits, "render_digit", lambda rng, digit, height: drawn.append(digit) or render(rng, digit, height)
    )
    digits.make_scenes("train", 5)
    own = {d.tobytes() for d in digits.load_digit_images("train")[0]}
    assert len(drawn) >= 5 * 3
    assert all(d.tobytes() in own for d in drawn)


def test_the_other_digits_are_of_other_classes_and_smaller(monkeypatch):
    heights = []
    render = digits.render_digit
    monkeypatch.setattr(
        digits,
        "render_digit",
        lambda rng, digit, height: heights.append(height) or render(rng, digit, height),
    )
    digits.make_scenes("train", 1, digit_scale=(0.5, 0.5), distractors=(3, 3), distractor_scale=(0.25, 0.25))
    assert heights == [24, 12, 12, 12]
    labels = digits.load_digit_images("train")[1]
    for seed in range(50):
        chosen = digits.choose_digits(np.random.default_rng(seed), labels, 3)
        assert len({int(labels[i]) for i in chosen}) == 4


def test_box_holds_the_ink_of_the_class_digit():
    # No other digits and no texture: what differs from the background is the class digit.
    options = dict(distractors=(0, 0), texture=0.0, noise=0.0, size=64)
    scenes = digits.make_scenes("train", 20, **options)
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


def test_class_digit_stands_anywhere():
    box = digits.make_scenes("train", 200).box
    center = np.stack([box[:, 0] + box[:, 2], box[:, 1] + box[:, 3]], 1) / 2
    assert (center.min(0) < 0.33).all()
    assert (center.max(0) > 0.67).all()
    np.testing.assert_allclose(center.mean(0), 0.5, atol=0.05)


def test_digit_is_upright_and_of_its_class():
    # Nearest neighbor among the original digits, after cutting out and shrinking the drawn ink.
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
        (dict(size=8), "16 pixels, got 8"),
        (dict(digit_scale=(0.7, 0.5)), "digit_scale"),
        (dict(distractor_scale=(0.0, 0.5)), "distractor_scale"),
        (dict(distractors=(2, 10)), "distractors"),
        (dict(contrast=0.9), "contrast"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        digits.make_scenes(**{"split": "train", "count": 1, **options})


def test_prepared_data_set_holds_the_scenes(tmp_path):
    builder = digits.prepare(tmp_path, num_train=20, num_test=6, num_shards=4, size=32)
    assert builder.info.splits["train"].num_examples == 20
    assert builder.info.splits["train"].num_shards == 4
    assert builder.info.features["label"].num_classes == 10
    for split, count in (("train", 20), ("test", 6)):
        expected = digits.make_scenes(split, count, size=32)
        seen = {}
        for record in builder.as_dataset(split).as_numpy_iterator():
            seen[record["file_name"].decode()] = record
        assert sorted(seen) == [f"{split}_{i:06d}.png" for i in range(count)]
        for i, name in enumerate(sorted(seen)):
            np.testing.assert_array_equal(seen[name]["image"], expected.image[i])
            assert seen[name]["label"] == expected.label[i]
            np.testing.assert_allclose(seen[name]["box"], expected.box[i], atol=1e-6)


def test_prepare_reuses_equal_options_and_nothing_else(tmp_path, monkeypatch):
    first = digits.prepare(tmp_path, num_train=4, num_test=2, num_shards=2)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.tfrecord*")}
    second = digits.prepare(tmp_path, num_train=4, num_test=2, num_shards=2, size=48)  # 48 is the default
    assert second.data_path == first.data_path
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.tfrecord*")} == written
    folders = {first.data_path}
    for options in (
        dict(seed=1),
        dict(num_test=3),
        dict(distractors=(1, 2)),
        dict(num_shards=1),
        dict(contrast=0.3),
    ):
        folders.add(
            digits.prepare(tmp_path, **{"num_train": 4, "num_test": 2, "num_shards": 2, **options}).data_path
        )
    assert len(folders) == 6


def test_prepare_refuses_bad_options_before_writing(tmp_path):
    with pytest.raises(ValueError, match="digit_scale"):
        digits.prepare(tmp_path, digit_scale=(0.0, 0.5))
    with pytest.raises(ValueError, match="shard"):
        digits.prepare(tmp_path, num_shards=0)
    assert list(tmp_path.iterdir()) == []


def test_drawing_needs_no_tensorflow():
    # The file on its own: the package around it, `tlvit.data`, asks for TensorFlow when imported.
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
