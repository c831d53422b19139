"""Tests of annotation: the maps are the model's logits of the entire image, and a run can be interrupted."""

import dataclasses
import importlib
import inspect
import json
import logging
import pathlib
import re
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
from tlvit.training.annotation import annotate, near_chance
from tlvit.training.device_scorer import Annotator

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


class Colors:
    """Log-probabilities of 4 x 4 cells, all below 0: the mean color, and three classes far below."""

    num_classes, image_size, version = 6, (32, 32), "1"
    class_names = tuple("abcdef")

    def dense_logits(self, images):
        cells = images.reshape(len(images), 4, -1, 4, images.shape[2] // 4, 3).mean((2, 4))
        return np.concatenate([cells / 100 - 9, np.full((*cells.shape[:3], 3), -11.0)], -1)


@pytest.fixture
def colors_file(tmp_path):
    """Files of an annotator with its function, of a classes map, and the mapped classes."""
    lines = [f"import sys, numpy as np\n{inspect.getsource(Colors)}\n\ndef make():\n    return Colors()\n"]
    (tmp_path / "colors.py").write_text("".join(lines))
    (tmp_path / "map.csv").write_text("annotator,own\na,0\nb,1\n2,2\nd,3\ne,3\nf,4\n")
    return f"{tmp_path / 'colors.py'}:make", tmp_path / "map.csv", (0, 1, 2, 3, 3, 4)


def test_an_annotator_of_ones_own(source, tmp_path):
    """With other classes and shifted logits: a cell's targets have its own probabilities."""
    scoring = tlvit.Scoring(classes=(0, 1, 2, 3, 3, 4))
    info = tlvit.annotate(Colors(), source, tmp_path, scoring=scoring, top_k=2, batch_size=5)
    assert (info.annotator, info.grid) == ("Colors, 6 of 6 classes mapped to 5, shifted logits", (4, 4))
    value, index = read_maps(tmp_path)["img_4.png"]
    image = images_of(source)["img_4.png"]
    probability = np.exp(Colors().dense_logits(image[None])[0])
    probability = np.concatenate([probability[..., :3], 2 * probability[..., 3:4], probability[..., 5:]], -1)
    probability /= probability.sum(-1, keepdims=True)
    dense = np.zeros((4, 4, CLASSES))
    np.put_along_axis(dense, np.moveaxis(index, 0, -1).astype(int), np.moveaxis(value, 0, -1), -1)
    found = np.exp(dense) / np.exp(dense).sum(-1, keepdims=True)
    order = np.argsort(-probability, -1)[..., :2]
    kept = lambda x: np.take_along_axis(x, order, -1)
    np.testing.assert_allclose(kept(found), kept(probability), rtol=4e-3)
    with pytest.raises(ValueError, match=r"already has score maps with annotator_hash"):
        tlvit.annotate(Colors(), source, tmp_path, scoring=tlvit.Scoring(classes=(0, 1, 2, 3, 4, 4)), top_k=2)


def test_annotators_that_do_not_fit(source, tmp_path):
    with pytest.raises(
        ValueError, match=r"annotator has 6 classes, tiny_images/.* has 5\. A classes map says"
    ):
        annotate(Colors(), source, tmp_path / "maps")
    with pytest.raises(ValueError, match="no class of the annotator for 1 of the 5 classes"):
        annotate(Colors(), source, tmp_path / "maps", scoring=tlvit.Scoring(classes=(0, 1, 2, 3, 3, 3)))
    with pytest.raises(ValueError, match="annotator object has no dense_logits"):
        annotate(object(), source, tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_an_interrupted_annotation_says_what_is_kept(source, tmp_path):
    class Interrupted(Colors):
        batches = 0

        def dense_logits(self, images):
            Interrupted.batches += len(images) > 1
            if Interrupted.batches == 6:  # of two in each shard; the scores of two are on their way
                raise KeyboardInterrupt
            return super().dense_logits(images)

    scoring = tlvit.Scoring(classes=(0, 1, 2, 3, 3, 4))
    with pytest.raises(KeyboardInterrupt, match=r"has 1 of 3 shards, and the same command continues"):
        annotate(Interrupted(), source, tmp_path, scoring=scoring, batch_size=4)
    Interrupted.batches = 7
    assert annotate(Interrupted(), source, tmp_path, scoring=scoring, batch_size=4).num_images == 19


@pytest.mark.slow
def test_a_center_crop(annotator, source, tmp_path):
    """Of an image twice as wide as high, the square in its middle."""
    info = annotate(Colors(), source, tmp_path, batch_size=8, scoring=tlvit.Scoring(
        classes=(0, 1, 2, 3, 3, 4), geometry="center", logits="raw"), top_k=5)  # fmt: skip
    assert (info.geometry, info.center_fraction) == ("center", 1.0)
    value, index = read_maps(tmp_path)["img_3.png"]
    red = np.take_along_axis(value, np.argsort(index, 0).astype(int), 0)[0].astype(np.float64)
    cells = images_of(source)["img_3.png"][:, 16:48, 0].reshape(4, 8, 4, 8).mean((1, 3))
    np.testing.assert_allclose(red, cells / 100 - 9, atol=0.02)


@pytest.mark.slow
def test_crops_mirror_images_and_other_classes_of_a_model(annotator, source, tmp_path):
    """As calls of the model on each of the four views give them."""
    scoring = tlvit.Scoring(crop_grid=(1, 2), flip=True, classes=(0, 1, 2, -2, 3))
    data_source = dataclasses.replace(source, num_classes=4)
    info = annotate(annotator, data_source, tmp_path, scoring=scoring, top_k=4, batch_size=8)
    assert (info.grid, info.num_classes) == ((4, 7), 4)
    assert (
        info.annotator == "regnety_002, crops 1x2, flip, 4 of 5 classes mapped to 4, 1 shared, shifted logits"
    )
    image = resized(images_of(source)["img_3.png"], (32, 56))
    total, count = np.zeros((4, 7, 4)), np.zeros((1, 7, 1))
    for left, cell in ((0, 0), (24, 3)):
        for step in (1, -1):
            view = image[None, :, left : left + 32][:, :, ::step]
            logits = np.asarray(annotator.model.dense_logits(normalize(view, MEAN, STD)))[0][:, ::step]
            part = np.exp(logits)
            part = np.log(part[..., [0, 1, 2, 4]] + part[..., 3:4] / 4)
            total[:, cell : cell + 4] += part
            count[:, cell : cell + 4] += 1
    expected = total / count
    expected -= expected.mean(-1, keepdims=True)
    value, index = read_maps(tmp_path)["img_3.png"]
    found = np.take_along_axis(value, np.argsort(index, 0).astype(int), 0)
    np.testing.assert_allclose(found, np.moveaxis(expected, -1, 0), atol=0.03)


@pytest.mark.slow
def test_maps_with_70000_classes(source, tmp_path):
    class Many:
        num_classes, image_size = 70_000, (32, 32)

        def dense_logits(self, images):
            logits = np.zeros((len(images), 2, 2, 70_000), np.float32)
            logits[..., 69_999], logits[..., 3] = 9, 7
            return logits

    data_source = dataclasses.replace(source, num_classes=70_000)
    assert annotate(Many(), data_source, tmp_path, top_k=2, batch_size=4).num_classes == 70_000
    value, index = read_maps(tmp_path)["img_3.png"]
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index[:, 0, 0], [69_999, 3])
    np.testing.assert_allclose(value[:, 0, 0].astype(float), [9, 7], atol=1e-3)


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


def test_the_command_opens_a_python_file(colors_file, source, tmp_path, messages):
    spec, classes_map, _ = colors_file
    data_dir = pathlib.Path(source.files[0]).parents[2]
    command = ["--data=tiny_images", f"--data-dir={data_dir}", f"--out={tmp_path / 'maps'}", "--top-k=2"]
    assert main([f"--annotator={spec}", f"--classes-map={classes_map}", "--flip", *command]) == 0
    described = json.loads((tmp_path / "maps" / "score_maps.json").read_text())
    assert described["annotator"] == "Colors, flip, 6 of 6 classes mapped to 5, shifted logits"
    assert described["num_classes"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--annotator={}.py:make"], r"The file .*none\.py of --annotator does not exist"),
        (["--annotator={file}:mike"], r"colors\.py has no function mike\(\); it has Colors, make\."),
        (["--annotator={file}"], r"An annotator is timm:NAME, timm:NAME:WEIGHTS or FILE\.py:FUNCTION, not"),
        (["--annotator={file}:make", "--image-size=64"], "has its own image_size: leave out --image-size"),
        (["--annotator={file}:sys"], "has no function sys"),
    ],
)
def test_the_command_names_what_is_wrong_with_an_annotator(flags, message, colors_file, tmp_path, messages):
    file = colors_file[0].rpartition(":")[0]
    flags = [flag.format(tmp_path / "none", file=file) for flag in flags]
    assert main([*flags, "--data=digits", f"--out={tmp_path / 'maps'}"]) == 1
    assert re.search(message, messages.text)


def test_the_command_checks_the_grid_of_crops(capsys):
    for flag, message in (
        ("2", "must be ROWSxCOLUMNS, such as 2x3"),
        ("0x1", r"each from 1 to 64, not \(0, 1\)"),
    ):
        with pytest.raises(SystemExit):
            main(["--checkpoint=x", "--data=digits", "--out=y", f"--crop-grid={flag}"])
        assert re.search(message, capsys.readouterr().err)


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
