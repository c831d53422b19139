"""Tests of the check of an ImageNet download: a complete one passes, and every problem is named."""

import importlib.util
import sys

import pytest
import tiny_imagenet
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "prepare_imagenet.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_imagenet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def check(script, folder, **changes):
    numbers = dict(train_bytes=None, val_bytes=None, classes=3, train_images=12, val_images=5) | changes
    return script.check_download(str(folder), expected=script.Expected(**numbers))


def test_a_complete_download_passes(script, tmp_path):
    tiny_imagenet.write_archives(tmp_path)
    report = check(script, tmp_path)
    assert report.problems == ()
    assert "12 images of 3 classes" in report.facts[1]
    assert "5 images" in report.facts[3]


def test_the_published_numbers_are_the_default(script):
    expected = script.Expected()
    assert (expected.classes, expected.train_images, expected.val_images) == (1000, 1_281_167, 50_000)
    assert (expected.train_bytes, expected.val_bytes) == (147_897_477_120, 6_744_924_160)


def test_missing_files_are_named(script, tmp_path):
    report = check(script, tmp_path)
    assert [p.split(":")[0] for p in report.problems] == [
        f"{tmp_path}/ILSVRC2012_img_{kind}.tar is missing" for kind in ("train", "val")
    ]
    (tmp_path / "train").mkdir()
    assert "Class folders need no preparation" in check(script, tmp_path).problems[0]


def test_an_unfinished_download_is_found_by_its_size(script, tmp_path):
    tiny_imagenet.write_archives(tmp_path)
    size = (tmp_path / "ILSVRC2012_img_train.tar").stat().st_size
    (problem,) = check(script, tmp_path, train_bytes=2 * size).problems
    assert f"has {size:,} bytes instead of {2 * size:,}: 50.0 % of it is downloaded" in problem


@pytest.mark.parametrize(
    ("train", "match"),
    [
        ({"n01440764.tar": None}, ["has 8 images instead of 12", "has 2 classes instead of 3"]),
        ({"n01440764.tar": b""}, ["is damaged after 0 images"]),
        ({"readme.txt": b"x"}, ["has 'readme.txt', which is not a class archive"]),
        (
            {"n01440764.tar": tiny_imagenet.pack({"n01443537_0.JPEG": tiny_imagenet.jpeg(3)})},
            [
                "n01440764.tar has 'n01443537_0.JPEG', which is not the name of one of its images",
                "has no images",
            ],
        ),
        (
            {"n01440764.tar": tiny_imagenet.pack({f"n01440764_{i}.JPEG": b"<html>" for i in range(4)})},
            ["'n01440764_0.JPEG', which is not a JPEG file (it begins with b'<htm')"],
        ),
    ],
)
def test_wrong_training_archives_are_named(script, tmp_path, train, match):
    archives = {k: v for k, v in (tiny_imagenet.class_archives() | train).items() if v is not None}
    tiny_imagenet.write_archives(tmp_path, train=archives)
    problems = "\n".join(check(script, tmp_path).problems)
    assert all(part in problems for part in match), problems


def test_wrong_validation_archives_are_named(script, tmp_path):
    val = {"ILSVRC2012_val_00000001.JPEG": tiny_imagenet.jpeg(1), "val/x.JPEG": tiny_imagenet.jpeg(2)}
    tiny_imagenet.write_archives(tmp_path, val=val)
    problems = check(script, tmp_path).problems
    assert any("has 'val/x.JPEG', which is not the name of one of its images" in p for p in problems)
    assert any("has 1 images instead of 5" in p for p in problems)
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(path.read_bytes()[:700])
    assert any("val.tar is damaged" in p or "instead of 5" in p for p in check(script, tmp_path).problems)


def test_the_command_prints_the_next_command_or_fails(script, tmp_path, capsys, monkeypatch):
    tiny_imagenet.write_archives(tmp_path)
    assert script.main([str(tmp_path), f"--data-dir={tmp_path}/out", "--quick"]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    small = script.Expected(None, None, 3, 12, 5)
    monkeypatch.setattr(script, "Expected", lambda: small)
    monkeypatch.setattr(script, "check_space", lambda data_dir: None)
    assert script.main([str(tmp_path), f"--data-dir={tmp_path}/out"]) == 0
    wanted = f"tfds build imagenet2012 --manual_dir={tmp_path} --data_dir={tmp_path}/out"
    assert wanted in capsys.readouterr().out
    monkeypatch.setattr(script, "check_space", lambda data_dir: "too little space")
    assert script.main([str(tmp_path), f"--data-dir={tmp_path}/out"]) == 1


def test_too_little_space_is_reported(script, tmp_path):
    assert script.check_space(str(tmp_path / "not/yet/there"), needed=1) is None
    assert "preparing needs about 1000000 GB" in script.check_space(str(tmp_path), needed=10**15)
