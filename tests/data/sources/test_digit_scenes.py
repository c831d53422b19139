"""Tests of the digit scenes as a TFDS data set: contents, reuse, and the names of its configs."""

import numpy as np
import pytest

from tlvit.data.sources import digit_scenes as digits
from tlvit.data.sources.digit_drawing import SceneOptions, make_scenes


def test_the_prepared_data_set_has_the_scenes(tmp_path):
    builder = digits.prepare(tmp_path, num_train=20, num_test=6, num_shards=4, size=32)
    assert builder.info.splits["train"].num_examples == 20
    assert builder.info.splits["train"].num_shards == 4
    assert builder.info.features["label"].num_classes == 10
    for split, count in (("train", 20), ("test", 6)):
        expected = make_scenes(split, count, SceneOptions(size=32))
        seen = {}
        for record in builder.as_dataset(split).as_numpy_iterator():
            seen[record["file_name"].decode()] = record
        assert sorted(seen) == [f"{split}_{i:06d}.png" for i in range(count)]
        for i, name in enumerate(sorted(seen)):
            np.testing.assert_array_equal(seen[name]["image"], expected.image[i])
            assert seen[name]["label"] == expected.label[i]
            np.testing.assert_allclose(seen[name]["box"], expected.box[i], atol=1e-6)


def test_prepare_reuses_a_data_set_with_equal_options_only(tmp_path, monkeypatch):
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


def test_bad_options_raise_an_error_before_writing(tmp_path):
    with pytest.raises(ValueError, match="digit_scale"):
        digits.prepare(tmp_path, digit_scale=(0.0, 0.5))
    with pytest.raises(ValueError, match="shard"):
        digits.prepare(tmp_path, num_shards=0)
    assert list(tmp_path.iterdir()) == []


def test_config_names_are_those_of_version_0_1():
    """A data set that version 0.1 prepared is found and not written again."""
    name = digits.config_name(2000, 1500, 0, 8, SceneOptions())
    assert name == "s48_train2000_test1500_seed0_b67f5dc8"
    name = digits.config_name(2000, 1500, 3, 8, SceneOptions(size=32))
    assert name == "s32_train2000_test1500_seed3_c6ef5d61"


def test_digit_scenes_are_found_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"There are no digit scenes in .*digit_scenes\. Prepare them once"):
        digits.find_digit_scenes("digits", str(tmp_path))
    first = digits.prepare(tmp_path, num_train=4, num_test=2, num_shards=1)
    assert digits.find_digit_scenes("digits", str(tmp_path)) == str(first.data_path)
    second = digits.prepare(tmp_path, num_train=5, num_test=2, num_shards=1)
    with pytest.raises(ValueError, match="'digits' does not select one of the 2 sets in"):
        digits.find_digit_scenes("digits", str(tmp_path))
    name = f"digits/{second.builder_config.name}"
    assert digits.find_digit_scenes(name, str(tmp_path)) == str(second.data_path)
