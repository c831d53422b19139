"""The annotator's maps are what its model says of the whole image, and its command fails in clear words."""

import json
import logging
import pathlib

import numpy as np
import pytest

from tlvit import annotate as program
from tlvit.annotate import annotate
from tlvit.checkpoints.load import save_folder
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.torch_files import export
from tlvit.ops.normalize import normalize

CLASSES, SIZE = 5, (32, 32)
OPTIONS = {"widths": (8, 16), "depths": (1, 1), "strides": (2, 2), "group_width": 8, "stem_width": 8}
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
INFO = ModelInfo("regnety_002", CLASSES, SIZE, OPTIONS, preprocessing=Preprocessing(mean=MEAN, std=STD))


@pytest.fixture(scope="module")
def model():
    return INFO.build(seed=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """19 images in 3 shards, half of them twice as wide as high; position and number are in their colors."""
    import tiny_images

    from tlvit.data.sources import tfds as sources

    folder = tmp_path_factory.mktemp("data")
    images = [tiny_images.position_image(10 * i, 32, 64 if i % 2 else 32) for i in range(19)]
    tiny_images.prepare(folder, images, num_classes=CLASSES, num_shards=3)
    return sources.open_source("tiny_images", "train", data_dir=str(folder))


def read_maps(path):
    """Key -> (value [K, h, w], index [K, h, w])."""
    from tlvit.data.score_maps import reader as score_maps

    reader = score_maps.open_score_maps(str(path))
    records = [r for i in range(len(reader.files)) for r in reader.read(i).as_numpy_iterator()]
    return {r["key"].decode(): (r["value"], r["index"]) for r in records}


def images_of(source):
    """Key -> decoded image of the source."""
    import tensorflow as tf

    records = [r for i in range(len(source.shard_lengths)) for r in source.read(i).as_numpy_iterator()]
    return {r["key"].decode(): tf.io.decode_png(r["image"]).numpy() for r in records}


def squashed(image, size):
    """The whole image at another size, by Pillow."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def test_maps_are_the_models_best_logits_of_the_whole_image(model, source, tmp_path):
    """For every image, cell and rank, against the model run directly: float16 of the same logits. Batches of
    8 over 8 devices leave padded ones, which must not be written."""
    info = annotate(model, INFO, source, tmp_path, top_k=3, batch_size=8)
    assert (info.num_images, info.top_k, info.grid, info.num_classes) == (19, 3, (4, 4), CLASSES)
    assert (info.annotator, info.dataset, info.geometry) == ("regnety_002", source.identity, "full")
    maps = read_maps(tmp_path)
    images = images_of(source)
    assert maps.keys() == images.keys()
    assert len(maps) == 19
    for key, image in images.items():
        value, index = maps[key]
        exact = image.shape[:2] == SIZE
        small = image if exact else squashed(image, SIZE)
        logits = np.asarray(model.dense_logits(normalize(small[None], MEAN, STD)))[0]
        order = np.argsort(-logits, axis=-1)[..., :3]
        best = np.moveaxis(np.take_along_axis(logits, order, -1), -1, 0)
        if exact:
            np.testing.assert_allclose(value, best, rtol=2**-10, atol=1e-5)
            np.testing.assert_array_equal(index, np.moveaxis(order, -1, 0))
        else:  # two libraries' bicubic resize: the same picture, to a gray level
            np.testing.assert_allclose(value, best, atol=0.02)
        assert (np.diff(value.astype(np.float32), axis=0) <= 0).all()


def test_a_squashed_image_is_there_to_its_edges(source):
    """Position colors: the left and right cells of a wide image show its left and right ends."""
    from tlvit.data import pipeline

    batch = next(iter(pipeline.annotation_batches(source, 0, batch_size=8, image_size=SIZE)))
    assert len(batch.keys) == int(batch.batch.mask.sum())
    for image, mask in zip(batch.batch.image, batch.batch.mask, strict=True):
        if mask:
            assert image[:, 0, 0].max() <= 6
            assert image[:, -1, 0].min() >= 249
            assert image[0, :, 1].max() <= 6


def test_top_k_is_at_most_the_number_of_classes(model, source, tmp_path):
    info = annotate(model, INFO, source, tmp_path, top_k=50, batch_size=8)
    assert info.top_k == CLASSES
    for _, index in read_maps(tmp_path).values():
        np.testing.assert_array_equal(np.sort(index, axis=0)[:, 0, 0], np.arange(CLASSES))


def test_larger_images_give_finer_maps(model, source, tmp_path):
    info = annotate(model, INFO, source, tmp_path, batch_size=8, image_size=(64, 96))
    assert info.grid == (8, 12)
    image = images_of(source)["img_4.png"]
    value, _ = read_maps(tmp_path)["img_4.png"]
    logits = np.asarray(model.dense_logits(normalize(squashed(image, (64, 96))[None], MEAN, STD)))[0]
    np.testing.assert_allclose(value[0], logits.max(-1), atol=0.02)


def test_what_is_written_is_not_written_again(model, source, tmp_path):
    """A lost shard comes back, equal; the others are not touched; a finished folder is left alone."""
    annotate(model, INFO, source, tmp_path / "m", batch_size=8)
    files = sorted((tmp_path / "m").glob("maps-*"))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    # As an interrupted run leaves a folder: its description under the other name, a shard not there.
    (tmp_path / "m" / "score_maps.json").rename(tmp_path / "m" / "score_maps.started.json")
    files[1].unlink()
    annotate(model, INFO, source, tmp_path / "m", batch_size=16)
    for path, (content, time) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path != files[1])
    annotate(model, INFO, source, tmp_path / "m", batch_size=8)
    assert [p.stat().st_mtime_ns for p in files[::2]] == [before[p][1] for p in files[::2]]


def test_other_weights_do_not_continue_a_folder(model, source, tmp_path):
    annotate(model, INFO, source, tmp_path, batch_size=8)
    with pytest.raises(ValueError, match="already holds score maps with annotator_hash"):
        annotate(INFO.build(seed=3), INFO, source, tmp_path, batch_size=8)
    with pytest.raises(ValueError, match="already holds score maps with top_k 5 instead of 2"):
        annotate(model, INFO, source, tmp_path, top_k=2, batch_size=8)


@pytest.mark.parametrize("name", ["vit", "lvvit"])
def test_a_model_without_a_token_head_is_no_annotator(name, source, tmp_path):
    info = ModelInfo(name, CLASSES, SIZE, {"dim": 16, "depth": 1, "num_heads": 2})
    with pytest.raises(ValueError, match="token head"):
        annotate(info.build(), info, source, tmp_path / "maps", batch_size=8)
    assert not (tmp_path / "maps").exists()


def test_a_module_without_dense_logits_is_no_annotator(source, tmp_path):
    from flax import nnx

    with pytest.raises(ValueError, match="regnety_002 has no dense_logits"):
        annotate(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), INFO, source, tmp_path / "maps", batch_size=8)


def test_batch_and_classes_are_checked(model, source, tmp_path):
    with pytest.raises(ValueError, match=r"batch of 12 images cannot be split over 8 devices"):
        annotate(model, INFO, source, tmp_path / "maps", batch_size=12)
    info = ModelInfo("regnety_002", 7, SIZE, OPTIONS)
    with pytest.raises(ValueError, match=r"annotator has 7 classes, tiny_images/.* has 5"):
        annotate(info.build(), info, source, tmp_path / "maps", batch_size=8)


# The command


@pytest.fixture
def said(caplog, monkeypatch):
    """What the command logs."""
    monkeypatch.setattr(program, "start_logging", lambda: None)
    caplog.set_level(logging.INFO, logger="tlvit")
    return caplog


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_the_command_from_a_model_folder_or_file(name, raw, model, source, tmp_path, said):
    if name == "model":
        save_folder(tmp_path / name, model, INFO)
    else:
        export(model, tmp_path / name, info=INFO)
    data_dir = pathlib.Path(source.files[0]).parents[2]
    command = [
        *raw, f"--model={tmp_path / name}", "--data=tiny_images", f"--data-dir={data_dir}",
        f"--out={tmp_path / 'maps'}", "--top-k=2", "--batch-size=8", "--image-size=32x64", "--threads=1",
    ]  # fmt: skip
    assert program.main(command) == 0
    assert "maps of 2 x 4 x 8; 0 of 3 shards are there already" in said.text
    described = json.loads((tmp_path / "maps" / "score_maps.json").read_text())
    assert (described["grid"], described["top_k"], described["num_images"]) == ([4, 8], 2, 19)
    assert program.main([f"--check={tmp_path / 'maps'}"]) == 0
    assert "is whole: 19 images (0 without a map) in 3 shards, 2 x 4 x 8, by regnety_002" in said.text
    check = [f"--check={tmp_path / 'maps'}", "--data=tiny_images", f"--data-dir={data_dir}"]
    assert program.main(check) == 0
    assert program.main([*check, "--split=train[:50%]"]) == 0  # a part of what the maps are for
    assert program.main([*check, "--split=test"]) == 1
    assert "tiny_images has no split 'test'" in said.records[-1].getMessage()


@pytest.mark.parametrize("damage", ["cut", "flipped", "lost"])
def test_check_names_the_damaged_file(damage, model, source, tmp_path, said):
    annotate(model, INFO, source, tmp_path, batch_size=8)
    victim = sorted(tmp_path.glob("maps-*"))[1]
    content = bytearray(victim.read_bytes())
    if damage == "lost":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content[:-10] if damage == "cut" else content)
    assert program.main([f"--check={tmp_path}"]) == 1
    assert str(victim) in said.records[-1].getMessage()


def test_the_command_says_what_is_missing(tmp_path, said, capsys):
    with pytest.raises(SystemExit):
        program.main(["--model=x"])
    assert "--data, --out missing" in capsys.readouterr().err
    assert program.main([f"--check={tmp_path}"]) == 1
    assert "is no folder of score maps" in said.text
    assert program.main([f"--model={tmp_path / 'none'}", "--data=digits", f"--out={tmp_path / 'maps'}"]) == 1
    assert str(tmp_path / "none") in said.text
