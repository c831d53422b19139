"""Tests of class folders as a source: files, order, labels, keys, parts of splits, and errors."""

import itertools
import logging
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.class_names import write_class_names
from tlvit.config import Augment, Config, Data
from tlvit.data import pipeline
from tlvit.data.score_maps import reader as score_maps
from tlvit.data.score_maps.format import MapDescription
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.sources.folders import open_folder
from tlvit.data.sources.image_files import list_images, natural_key

FILES = (
    "train/n2/img_1.JPEG",
    "train/n2/img_2.jpg",
    "train/n10/img_3.png",
    "train/n10/img_10.bmp",
    "train/n10/deep/er/img_4.webp",
    "train/b.v1.5/img_5.gif",
    "train/b.v1.5/img_6.tar.JPG",
    "val/n10/img_7.jpeg",
)
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF"}


def write_image(path, number):
    """Writes an image of one gray level, which is 20 times its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = np.full((10, 12, 3), 20 * number, np.uint8)
    Image.fromarray(color).save(path, FORMATS[path.suffix.lower()])


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        write_image(tmp_path / name, int(name.split("img_")[1].split(".")[0]))
    return tmp_path


def read_all(source):
    return [r for shard in range(len(source.shard_lengths)) for r in source.read(shard).as_numpy_iterator()]


def test_images_labels_and_keys(root):
    source = open_folder(str(root), "train")
    assert source.class_names == ("b.v1.5", "n2", "n10")
    assert (source.num_examples, source.num_classes, source.key_kind) == (7, 3, "path")
    found = {r["key"].decode(): (int(r["label"]), r["image"]) for r in read_all(source)}
    labels = {key: label for key, (label, _) in found.items()}
    assert labels == {
        "n2/img_1": 1,
        "n2/img_2": 1,
        "n10/img_3": 2,
        "n10/img_10": 2,
        "n10/deep/er/img_4": 2,
        "b.v1.5/img_5": 0,
        "b.v1.5/img_6.tar": 0,
    }
    for key, (_, encoded) in found.items():
        pixels = tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy()
        assert abs(pixels.mean() - 20 * int(key.split("img_")[1].split(".")[0])) < 2, key


def test_files_are_listed_in_their_natural_order(root):
    assert list_images(str(root), "train").paths == (
        "b.v1.5/img_5.gif",
        "b.v1.5/img_6.tar.JPG",
        "n2/img_1.JPEG",
        "n2/img_2.jpg",
        "n10/deep/er/img_4.webp",
        "n10/img_3.png",
        "n10/img_10.bmp",
    )
    assert sorted(["a10", "a2", "B1", "a"], key=natural_key) == ["a", "a2", "a10", "B1"]


def test_the_labels_of_a_split_are_those_of_training(root):
    """val has one of the three classes, and n10 is still class 2."""
    source = open_folder(str(root), "val")
    assert (source.num_classes, [int(r["label"]) for r in read_all(source)]) == (3, [2])
    write_image(root / "val/other/img_8.jpg", 8)
    with pytest.raises(
        ValueError, match=r"1 classes that training does not have: other. The 3 classes are those of"
    ):
        open_folder(str(root), "val")


def test_a_class_list_gives_the_order(root):
    write_class_names(str(root / "classes.txt"), ("n10", "n2", "unseen", "b.v1.5"))
    source = open_folder(str(root), "train")
    assert source.class_names == ("n10", "n2", "unseen", "b.v1.5")
    assert {r["key"].split(b"/")[0].decode(): int(r["label"]) for r in read_all(source)} == {
        "n10": 0,
        "n2": 1,
        "b.v1.5": 3,
    }
    (root / "classes.txt").write_text("n10\nn2\n")
    with pytest.raises(
        ValueError, match=r"training does not have: b.v1.5. The 2 classes are those of .*classes.txt"
    ):
        open_folder(str(root), "train")


def test_files_that_are_not_images_are_skipped_and_logged(root, caplog):
    for name in ("n2/notes.txt", "n2/._img_1.JPEG", ".hidden/x.jpg", "stray.jpg", "n2/.git/y.jpg"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(b"no image")
    (root / "train/empty").mkdir()
    with caplog.at_level(logging.WARNING, "tlvit"):
        source = open_folder(str(root), "train")
    assert (source.num_examples, source.num_classes) == (7, 3)
    assert "skipped 2 files that are not images: 1 .jpg, 1 .txt" in caplog.text
    assert "1 class folders without an image: empty" in caplog.text


def test_files_that_differ_in_their_suffix_only_have_different_keys(root):
    write_image(root / "train/n2/img_1.png", 9)
    keys = {r["key"].decode() for r in read_all(open_folder(str(root), "train"))}
    assert {"n2/img_1.JPEG", "n2/img_1.png", "n2/img_2"} <= keys
    assert len(keys) == 8


def test_shards_are_equal_blocks_that_mix_the_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("tlvit.data.sources.folders.SHARD", 20)
    for i in range(90):
        (tmp_path / f"train/c{i // 30}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"train/c{i // 30}/{i}.jpg").write_bytes(b"%d" % i)
    source = open_folder(str(tmp_path), "train")
    assert source.shard_lengths == (18,) * 5
    shards = [[int(r["label"]) for r in source.read(s).as_numpy_iterator()] for s in range(5)]
    assert all(np.bincount(labels, minlength=3).min() >= 2 for labels in shards)
    keys = [r["key"] for r in read_all(source)]
    assert len(set(keys)) == 90
    assert [r["key"] for r in source.read(2, 5).as_numpy_iterator()] == keys[36 + 5 : 54]
    assert [r["key"] for r in read_all(open_folder(str(tmp_path), "train"))] == keys
    part = open_folder(str(tmp_path), "train[25:70]")
    assert [r["key"] for r in read_all(part)] == keys[25:70]
    assert (part.shard_lengths, part.origin.shards, part.origin.offsets) == (
        (11, 18, 16),
        (1, 2, 3),
        (7, 0, 0),
    )
    assert part.origin.identity == source.identity != part.identity
    rest = [
        r["key"]
        for name in ("train[:20%]", "train[20%:]")
        for r in read_all(open_folder(str(tmp_path), name))
    ]
    assert rest == keys
    assert open_folder(str(tmp_path), "train[-9:]").num_examples == 9


def test_the_identity_depends_on_the_files_and_not_on_their_folder(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("moved") / "data"
    before = open_folder(str(root), "train").identity
    os.rename(root / "train", root / "x")
    elsewhere.mkdir()
    os.rename(root / "x", elsewhere / "train")
    assert open_folder(str(elsewhere), "train").identity == before
    write_image(elsewhere / "train/n2/img_11.jpg", 11)
    assert open_folder(str(elsewhere), "train").identity != before


def test_batches_and_maps_of_class_folders(root, tmp_path_factory):
    source = open_folder(str(root), "train")
    out = tmp_path_factory.mktemp("maps")
    description = MapDescription(annotator="t", annotator_hash="0", top_k=1, grid=(2, 2), num_classes=3)
    writer = ScoreMapWriter(out, source, description)
    keys = [r["key"].decode() for r in read_all(source)]
    numbers = [int(key.split("img_")[1].split(".")[0]) for key in keys]
    values = np.broadcast_to(np.reshape(numbers, (7, 1, 1, 1)), (7, 1, 2, 2)).astype(np.float32)
    writer.write_shard(0, keys, values, np.zeros(values.shape, int))
    writer.finalize()
    maps = score_maps.open_score_maps(str(out))
    config = Config(
        batch_size=7, image_size=(8, 8), seed=1, data=Data(threads=2), augment=Augment(randaugment="")
    )
    for batch in itertools.islice(pipeline.train_batches(source, maps, config), 2):
        red = batch.image[:, :, :, 0].mean((1, 2)) / 20
        np.testing.assert_allclose(red, batch.maps.value[:, 0, 0, 0], atol=0.15)
        assert sorted(batch.maps.value[:, 0, 0, 0]) == [1, 2, 3, 4, 5, 6, 10]
    info = ModelInfo("regnety_002", 3, (8, 8))
    (evaluated,) = pipeline.eval_batches(source, info, batch_size=8, threads=2)
    assert evaluated.mask.tolist() == [True] * 7 + [False]


def test_errors_name_what_cannot_be_opened(root, tmp_path_factory):
    with pytest.raises(ValueError, match=r"has no folder 'test'; it has \['train', 'val'\]"):
        open_folder(str(root), "test")
    with pytest.raises(ValueError, match="There is no folder /no/where"):
        open_folder("/no/where", "train")
    with pytest.raises(ValueError, match="is empty: train has 7 images"):
        open_folder(str(root), "train[5:5]")
    with pytest.raises(ValueError, match="is not a split of class folders"):
        open_folder(str(root), "train[5]")
    bare = tmp_path_factory.mktemp("bare")
    (bare / "train/c").mkdir(parents=True)
    (bare / "train/c/a.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"no images in class folders .* but 1 other files and 1 folders without"
    ):
        open_folder(str(bare), "train")
