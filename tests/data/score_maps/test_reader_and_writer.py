"""Score maps on disk: what is written is read back, and everything that does not fit is named."""

import dataclasses
import json
import os

import numpy as np
import pytest
import tensorflow as tf
import tiny_images

from tlvit.data.score_maps import reader as score_maps
from tlvit.data.score_maps.format import INFO_FILE
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.sources.tfds import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_images.prepare(path, [tiny_images.position_image(i, 6, 8) for i in range(20)])
    return open_source("tiny_images", "train", data_dir=str(path))


@pytest.fixture
def maps(source, tmp_path):
    return tiny_images.write_maps(tmp_path / "maps", source)


def make_writer(path, source, **changes):
    options = dict(annotator="net", annotator_hash="ab", top_k=2, grid=(2, 3), num_classes=5) | changes
    return ScoreMapWriter(str(path), source=source, **options)


def arrays(source, shard=0, top_k=2):
    n = source.shard_lengths[shard]
    values = np.random.RandomState(shard).standard_normal((n, top_k, 2, 3)).astype(np.float32)
    indices = np.random.RandomState(shard).randint(0, 5, values.shape)
    return [r["key"].decode() for r in source.read(shard).as_numpy_iterator()], values, indices


def test_maps_are_read_back(source, tmp_path):
    writer = make_writer(tmp_path / "m", source)
    written = {}
    for shard in range(len(source.shard_lengths)):
        keys, values, indices = arrays(source, shard)
        writer.write_shard(shard, keys, values, indices)
        written |= {k: (v, i) for k, v, i in zip(keys, values, indices, strict=True)}
    info = writer.finalize()
    reader = score_maps.open_score_maps(str(tmp_path / "m"))
    assert reader.info == info == score_maps.verify(str(tmp_path / "m"))
    assert (info.num_images, info.top_k, info.grid, info.num_classes) == (20, 2, (2, 3), 5)
    assert (info.annotator, info.annotator_hash, info.dataset) == ("net", "ab", "tiny_images/1.0.0:train")
    assert (info.geometry, info.num_missing) == ("full", 0)
    records = [r for s in range(len(reader.files)) for r in reader.read(s).as_numpy_iterator()]
    assert len(records) == 20
    for record in records:
        value, index = written[record["key"].decode()]
        np.testing.assert_array_equal(record["value"], value.astype(np.float16))
        np.testing.assert_array_equal(record["index"], index)
        assert (record["value"].dtype, record["index"].dtype) == (np.float16, np.uint16)
    assert not [name for name in os.listdir(tmp_path / "m") if "tmp" in name or "started" in name]


def test_many_classes_use_wider_indices(source, tmp_path):
    wide = dataclasses.replace(source, num_classes=70_000)
    writer = make_writer(tmp_path / "m", wide, num_classes=70_000)
    for shard in range(len(source.shard_lengths)):
        keys, values, indices = arrays(source, shard)
        writer.write_shard(shard, keys, values, indices + 69_990)
    writer.finalize()
    record = next(score_maps.open_score_maps(str(tmp_path / "m")).read(0).as_numpy_iterator())
    assert record["index"].dtype == np.int32
    assert record["index"].max() > 65_535


def test_an_interrupted_writer_is_continued(source, tmp_path):
    first = make_writer(tmp_path / "m", source)
    first.write_shard(1, *arrays(source, 1))
    before = os.stat(first.shard_path(1)).st_mtime_ns
    with open(first.shard_path(2) + ".tmp-1", "wb") as file:
        file.write(b"half a shard")
    with pytest.raises(ValueError, match="not finished: run the annotation again"):
        score_maps.open_score_maps(str(tmp_path / "m"))
    second = make_writer(tmp_path / "m", source)
    assert second.done_shards() == {1}
    with pytest.raises(ValueError, match=r"2 of 3 score-map shards are not written yet: \[0, 2\]"):
        second.finalize()
    for shard in (0, 2):
        second.write_shard(shard, *arrays(source, shard))
    second.finalize()
    assert os.stat(first.shard_path(1)).st_mtime_ns == before
    score_maps.verify(str(tmp_path / "m"))


def test_a_folder_of_other_maps_is_not_continued(source, tmp_path):
    make_writer(tmp_path / "m", source)
    with pytest.raises(ValueError, match="annotator_hash 'ab' instead of 'cd'"):
        make_writer(tmp_path / "m", source, annotator_hash="cd")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda k, v, i: (k[:-1], v, i), "needs 7 keys"),
        (lambda k, v, i: (k, v[:, :1], i[:, :1]), r"arrays of shape \(7, 2, 2, 3\)"),
        (lambda k, v, i: ([k[0]] * len(k), v, i), "only 1 different keys"),
        (lambda k, v, i: (k, v, i.astype(np.float16)), "class indices are float16"),
        (lambda k, v, i: (k, v, i + 3), "class indices from 3 to 7 do not fit 5 classes"),
        (lambda k, v, i: (k, v, i - 1), "class indices from -1 to 3 do not fit 5 classes"),
        (lambda k, v, i: (k, v * np.nan, i), "84 logits of shard 0 are not finite"),
        (
            lambda k, v, i: (k, np.where(v == v.max(), 1e6, v), i),
            "1 logits of shard 0 are not finite in float16",
        ),
    ],
)
def test_bad_shards_are_refused(source, tmp_path, change, match):
    writer = make_writer(tmp_path / "m", source)
    assert source.shard_lengths[0] == 7
    with pytest.raises(ValueError, match=match):
        writer.write_shard(0, *change(*arrays(source, 0)))
    assert writer.done_shards() == set()


def test_bad_writers_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="top_k = 6 is not between 1 and the number of classes, 5"):
        make_writer(tmp_path / "m", source, top_k=6)
    with pytest.raises(ValueError, match=r"has 7 classes, tiny_images/1.0.0:train has 5"):
        make_writer(tmp_path / "m", source, num_classes=7)
    with pytest.raises(
        ValueError, match=r"geometry 'middle' is unknown; a map is one of \('full', 'center'\)"
    ):
        make_writer(tmp_path / "m", source, geometry="middle")
    with pytest.raises(ValueError, match=r"in \(0, 1\], not 1.5"):
        make_writer(tmp_path / "m", source, geometry="center", center_share=1.5)


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


def test_maps_of_a_whole_split_serve_a_part_of_it(source, maps):
    data_dir = source.files[0].split("/tiny_images/")[0]
    part = open_source("tiny_images", "train[5:18]", data_dir=data_dir)
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
    score_maps.open_score_maps(maps.path)  # sizes are right: only reading can tell
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        score_maps.verify(maps.path)
    os.remove(file)
    with pytest.raises(ValueError, match=f"{file} is missing"):
        score_maps.open_score_maps(maps.path)


def test_verify_finds_a_shard_that_was_written_again(source, tmp_path):
    """Size, count and keys are right and every record is sound: only the checksum tells."""
    writer = make_writer(tmp_path / "m", source)
    for shard in range(len(source.shard_lengths)):
        writer.write_shard(shard, *arrays(source, shard))
    writer.finalize()
    keys, values, indices = arrays(source, 2)
    writer.write_shard(2, keys, -values, indices)
    with pytest.raises(ValueError, match=f"{writer.shard_path(2)} is damaged: SHA-256"):
        score_maps.verify(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("field", "bad", "match"), [("value", np.inf, "not finite"), ("index", 7, "class 7 of 5")]
)
def test_verify_finds_wrong_contents(source, tmp_path, monkeypatch, field, bad, match):
    """Maps of another program, whose checksum is right."""

    def unchecked(self, shard_index, keys, values, indices, missing):
        (values if field == "value" else indices)[3, 1, 0, 2] = bad
        return values.astype("<f2"), indices.astype("<u2")

    monkeypatch.setattr(ScoreMapWriter, "_checked", unchecked)
    writer = make_writer(tmp_path / "m", source)
    for shard in range(len(source.shard_lengths)):
        writer.write_shard(shard, *arrays(source, shard))
    writer.finalize()
    with pytest.raises(ValueError, match=match):
        score_maps.verify(str(tmp_path / "m"))


def test_other_folders_and_versions_are_refused(maps, tmp_path):
    with pytest.raises(ValueError, match="is no folder of score maps"):
        score_maps.open_score_maps(str(tmp_path))
    path = os.path.join(maps.path, INFO_FILE)
    with open(path) as f:
        content = json.load(f)
    with open(path, "w") as f:
        json.dump(content | {"format": 2}, f)
    with pytest.raises(ValueError, match="is not of format 1"):
        score_maps.open_score_maps(maps.path)


def test_the_map_of_a_label_is_its_class_everywhere(maps):
    value, index = (x.numpy() for x in score_maps.label_maps(np.int64(4), maps.info))
    assert value.shape == index.shape == (3, 6, 6)
    assert (value.dtype, index.dtype) == (np.float16, np.uint16)
    assert (index[:, 0, 0] == [4, 0, 1]).all()
    dense = np.zeros(5)
    dense[index[:, 2, 3]] = value[:, 2, 3]
    assert np.exp(dense[4]) / np.exp(dense).sum() > 1 - 1e-7


def test_folders_written_before_maps_could_be_centerd_are_read_and_continued(source, maps):
    path = os.path.join(maps.path, INFO_FILE)
    with open(path) as f:
        content = json.load(f)
    assert content.pop("center_share") == 1.0
    with open(path, "w") as f:
        json.dump(content, f)
    info = score_maps.open_score_maps(maps.path).info
    assert info == maps.info
    same = {k: getattr(info, k) for k in ("annotator", "annotator_hash", "top_k", "grid", "num_classes")}
    assert len(ScoreMapWriter(maps.path, source=source, **same).done_shards()) == 3


def test_the_matrix_of_centerd_maps(maps):
    """A 40 x 20 image whose map covers the middle 15 x 15: (0.3125, 0.125) is its corner."""
    image = tf.io.encode_jpeg(np.zeros((20, 40, 3), np.uint8))
    info = dataclasses.replace(maps.info, geometry="center", center_share=0.75)
    matrix = score_maps.map_matrix(image, info).numpy()
    np.testing.assert_allclose(matrix @ [0.3125, 0.125, 1], [0, 0], atol=1e-6)
    np.testing.assert_allclose(matrix @ [0.6875, 0.875, 1], [1, 1], atol=1e-6)
    png = tf.io.encode_png(np.zeros((20, 40, 3), np.uint8))
    np.testing.assert_array_equal(score_maps.map_matrix(png, info), matrix)
    np.testing.assert_array_equal(score_maps.map_matrix(image, maps.info), np.eye(3)[:2])


def test_verify_compares_the_keys_with_the_images(source, tmp_path):
    swap = lambda shard, keys: [keys[1], keys[0], *keys[2:]] if shard == 1 else keys
    tiny_images.write_maps(tmp_path / "m", source, change=swap)
    score_maps.verify(str(tmp_path / "m"))  # sound in itself
    with pytest.raises(
        ValueError, match=r"the image is img_\d+.png but its map in .* belongs to img_\d+.png"
    ):
        score_maps.verify(str(tmp_path / "m"), source)
    tiny_images.write_maps(tmp_path / "right", source)
    assert score_maps.verify(str(tmp_path / "right"), source).num_images == source.num_examples
