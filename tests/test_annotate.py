"""Tests of annotation: the maps are the model's logits of the entire image, and a run can be interrupted."""

import dataclasses
import importlib
import json
import logging
import pathlib
import sys

import numpy as np
import pytest
import tiny_images
from PIL import Image

import tlvit
from tlvit.annotate import main
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import save_model_folder
from tlvit.checkpoints.torch_files import export
from tlvit.ops.normalize import normalize
from tlvit.training.annotation import Annotator, annotate, near_chance

CLASSES, SIZE = 5, (32, 32)
OPTIONS = {"widths": (8, 16), "depths": (1, 1), "strides": (2, 2), "group_width": 8, "stem_width": 8}
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
PUBLISHED = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INFO = ModelInfo("regnety_002", CLASSES, SIZE, OPTIONS, preprocessing=Preprocessing(mean=MEAN, std=STD))


@pytest.fixture(scope="module")
def annotator():
    return Annotator(INFO.build(seed=2), INFO)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """19 images in 3 shards, half of them twice as wide as high. Their colors encode position and number."""
    from tlvit.data.sources.tfds import open_tfds

    folder = tmp_path_factory.mktemp("data")
    images = [tiny_images.position_image(10 * i, 32, 64 if i % 2 else 32) for i in range(19)]
    tiny_images.prepare(folder, images, num_classes=CLASSES, num_shards=3)
    return open_tfds("tiny_images", "train", data_dir=str(folder))


def read_maps(path):
    """Key -> (value [K, h, w], index [K, h, w])."""
    from tlvit.data.score_maps import reader as score_maps

    reader = score_maps.open_score_maps(str(path))
    records = [r for i in range(len(reader.files)) for r in reader.read(i).as_numpy_iterator()]
    return {r["key"].decode(): (r["value"], r["index"]) for r in records}


def images_of(source):
    """Key -> decoded image."""
    import tensorflow as tf

    records = [r for i in range(len(source.shard_lengths)) for r in source.read(i).as_numpy_iterator()]
    return {r["key"].decode(): tf.io.decode_png(r["image"]).numpy() for r in records}


def resized(image, size):
    """The entire image at another size, resized by Pillow."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def test_maps_are_the_models_best_logits_of_the_entire_image(annotator, source, tmp_path):
    """For every image, cell and rank they are the logits of the model, called directly, in float16.

    The last batch of each shard is padded, and the padding must not be written.
    """
    info = annotate(annotator, source, tmp_path, top_k=3, batch_size=8)
    assert (info.num_images, info.top_k, info.grid, info.num_classes) == (19, 3, (4, 4), CLASSES)
    assert (info.annotator, info.dataset, info.geometry) == ("regnety_002", source.identity, "full")
    maps = read_maps(tmp_path)
    images = images_of(source)
    assert maps.keys() == images.keys()
    assert len(maps) == 19
    for key, image in images.items():
        value, index = maps[key]
        exact = image.shape[:2] == SIZE
        small = image if exact else resized(image, SIZE)
        logits = np.asarray(annotator.model.dense_logits(normalize(small[None], MEAN, STD)))[0]
        order = np.argsort(-logits, axis=-1)[..., :3]
        best = np.moveaxis(np.take_along_axis(logits, order, -1), -1, 0)
        if exact:
            np.testing.assert_allclose(value, best, rtol=2**-10, atol=1e-5)
            np.testing.assert_array_equal(index, np.moveaxis(order, -1, 0))
        else:  # TensorFlow's and Pillow's bicubic resize differ by up to one gray level
            np.testing.assert_allclose(value, best, atol=0.02)
        assert (np.diff(value.astype(np.float32), axis=0) <= 0).all()


def test_an_image_is_resized_with_its_edges(source):
    """The left and right columns of the resized image have the colors of its left and right edges."""
    from tlvit.data import pipeline

    batch = next(iter(pipeline.annotation_batches(source, 0, batch_size=8, image_size=SIZE)))
    assert len(batch.keys) == int(batch.batch.mask.sum())
    for image, mask in zip(batch.batch.image, batch.batch.mask, strict=True):
        if mask:
            assert image[:, 0, 0].max() <= 6
            assert image[:, -1, 0].min() >= 249
            assert image[0, :, 1].max() <= 6


def test_top_k_is_at_most_the_number_of_classes(annotator, source, tmp_path):
    info = annotate(annotator, source, tmp_path, top_k=50, batch_size=8)
    assert info.top_k == CLASSES
    for _, index in read_maps(tmp_path).values():
        np.testing.assert_array_equal(np.sort(index, axis=0)[:, 0, 0], np.arange(CLASSES))


@pytest.mark.slow
def test_larger_images_give_finer_maps(annotator, source, tmp_path):
    large = dataclasses.replace(annotator, image_size=(64, 96))
    info = annotate(large, source, tmp_path, batch_size=8)
    assert info.grid == (8, 12)
    image = images_of(source)["img_4.png"]
    value, _ = read_maps(tmp_path)["img_4.png"]
    logits = np.asarray(annotator.model.dense_logits(normalize(resized(image, (64, 96))[None], MEAN, STD)))[0]
    np.testing.assert_allclose(value[0], logits.max(-1), atol=0.02)


def test_a_second_call_writes_missing_shards_only(annotator, source, tmp_path):
    """A deleted shard is written again, equal. The other shards and a finished folder are not changed."""
    annotate(annotator, source, tmp_path / "m", batch_size=8)
    files = sorted((tmp_path / "m").glob("maps-*"))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    # The state after an interruption: the description has its other name, and a shard is missing.
    (tmp_path / "m" / "score_maps.json").rename(tmp_path / "m" / "score_maps.started.json")
    files[1].unlink()
    annotate(annotator, source, tmp_path / "m", batch_size=16)
    for path, (content, time) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path != files[1])
    annotate(annotator, source, tmp_path / "m", batch_size=8)
    assert [p.stat().st_mtime_ns for p in files[::2]] == [before[p][1] for p in files[::2]]


def test_other_weights_do_not_continue_a_folder(annotator, source, tmp_path):
    annotate(annotator, source, tmp_path, batch_size=8)
    with pytest.raises(ValueError, match="already has score maps with annotator_hash"):
        annotate((INFO.build(seed=3), INFO), source, tmp_path, batch_size=8)
    with pytest.raises(ValueError, match="already has score maps with top_k 5 instead of 2"):
        annotate(annotator, source, tmp_path, top_k=2, batch_size=8)


@pytest.mark.slow
def test_a_model_without_a_token_head_classifies_its_tokens_as_its_class_token(source, tmp_path):
    """A distilled one with the mean of its two classifiers."""
    options = {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
    info = ModelInfo("deit_tiny_distilled_patch16_224", CLASSES, SIZE, options)
    model = info.build(seed=1)
    assert annotate((model, info), source, tmp_path, top_k=2, batch_size=8).grid == (4, 4)
    image = images_of(source)["img_4.png"]
    features = model.features(normalize(image[None], *PUBLISHED))
    logits = np.asarray((model.head(features) + model.head_dist(features)) / 2)[0]
    value, _ = read_maps(tmp_path)["img_4.png"]
    np.testing.assert_allclose(value, np.moveaxis(np.sort(logits)[..., :2:-1], -1, 0), rtol=2**-10, atol=1e-5)


def test_a_model_without_dense_logits_is_not_an_annotator():
    class Headless:
        has_dense_logits = False

    with pytest.raises(ValueError, match="regnety_002 has no dense logits"):
        Annotator(Headless(), INFO)


def test_batch_size_and_classes_are_checked(annotator, source, tmp_path):
    with pytest.raises(ValueError, match=r"batch of 12 images cannot be split over 8 devices"):
        annotate(annotator, source, tmp_path / "maps", batch_size=12)
    info = ModelInfo("regnety_002", 7, SIZE, OPTIONS)
    with pytest.raises(ValueError, match=r"annotator has 7 classes, tiny_images/.* has 5"):
        annotate((info.build(), info), source, tmp_path / "maps", batch_size=8)


def test_the_package_attribute_is_the_function_after_the_command_is_imported(monkeypatch):
    """tlvit/annotate.py is the command, `tlvit.annotate` the function, whichever is imported first."""
    assert tlvit.annotate is annotate
    for name in ("annotate", "predict"):
        monkeypatch.delitem(sys.modules, f"tlvit.{name}", raising=False)
        module = importlib.import_module(f"tlvit.{name}")
        assert module.main.__module__ == f"tlvit.{name}"
        assert getattr(tlvit, name) is not module
        assert callable(getattr(tlvit, name))
    from tlvit import annotate as imported

    assert imported is tlvit.annotate is annotate


# The command


@pytest.fixture
def messages(caplog, monkeypatch):
    """What the command logs."""
    monkeypatch.setattr(sys.modules["tlvit.annotate"], "start_logging", lambda: None)
    caplog.set_level(logging.INFO, logger="tlvit")
    return caplog


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
@pytest.mark.parametrize("weights", ["auto", pytest.param("raw", marks=pytest.mark.slow)])
def test_the_command_opens_a_model_folder_or_file(name, weights, annotator, source, tmp_path, messages):
    if name == "model":
        save_model_folder(tmp_path / name, annotator.model, INFO)
    else:
        export(annotator.model, tmp_path / name, info=INFO)
    data_dir = pathlib.Path(source.files[0]).parents[2]
    command = [
        f"--checkpoint={tmp_path / name}", f"--weights={weights}", "--data=tiny_images",
        f"--data-dir={data_dir}", f"--out={tmp_path / 'maps'}", "--top-k=2", "--batch-size=8",
        "--image-size=32x64", "--threads=1",
    ]  # fmt: skip
    assert main(command) == 0
    assert "maps of 4x8 cells with the top 2 of 5 classes; 0 of 3 shards are already written" in messages.text
    described = json.loads((tmp_path / "maps" / "score_maps.json").read_text())
    assert (described["grid"], described["top_k"], described["num_images"]) == ([4, 8], 2, 19)


def test_the_command_lists_missing_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint=x"])
    assert "required: --data, --out" in capsys.readouterr().err


def test_the_command_names_a_checkpoint_that_does_not_exist(tmp_path, messages):
    path = tmp_path / "none"
    assert main([f"--checkpoint={path}", "--data=digits", f"--out={tmp_path / 'maps'}"]) == 1
    assert str(path) in messages.text


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "tlvit annotate --checkpoint=" in capsys.readouterr().out


def test_an_annotator_near_chance():
    assert near_chance(18, 240, 10)
    assert not near_chance(120, 240, 10)
    assert near_chance(100, 200, 2)
    assert not near_chance(120, 200, 2)
    assert not near_chance(0, 4, 10)  # too few images to tell
