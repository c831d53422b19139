"""Tests of TFDS data sets as sources: records, keys, parts of splits, ImageNet's builders, and errors."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
import tiny_imagenet
import tiny_images

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import Augment, Config, Data
from tlvit.data import pipeline
from tlvit.data.sources import tfds as sources
from tlvit.data.sources.tfds import open_tfds


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_images.prepare(path, [tiny_images.position_image(i, 6, 8) for i in range(20)])
    return str(path)


def read_all(source):
    return [r for shard in range(len(source.shard_lengths)) for r in source.read(shard).as_numpy_iterator()]


def test_a_source_has_encoded_images_labels_and_keys(data_dir):
    source = open_tfds("tiny_images", "train", data_dir=data_dir)
    assert (source.num_examples, source.num_classes, sum(source.shard_lengths)) == (20, 5, 20)
    assert (source.identity, source.key_kind) == ("tiny_images/1.0.0:train", "file_name")
    assert len(source.shard_lengths) == 3
    records = read_all(source)
    assert {r["key"].decode() for r in records} == {f"img_{i}.png" for i in range(20)}
    for record in records:
        number = int(record["key"].decode()[4:-4])
        image = tf.io.decode_png(record["image"]).numpy()
        np.testing.assert_array_equal(image, tiny_images.position_image(number, 6, 8))
        assert record["label"] == number % 5
        assert record["label"].dtype == np.int64


def test_reading_starts_at_an_offset(data_dir):
    source = open_tfds("tiny_images", "train", data_dir=data_dir)
    keys = [r["key"] for r in source.read(1).as_numpy_iterator()]
    assert [r["key"] for r in source.read(1, 2).as_numpy_iterator()] == keys[2:]


def test_a_part_of_a_split_is_a_source_and_knows_its_complete_split(data_dir):
    complete = open_tfds("tiny_images", "train", data_dir=data_dir)
    part = open_tfds("tiny_images", "train[5:18]", data_dir=data_dir)
    assert part.num_examples == 13
    assert [r["key"] for r in read_all(part)] == [r["key"] for r in read_all(complete)][5:18]
    assert (part.identity, part.origin.identity) == ("tiny_images/1.0.0:train[5:18]", complete.identity)
    assert part.origin.shard_lengths == complete.shard_lengths
    assert (complete.origin.shards, complete.origin.offsets) == ((0, 1, 2), (0, 0, 0))
    cut = open_tfds("tiny_images", "train[:3]", data_dir=data_dir)  # its file has images after the split
    assert list(cut.read(0, 3).as_numpy_iterator()) == list(cut.read(0, 4).as_numpy_iterator()) == []


def test_without_file_names_keys_are_tfds_ids(tmp_path):
    tiny_images.prepare(
        tmp_path, [tiny_images.position_image(i, 4, 4) for i in range(6)], named=False, num_shards=2
    )
    source = open_tfds("tiny_images", "train", data_dir=str(tmp_path))
    keys = [r["key"].decode() for r in read_all(source)]
    assert source.key_kind == "tfds_id"
    assert len(set(keys)) == 6
    assert keys[0] == "tiny_images-train.tfrecord-00000-of-00002__0"
    part = open_tfds("tiny_images", "train[1:]", data_dir=str(tmp_path))
    assert [r["key"].decode() for r in read_all(part)] == keys[1:]


def test_errors_name_what_cannot_be_opened(data_dir, tmp_path):
    with pytest.raises(ValueError, match="does not know a data set 'no_such_set'"):
        open_tfds("no_such_set", "train", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"has no split 'test', only \['train'\]"):
        open_tfds("tiny_images", "test", data_dir=data_dir)
    with pytest.raises(ValueError, match="Prepare it once: tfds build cifar10"):
        open_tfds("cifar10", "train", data_dir=str(tmp_path))


def test_the_error_without_tensorflow_says_what_to_install():
    code = "import sys; sys.modules['tensorflow'] = None; import tlvit.data"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'not installed: pip install "tlvit[tf]"' in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """imagenet2012, prepared by TFDS's own builder from two small archives."""
    pytest.importorskip("importlib_resources")
    path = tmp_path_factory.mktemp("imagenet")
    tiny_imagenet.prepare(path)
    return str(path)


def test_the_imagenet_builder_of_tfds(imagenet):
    source = open_tfds("imagenet2012", "train", data_dir=imagenet)
    assert (source.num_examples, source.num_classes, source.key_kind) == (12, 1000, "file_name")
    assert source.identity == "imagenet2012/5.1.0:train"
    assert source.class_names[:3] == tiny_imagenet.SYNSETS
    found = {}
    for record in read_all(source):
        image = tf.io.decode_jpeg(record["image"]).numpy()
        assert image.shape == (30, 40, 3)
        found[record["key"].decode()] = (int(record["label"]), round(image[:, :, 0].mean() / 10))
    assert found == {
        f"{s}_{i}.JPEG": (c, 6 * c + i) for c, s in enumerate(tiny_imagenet.SYNSETS) for i in range(4)
    }


def test_imagenet_from_archive_to_batches(imagenet):
    source = open_tfds("imagenet2012", "train", data_dir=imagenet)
    config = Config(batch_size=12, image_size=(16, 16), data=Data(threads=2), augment=Augment(randaugment=""))
    batch = next(pipeline.train_batches(source, None, config))
    np.testing.assert_array_equal(batch.label, (batch.image[:, :, :, 0].mean((1, 2)) + 10) // 60)
    validation = open_tfds("imagenet2012", "validation", data_dir=imagenet)
    info = ModelInfo("regnety_002", 1000, (16, 16))
    (batch,) = pipeline.eval_batches(validation, info, batch_size=8, threads=2)
    assert batch.mask.sum() == 5
    numbers = (batch.image[:5, :, :, 0].mean((1, 2)) / 40).round().astype(int)
    published = np.array([65, 970, 230, 809, 516])  # of validation images 1 to 5
    np.testing.assert_array_equal(batch.label[:5], published[numbers])
    assert sorted(numbers) == [0, 1, 2, 3, 4]


class LabelSets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The features of imagenet2012_real: an original label and any number of correct ones."""

    VERSION = tfds.core.Version("1.0.0")
    SETS = ((3,), (), (0, 2, 4), (1, 0))

    def _info(self):
        label = lambda: tfds.features.ClassLabel(num_classes=5)
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "original_label": label(),
            "real_label": tfds.features.Sequence(label()),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for i, labels in enumerate(self.SETS):
            image = tiny_images.position_image(i, 8, 8)
            yield i, {"image": image, "original_label": i, "real_label": list(labels), "file_name": f"v_{i}"}


@pytest.mark.parametrize("count", [1, 3])
def test_sets_of_labels_reach_the_batches(tmp_path, monkeypatch, count):
    builder = LabelSets(data_dir=str(tmp_path))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    source = open_tfds("label_sets", "validation", data_dir=str(tmp_path))
    assert (source.num_classes, source.max_labels) == (5, 32)
    info = ModelInfo("regnety_002", 5, (8, 8))
    seen = {}
    for p in range(count):
        options = dict(batch_size=6, process_index=p, process_count=count, threads=1)
        for batch in pipeline.eval_batches(source, info, **options):
            assert (batch.real_labels.shape, batch.real_labels.dtype) == ((6 // count, 32), np.int32)
            assert (batch.real_labels[~batch.mask] == -1).all()
            for label, labels in zip(batch.label[batch.mask], batch.real_labels[batch.mask], strict=True):
                seen[int(label)] = tuple(labels[labels >= 0])
    assert seen == dict(enumerate(LabelSets.SETS))
    monkeypatch.setattr(sources, "MAX_LABELS", 2)
    small = open_tfds("label_sets", "validation", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="image v_2 has 3 labels, more than 2"):
        list(pipeline.eval_batches(small, info, batch_size=4, threads=1))
