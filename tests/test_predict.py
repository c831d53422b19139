"""tlvit.predict: probabilities, crop, the command's output and corrupt images."""

import csv
import dataclasses
import json
import os
import sys

import image_kinds
import numpy as np
import pytest
from conftest import fill_model
from flax import nnx
from PIL import Image

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import save_model_folder
from tlvit.images import read_image
from tlvit.ops.normalize import normalize
from tlvit.predict import crop, list_images, main, predict

TINY = {"dim": 24, "depth": 2, "num_heads": 2, "stem_width": 8}
INFO = ModelInfo("lvvit_s", 6, (64, 64), TINY, class_names=("ant", "bee", "cat", "dog", "eel", "fox"))


@pytest.fixture(scope="module")
def model():
    built = INFO.build()
    fill_model(built)
    return built


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model folder."""
    path = tmp_path_factory.mktemp("model") / "m"
    save_model_folder(path, model, INFO)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """Five images of several formats, modes and shapes, and a corrupt one."""
    rng = np.random.RandomState(0)
    images = tmp_path / "photos"
    (images / "sub").mkdir(parents=True)
    for name, mode, size in (
        ("a.jpg", "RGB", (100, 80)),
        ("b.png", "RGBA", (64, 64)),
        ("c.png", "L", (33, 90)),
        ("sub/d.PNG", "P", (70, 70)),
        ("sub/e.webp", "RGB", (300, 65)),
    ):
        pixels = rng.randint(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(images / name)
    (images / "corrupt.jpg").write_bytes((images / "a.jpg").read_bytes()[:300])
    (images / "notes.txt").write_text("not an image")
    return images


def test_probabilities_are_those_of_the_model(model, photos):
    mean, std = (0.1, 0.5, 0.9), (0.1, 0.2, 0.4)
    info = dataclasses.replace(INFO, preprocessing=Preprocessing(mean=mean, std=std, crop_pct=0.9))
    results = list(predict(model, info, [photos / "a.jpg", photos / "b.png"], top=6))
    view = crop(
        Image.fromarray(read_image(photos / "a.jpg")),
        image_size=(64, 64),
        crop_pct=0.9,
    )
    logits = np.asarray(model(normalize(np.asarray(view)[None], mean, std)).logits[0], np.float64)
    wanted = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    found = {s.index: s.probability for s in results[0].top}
    np.testing.assert_allclose([found[i] for i in range(6)], wanted, atol=1e-5)
    assert [s.name for s in results[0].top] == [INFO.class_names[s.index] for s in results[0].top]
    assert sorted(found.values(), reverse=True) == [s.probability for s in results[0].top]


def test_batches_and_corrupt_images_change_nothing(model, photos):
    paths = [photos / n for n in ("a.jpg", "corrupt.jpg", "b.png", "c.png", "nothing.png", "sub/d.PNG")]
    together, alone = (
        list(predict(model, INFO, paths, batch_size=4)),
        list(predict(model, INFO, paths, batch_size=1)),
    )
    assert [r.path for r in together] == paths
    assert [r.error is None for r in together] == [True, False, True, True, False, True]
    for a, b in zip(together, alone, strict=True):
        assert [s.index for s in a.top] == [s.index for s in b.top]
        np.testing.assert_allclose([s.probability for s in a.top], [s.probability for s in b.top], atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "image_size", "crop_pct", "resized", "corner"),
    [
        # torchvision: Resize(floor(size / crop_pct)) puts the shorter side there, CenterCrop takes the middle
        ((500, 375), (224, 224), 0.9, (330, 248), (53, 12)),
        ((300, 500), (224, 224), 0.875, (256, 426), (16, 101)),
        ((64, 64), (64, 64), 1.0, (64, 64), (0, 0)),
        ((50, 100), (64, 32), 1.0, (32, 64), (0, 0)),
    ],
)
def test_crop_is_torchvisions(size, image_size, crop_pct, resized, corner, interpolation):
    rng = np.random.RandomState(1)
    image = Image.fromarray(rng.randint(0, 256, (size[1], size[0], 3), np.uint8))
    left, top = corner
    wanted = image.resize(resized, getattr(Image.Resampling, interpolation.upper()))
    wanted = wanted.crop((left, top, left + image_size[1], top + image_size[0]))
    found = crop(image, image_size=image_size, crop_pct=crop_pct, interpolation=interpolation)
    np.testing.assert_array_equal(found, wanted)


def test_normalization():
    image = Image.new("RGB", (2, 1), (255, 0, 51))
    found = normalize(np.asarray(image)[None], (0.5, 0.25, 0.2), (0.5, 0.5, 2.0))
    np.testing.assert_allclose(found[0], np.broadcast_to([1.0, -0.5, 0.0], (1, 2, 3)), atol=1e-7)
    assert found.dtype == np.float32


def test_folders_globs_and_files(photos):
    names = lambda *sources: [str(p.relative_to(photos)) for p in list_images(sources)]
    assert names(photos) == ["a.jpg", "b.png", "c.png", "corrupt.jpg", "sub/d.PNG", "sub/e.webp"]
    assert names(photos / "*.png", photos / "a.jpg") == ["b.png", "c.png", "a.jpg"]
    assert names(photos / "missing.jpg") == ["missing.jpg"]
    (photos / "[1].png").write_bytes((photos / "b.png").read_bytes())
    assert names(photos / "[1].png") == ["[1].png"]  # a file name that looks like a pattern
    for empty in (photos / "*.bmp", photos.parent / "photos" / "none"):
        empty.name == "none" and empty.mkdir()
        with pytest.raises(ValueError, match="No images in"):
            list_images([empty])


def test_command_prints_names_and_skips_corrupt_images(folder, photos, capsys):
    assert main([f"--checkpoint={folder}", str(photos), "--top=2"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        str(photos / n) for n in ("a.jpg", "b.png", "c.png", "sub/d.PNG", "sub/e.webp")
    ]
    assert len(lines) == 5 * 3
    assert lines[1].split()[-1] in INFO.class_names
    assert f"{photos / 'corrupt.jpg'}: skipped" in printed.err


def test_command_as_json(folder, photos, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("".join(f"class {i}\n" for i in range(6)))
    files = [str(photos / n) for n in ("a.jpg", "corrupt.jpg")]
    assert main([f"--checkpoint={folder}", *files, "--json", f"--classes={tmp_path / 'names.txt'}"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["image"] == files[0]
    assert len(first["top"]) == 5
    assert all(t["name"] == f"class {t['class']}" for t in first["top"])
    assert second["image"] == files[1]
    assert "error" in second


def test_exit_status_of_failures(folder, photos, tmp_path, capsys):
    assert main([f"--checkpoint={folder}", str(photos / "corrupt.jpg"), str(photos / "notes.txt")]) == 1
    assert main([f"--checkpoint={tmp_path}", str(photos)]) == 1
    assert "error:" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("only one\n")
    assert main([f"--checkpoint={folder}", str(photos / "a.jpg"), f"--classes={tmp_path / 'names.txt'}"]) == 1
    assert "1 class names for 6 classes" in capsys.readouterr().err


def test_tokens_are_drawn(folder, photos, tmp_path, capsys):
    assert main([f"--checkpoint={folder}", str(photos / "a.jpg"), f"--tokens={tmp_path / 'one.png'}"]) == 0
    assert Image.open(tmp_path / "one.png").size[0] > 2 * 64
    assert capsys.readouterr().err == f"tokens drawn in {tmp_path / 'one.png'}\n"
    assert main([f"--checkpoint={folder}", str(photos), f"--tokens={tmp_path / 'many' / 't.png'}"]) == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [
        "t_0001_a.png",
        "t_0002_b.png",
        "t_0003_c.png",
        "t_0005_d.png",
        "t_0006_e.png",
    ]
    assert f"tokens drawn in {tmp_path / 'many' / 't_0005_d.png'}\n" in capsys.readouterr().err


def test_token_probabilities(model, photos):
    result = next(predict(model, INFO, [photos / "a.jpg"], tokens=True))
    assert result.tokens.shape == (4, 4, 6)
    np.testing.assert_allclose(result.tokens.sum(-1), 1, atol=1e-5)


@pytest.mark.slow
def test_convolutional_models_predict_too(photos):
    options = {"widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "group_width": 8}
    info = ModelInfo("regnety_002", 4, (64, 96), options)
    result = next(predict(info.build(), info, [photos / "a.jpg"], tokens=True))
    assert [s.name for s in result.top] == [str(s.index) for s in result.top]
    assert result.tokens.shape == (2, 3, 4)


def test_evaluation_crops_the_same_pixels(photos):
    tf = pytest.importorskip("tensorflow")
    from tlvit.data.transforms.crop import eval_image

    ramp = np.linspace(0, 255, 120)[:, None, None] * np.ones((1, 90, 3))
    image = Image.fromarray((ramp * np.linspace(1, 0.3, 90)[None, :, None]).astype(np.uint8))
    image.save(photos / "ramp.png")
    found = np.asarray(crop(image, image_size=(64, 48), crop_pct=0.9), int)
    wanted = eval_image(tf.constant((photos / "ramp.png").read_bytes()), image_size=(64, 48), crop_pct=0.9)[0]
    assert np.abs(found - np.asarray(wanted, int)).max() <= 3
    assert np.abs(found - np.asarray(wanted, int)).mean() < 0.5


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (5000, 40)])
def test_only_the_crop_of_an_elongated_image_is_resized(size, monkeypatch):
    """30000 x 1 pixels resized to cover 224 x 224 are 7.4 million x 248."""
    made, resize = [], Image.Image.resize

    def spy(self, *arguments, **options):
        made.append(resize(self, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(Image.Image, "resize", spy)
    ramp = np.broadcast_to(np.linspace(0, 255, max(size))[None, :, None], (min(size), max(size), 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    image = image if size[0] > size[1] else image.transpose(Image.Transpose.TRANSPOSE)
    view = np.asarray(crop(image, image_size=(224, 224), crop_pct=0.9), int)
    assert max(result.width * result.height for result in made) <= 8 * 224 * 224
    assert view.shape == (224, 224, 3)
    assert np.abs(view - 127).max() <= 2  # the center of the ramp


def test_an_elongated_image_is_cropped_as_any_other(monkeypatch):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 300, 3), np.uint8))
    found = np.asarray(crop(image, image_size=(64, 64), crop_pct=0.9), int)
    monkeypatch.setattr(sys.modules["tlvit.predict"], "LONG", 1000)
    assert np.abs(found - np.asarray(crop(image, image_size=(64, 64), crop_pct=0.9), int)).max() <= 1


def test_the_exif_orientation_is_applied(model, tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (70, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(
        tmp_path / "turned.png", exif=image_kinds.exif(6)
    )
    scores = lambda **options: [
        [score.probability for score in prediction.top]
        for prediction in predict(model, INFO, [tmp_path / "plain.png", tmp_path / "turned.png"], **options)
    ]
    plain, turned = scores()
    np.testing.assert_allclose(plain, turned, rtol=1e-5)
    plain, turned = scores(exif=False)
    assert np.abs(np.subtract(plain, turned)).max() > 1e-3


def test_pipes_loops_and_names_that_are_not_utf_8(folder, photos, capsys):
    """Nothing hangs, and no name ends the prediction."""
    os.mkfifo(photos / "pipe.jpg")
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    name = os.fsdecode(os.fsencode(photos) + b"/\xff.jpg")
    (photos / "a.jpg").rename(name)
    assert len(list_images([photos])) == 6
    arguments = [name, str(photos / "pipe.jpg"), str(photos / "loop.jpg"), str(photos / "b.png")]
    assert main([f"--checkpoint={folder}", *arguments]) == 0
    printed = capsys.readouterr()
    assert f"{photos}/\\xff.jpg\n" in printed.out
    assert str(photos / "b.png") in printed.out
    assert "pipe.jpg: skipped, it is not a regular file" in printed.err
    assert "loop.jpg: skipped, Too many levels of symbolic links" in printed.err
    assert main([f"--checkpoint={folder}", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["image"] == f"{photos}/\\xff.jpg"


def test_batches_that_the_host_cannot_hold_are_refused(model, photos, monkeypatch):
    monkeypatch.setattr("tlvit.host_memory.host_memory", lambda: 10_000)
    with pytest.raises(
        ValueError, match=r"4 batches of 1 images of 64 x 64 pixels take 0.0 GiB, and this host"
    ):
        next(predict(model, INFO, [photos / "a.jpg"]))


def test_preprocessing_of_the_checkpoint_is_used(model, photos):
    """Mean, std, crop_pct and interpolation of the ModelInfo change the input, each as declared."""
    rule = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=0.8, interpolation="bilinear")
    info = dataclasses.replace(INFO, preprocessing=rule)
    found = next(predict(model, info, [photos / "a.jpg"], top=6))
    view = crop(
        Image.fromarray(read_image(photos / "a.jpg")),
        image_size=(64, 64),
        crop_pct=0.8,
        interpolation="bilinear",
    )
    logits = model(normalize(np.asarray(view)[None], rule.mean, rule.std)).logits[0]
    wanted = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose([s.probability for s in found.top], sorted(wanted)[::-1], atol=1e-5)


@pytest.mark.parametrize("options", [{"top": 0}, {"batch_size": 0}, {"top": 2.5}, {"batch_size": -3}])
def test_counts_below_one_are_refused(model, photos, options):
    """By the call, before the first image is read."""
    with pytest.raises(ValueError, match="must be at least 1"):
        predict(model, INFO, [photos / "a.jpg"], **options)


def test_segmentation_models_are_refused(photos):
    info = dataclasses.replace(INFO, model="upernet", options={"dim": 16, "depth": 1, "num_heads": 2})
    with pytest.raises(ValueError, match="predict classifies images; upernet is a segmentation model"):
        predict(nnx.eval_shape(info.build), info, [photos / "a.jpg"])


def test_an_output_that_is_nan_is_an_error_of_the_image(photos):
    model = INFO.build()
    model.head.bias[...] = model.head.bias[...].at[0].set(np.nan)
    result = next(predict(model, INFO, [photos / "a.jpg"], tokens=True))
    assert result.error == "the output of this lvvit_s is NaN or infinite"
    assert (result.top, result.tokens) == ((), None)


def test_many_images_become_a_table(folder, photos, tmp_path, capsys):
    """Every file has a row, a broken one with its error; the numbers are those of `predict`."""
    table = tmp_path / "out.csv"
    assert main([f"--checkpoint={folder}", str(photos), f"--out={table}", "--top=2", "--batch-size=4"]) == 0
    assert "6 images, 1 of them with an error, written to" in capsys.readouterr().out
    rows = list(csv.DictReader(table.open(newline="")))
    files = list_images([photos])
    assert [row["image"] for row in rows] == [str(path) for path in files]
    expected = list(predict(*load(folder), files, top=2))
    for row, result in zip(rows, expected, strict=True):
        assert bool(row["error"]) == (result.error is not None) == (row["class_1"] in ("", None))
        if result.error is None:
            assert [int(row["class_1"]), int(row["class_2"])] == [s.index for s in result.top]
            assert row["name_1"] == result.top[0].name
            assert float(row["probability_2"]) == pytest.approx(result.top[1].probability, abs=1e-6)
    records = tmp_path / "out.json"
    assert main([f"--checkpoint={folder}", str(photos), f"--out={records}", "--top=2"]) == 0
    found = json.loads(records.read_text())
    assert [record["image"] for record in found] == [str(path) for path in files]
    assert main([f"--checkpoint={folder}", str(photos), f"--out={tmp_path / 'out.txt'}"]) == 1
    assert "to a .csv or .json file" in capsys.readouterr().err


def test_views_are_averaged(model, tmp_path):
    """Flip and crops: the mean of the probabilities of ten images that were cut by hand."""
    image = Image.fromarray(np.random.RandomState(3).randint(0, 256, (90, 120, 3)).astype(np.uint8))
    image.save(tmp_path / "photo.png")
    info = dataclasses.replace(INFO, preprocessing=Preprocessing(crop_pct=0.8))
    (found,) = predict(model, info, [tmp_path / "photo.png"], top=6, tta=("flip", "crops"))
    resized = image.resize((106, 80), Image.Resampling.BICUBIC)
    views = []
    for top, left in ((8, 21), (0, 0), (0, 42), (16, 0), (16, 42)):
        view = np.asarray(resized.crop((left, top, left + 64, top + 64)))
        views += [view, view[:, ::-1]]
    logits = np.asarray(model(normalize(np.stack(views))).logits, np.float64)
    wanted = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(
        [s.probability for s in sorted(found.top, key=lambda s: s.index)], wanted, atol=1e-5
    )
    with pytest.raises(ValueError, match="flip and crops, not 'rotate'"):
        predict(model, INFO, [], tta=("rotate",))
    with pytest.raises(ValueError, match="Tokens belong to one view"):
        predict(model, INFO, [], tta=("flip",), tokens=True)


@pytest.mark.parametrize("flag", ["--tokens=tokens.png", "--json"])
def test_a_table_takes_no_flag_that_it_would_ignore(folder, photos, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    assert main([f"--checkpoint={folder}", str(photos / "a.jpg"), "--out=a.csv", flag]) == 1
    assert f"leave out {flag.split('=')[0]} or --out" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()
