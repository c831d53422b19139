"""Tests of the score-map reader: checks against a source, verification, maps of labels, and geometry."""

import dataclasses
import json
import os

import numpy as np
import pytest
import tensorflow as tf
import tiny_images

from tlvit.data.score_maps import reader as score_maps
from tlvit.data.score_maps.verification import verify
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.sources.tfds import open_tfds


def test_maps_are_checked_against_their_source(source, maps):
    maps.check_against(source)
    other = dataclasses.replace(
        source,
        identity="cats/1.0.0:train",
        origin=dataclasses.replace(source.origin, identity="cats/1.0.0:train"),
    )
    with pytest.raises(ValueError, match=r"made for tiny_images/1.0.0:train, not for cats/1.0.0:train"):
        maps.check_against(other)
    with pytest.raises(ValueError, match=r"have 5 classes, tiny_images/1.0.0:train has 9"):
        maps.check_against(dataclasses.replace(source, num_classes=9))
    lengths = (*source.shard_lengths[:-1], source.shard_lengths[-1] + 1)
    more = dataclasses.replace(
        source, shard_lengths=lengths, origin=dataclasses.replace(source.origin, shard_lengths=lengths)
    )
    with pytest.raises(
        ValueError, match=r"20 records in 3 shards, .* has 21 in 3; the first shard that differs is 2"
    ):
        maps.check_against(more)


@pytest.mark.parametrize("change", [{"top_k": 2}, {"top_k": 4}, {"grid": [6, 5]}, {"num_classes": 70_000}])
def test_maps_of_another_size_than_described_are_an_error_at_the_start(maps, change):
    """In a description without a checksum, as version 0.1 wrote it."""
    path = os.path.join(maps.path, "score_maps.json")
    with open(path) as file:
        content = json.load(file)
    del content["checksum"]
    with open(path, "w") as file:
        json.dump(content | change, file)
    message = "The first map of .*-00000-of-00003.tfrecord has 216 bytes of logits and 216 of classes, but "
    with pytest.raises(ValueError, match=message):
        score_maps.open_score_maps(maps.path)


def test_maps_of_a_complete_split_serve_a_part_of_it(source, maps):
    data_dir = source.files[0].split("/tiny_images/")[0]
    part = open_tfds("tiny_images", "train[5:18]", data_dir=data_dir)
    records = maps.records_of(part)
    for shard in range(len(part.shard_lengths)):
        for offset in range(part.shard_lengths[shard]):
            images = [r["key"] for r in part.read(shard, offset).as_numpy_iterator()]
            found = [r["key"] for r in records(shard, offset).map(maps.parse).as_numpy_iterator()]
            assert len(images) == part.shard_lengths[shard] - offset
            assert found[: len(images)] == images


def test_damage_is_found(maps):
    file = maps.files[1]
    with open(file, "rb") as f:
        data = f.read()
    with open(file, "wb") as f:
        f.write(data[:-3])
    with pytest.raises(
        ValueError, match=f"{file} is damaged: it has {len(data) - 3} bytes instead of {len(data)}"
    ):
        score_maps.open_score_maps(maps.path)
    with open(file, "wb") as f:
        f.write(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    score_maps.open_score_maps(maps.path)  # the sizes are right, so only reading finds the damage
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        verify(maps.path)
    os.remove(file)
    with pytest.raises(ValueError, match=f"{file} is missing"):
        score_maps.open_score_maps(maps.path)


def test_verify_finds_a_shard_that_was_written_again(source, maps):
    """Size, number of records and keys are right and every record is valid. Only the checksum differs."""
    records = list(maps.read(2).as_numpy_iterator())
    keys = [record["key"].decode() for record in records]
    values, indices = (np.stack([record[name] for record in records]) for name in ("value", "index"))
    writer = ScoreMapWriter(maps.path, source, maps.info)
    writer.write_shard(2, keys, -values, indices)
    with pytest.raises(ValueError, match=f"{maps.files[2]} is damaged: SHA-256"):
        verify(maps.path)


@pytest.mark.parametrize(
    ("field", "bad", "match"),
    [
        ("value", np.inf, "has logits that are not finite"),
        ("index", 7, r"has a class that is not in \[0, 5\)"),
        ("index", [0, 3, 0], "has a class twice in a cell"),
    ],
)
def test_verify_finds_wrong_contents(source, tmp_path, monkeypatch, field, bad, match):
    """Maps of another program, whose checksum is right."""

    def unchecked(self, shard_index, keys, values, indices, missing):
        values, indices = values.astype("<f2"), indices.astype("<u2")
        array = values if field == "value" else indices
        array[3, 1 if np.ndim(bad) == 0 else slice(None), 0, 2] = bad
        return values, indices

    monkeypatch.setattr(ScoreMapWriter, "_checked", unchecked)
    tiny_images.write_maps(tmp_path / "m", source)
    with pytest.raises(ValueError, match=match):
        verify(str(tmp_path / "m"))


def test_a_folder_without_maps_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not a folder of score maps"):
        score_maps.open_score_maps(tmp_path)


def test_every_cell_of_a_label_map_has_the_label(maps):
    value, index = (x.numpy() for x in score_maps.label_maps(np.int64(4), maps.info))
    assert value.shape == index.shape == (3, 6, 6)
    assert (value.dtype, index.dtype) == (np.float16, np.uint16)
    assert (index[:, 0, 0] == [4, 0, 1]).all()
    dense = np.zeros(5)
    dense[index[:, 2, 3]] = value[:, 2, 3]
    assert np.exp(dense[4]) / np.exp(dense).sum() > 1 - 1e-7


def test_the_matrix_of_center_maps(maps):
    """A 40 x 20 image whose map covers the 15 x 15 in the center, which has a corner at (0.3125, 0.125)."""
    image = tf.io.encode_jpeg(np.zeros((20, 40, 3), np.uint8))
    info = dataclasses.replace(maps.info, geometry="center", center_fraction=0.75)
    matrix = score_maps.map_matrix(image, info).numpy()
    np.testing.assert_allclose(matrix @ [0.3125, 0.125, 1], [0, 0], atol=1e-6)
    np.testing.assert_allclose(matrix @ [0.6875, 0.875, 1], [1, 1], atol=1e-6)
    png = tf.io.encode_png(np.zeros((20, 40, 3), np.uint8))
    np.testing.assert_array_equal(score_maps.map_matrix(png, info), matrix)
    np.testing.assert_array_equal(score_maps.map_matrix(image, maps.info), np.eye(3)[:2])


def test_verify_compares_the_keys_with_the_images(source, tmp_path):
    swap = lambda shard, keys: [keys[1], keys[0], *keys[2:]] if shard == 1 else keys
    tiny_images.write_maps(tmp_path / "m", source, change=swap)
    verify(str(tmp_path / "m"))  # without the images, nothing is wrong
    with pytest.raises(
        ValueError, match=r"the image is img_\d+.png but its map in .* belongs to img_\d+.png"
    ):
        verify(str(tmp_path / "m"), source)
    tiny_images.write_maps(tmp_path / "right", source)
    assert verify(str(tmp_path / "right"), source).num_images == source.num_examples


def test_score_maps_in_a_bucket_of_amazon_are_refused():
    with pytest.raises(ValueError, match=r"s3://bucket/maps cannot be opened.*Mount the bucket"):
        score_maps.open_score_maps("s3://bucket/maps")
