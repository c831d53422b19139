"""Tests of `open_source`: which kind of source a name means, and errors."""

import pytest
import tiny_images
from PIL import Image

from tlvit.data.sources import digit_scenes as digits
from tlvit.data.sources.open import open_source


def read_all(source):
    return [r for shard in range(len(source.shard_lengths)) for r in source.read(shard).as_numpy_iterator()]


def test_a_tfds_data_set_opens_by_its_name(tmp_path):
    tiny_images.prepare(tmp_path, [tiny_images.position_image(i, 4, 4) for i in range(6)])
    source = open_source("tiny_images", "train[:4]", data_dir=str(tmp_path))
    assert (source.identity, source.num_examples) == ("tiny_images/1.0.0:train[:4]", 4)
    with pytest.raises(ValueError, match="does not know a data set 'no_such_set'"):
        open_source("no_such_set", "train", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no digit scenes in"):
        open_source("digits", "train", data_dir=str(tmp_path))


def test_the_digit_scenes_open_by_their_short_name(tmp_path):
    digits.prepare(tmp_path, num_train=12, num_test=6, num_shards=2)
    source = open_source("digits", "test", data_dir=str(tmp_path))
    assert (source.num_examples, source.num_classes, source.key_kind) == (6, 10, "file_name")
    assert len({r["key"] for r in read_all(source)}) == 6
    digits.prepare(tmp_path, num_train=13, num_test=6, num_shards=2)
    with pytest.raises(ValueError, match="write 'digits/NAME' with one of"):
        open_source("digits", "test", data_dir=str(tmp_path))
    config = source.identity.split("/")[1]
    assert open_source(f"digits/{config}", "test", data_dir=str(tmp_path)).identity == source.identity


def test_a_relative_folder_is_class_folders_unless_tfds_prepared_it(tmp_path, monkeypatch, tmp_path_factory):
    root = tmp_path / "own"
    (root / "val/n10").mkdir(parents=True)
    Image.new("RGB", (12, 10)).save(root / "val/n10/img_7.jpeg")
    monkeypatch.chdir(root.parent)
    assert open_source(root.name, "val").num_examples == 1
    assert open_source(f"./{root.name}", "val").num_examples == 1
    data_dir = tmp_path_factory.mktemp("tfds")
    tiny_images.prepare(data_dir, [tiny_images.position_image(i, 4, 4) for i in range(6)])
    monkeypatch.chdir(data_dir)
    assert open_source("tiny_images", "train", data_dir=str(data_dir)).key_kind == "file_name"


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        (
            "gs://bucket/photos",
            None,
            "gs://bucket/photos cannot be opened: class folders are read from disks",
        ),
        ("cifar10", "s3://bucket/tfds", "s3://bucket/tfds cannot be opened.*not s3://"),
    ],
)
def test_data_in_buckets_that_are_not_read(name, data_dir, message):
    with pytest.raises(ValueError, match=message):
        open_source(name, "train", data_dir=data_dir)
