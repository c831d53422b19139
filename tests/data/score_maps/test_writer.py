"""Tests of the score-map writer: what is written is read back, and errors name what does not match."""

import dataclasses
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tlvit.data.score_maps import reader as score_maps
from tlvit.data.score_maps.format import MapDescription
from tlvit.data.score_maps.verification import verify
from tlvit.data.score_maps.writer import ScoreMapWriter


def make_writer(path, source, **changes):
    fields = dict(annotator="net", annotator_hash="ab", top_k=2, grid=(2, 3), num_classes=5) | changes
    return ScoreMapWriter(path, source, MapDescription(**fields))


def arrays(source, shard=0, top_k=2):
    n = source.shard_lengths[shard]
    values = np.random.RandomState(shard).standard_normal((n, top_k, 2, 3)).astype(np.float32)
    indices = np.random.RandomState(shard).rand(n, 5, 2, 3).argsort(1)[:, :top_k]
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
    assert reader.info == info == verify(str(tmp_path / "m"))
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


def test_a_second_writer_continues_an_interrupted_one(source, tmp_path):
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
    verify(str(tmp_path / "m"))


def test_only_the_unfinished_shards_of_killed_processes_are_removed(source, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    path, host = tmp_path / "m", socket.gethostname()
    path.mkdir()
    shard = "maps-00002-of-00003.tfrecord"
    kept = [f"{shard}.tmp-{host}-{os.getpid()}", f"{shard}.tmp-elsewhere-{killed.pid}", f"{shard}.tmp-1"]
    for name in (*kept, f"{shard}.tmp-{host}-{killed.pid}"):
        (path / name).write_bytes(b"half a shard")
    make_writer(path, source)
    assert {p.name for p in path.iterdir()} == {*kept, "score_maps.started.json"}


def test_a_folder_with_other_maps_is_not_continued(source, tmp_path):
    make_writer(tmp_path / "m", source).write_shard(0, *arrays(source, 0))
    with pytest.raises(ValueError, match="annotator_hash 'ab' instead of 'cd'"):
        make_writer(tmp_path / "m", source, annotator_hash="cd")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda k, v, i: (k[:-1], v, i), "needs 7 keys"),
        (lambda k, v, i: (k, v[:, :1], i[:, :1]), r"arrays of shape \(7, 2, 2, 3\)"),
        (lambda k, v, i: ([k[0]] * len(k), v, i), "only 1 different keys"),
        (lambda k, v, i: (k, v, i.astype(np.float16)), "Class indices must be integers, not float16"),
        (lambda k, v, i: (k, v, i + 3), "Class indices must be from 0 to 4, not from 3 to 7"),
        (lambda k, v, i: (k, v, i - 1), "Class indices must be from 0 to 4, not from -1 to 3"),
        (lambda k, v, i: (k, v, i[:, [0, 0]]), "Shard 0 has cells with a class twice among their 2"),
        (lambda k, v, i: (k, v * np.nan, i), "84 logits of shard 0 are not finite"),
        (
            lambda k, v, i: (k, np.where(v == v.max(), 1e6, v), i),
            "1 logits of shard 0 are not finite in float16",
        ),
    ],
)
def test_bad_shards_raise_an_error(source, tmp_path, change, match):
    writer = make_writer(tmp_path / "m", source)
    assert source.shard_lengths[0] == 7
    with pytest.raises(ValueError, match=match):
        writer.write_shard(0, *change(*arrays(source, 0)))
    assert writer.done_shards() == set()


def test_an_annotator_with_another_number_of_classes_raises_an_error(source, tmp_path):
    with pytest.raises(ValueError, match=r"has 7 classes, tiny_images/1.0.0:train has 5"):
        make_writer(tmp_path / "m", source, num_classes=7)
    assert not (tmp_path / "m").exists()


def test_shards_without_a_description_are_not_continued(source, tmp_path):
    writer = make_writer(tmp_path / "m", source)
    writer.write_shard(0, *arrays(source, 0))
    (tmp_path / "m" / "score_maps.started.json").unlink()
    with pytest.raises(ValueError, match="has score-map shards but no description"):
        make_writer(tmp_path / "m", source)


def test_equal_maps_are_equal_bytes(source, tmp_path):
    """The order of the features of a record is that of their names. Without a fixed order it differs between
    processes."""
    make_writer(tmp_path, source).write_shard(0, *arrays(source))
    [shard] = tmp_path.glob("maps-*")
    content = shard.read_bytes()
    for _ in range(source.shard_lengths[0]):
        positions = [content.index(name) for name in (b"index", b"key", b"value")]
        assert positions == sorted(positions)
        content = content[positions[-1] + len("value") :]


def test_a_full_disk_keeps_the_finished_shards(source, tmp_path, monkeypatch):
    """The sentence names the file once, and nothing unfinished is left."""
    import tensorflow as tf

    class Full(tf.io.TFRecordWriter):
        def write(self, record):
            raise tf.errors.ResourceExhaustedError(None, None, f"{self.path}; No space left on device")

        def __init__(self, path):
            super().__init__(path)
            self.path = path

    writer = make_writer(tmp_path, source)
    writer.write_shard(0, *arrays(source, 0))
    with monkeypatch.context() as patch:
        patch.setattr(tf.io, "TFRecordWriter", Full)
        message = (
            r"maps-00001-of-\d+\.tfrecord cannot be written: No space left on device\. The 1 finished shards "
        )
        with pytest.raises(OSError, match=message + "are kept, and the same command continues"):
            writer.write_shard(1, *arrays(source, 1))
    assert sorted(p.name for p in tmp_path.iterdir())[1:] == ["score_maps.started.json"]
    writer.write_shard(1, *arrays(source, 1))
    assert writer.done_shards() == {0, 1}


def test_a_description_without_shards_is_replaced(source, tmp_path):
    """An annotation that failed at once does not reserve the folder."""
    make_writer(tmp_path, source)
    writer = make_writer(tmp_path, source, annotator_hash="cd")
    writer.write_shard(0, *arrays(source, 0))
    with pytest.raises(ValueError, match="annotator_hash 'cd' instead of 'ab'"):
        make_writer(tmp_path, source)
