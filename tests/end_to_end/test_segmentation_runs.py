"""The commands on a small segmentation run: train, resume, evaluate, predict, convert."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_runs import call, check_equal_losses, check_equal_states, run

import tlvit

SMALL = [
    "--config.mesh.data=1", "--config.batch_size=8", "--config.optim.base_batch_size=8", "--config.steps=6",
    "--config.optim.warmup_steps=2", "--config.eval.every_steps=3", "--config.checkpoint.every_steps=3",
    "--config.eval.batch_size=20", "--config.log_every=1", "--config.segmentation.scale=(96,48)",
    "--config.model.options.depth=2", "--config.model.options.dim=32", "--config.model.options.num_heads=2",
    "--config.model.options.stem_width=8", "--config.model.options.channels=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(scene, tmp_path_factory):
    """The workdir of a run without interruption."""
    folder = tmp_path_factory.mktemp("run") / "segmentation"
    run("tlvit.main", *train_command(scene, folder))
    return folder


def train_command(scene, workdir):
    data = f"--config.data.dir={scene}/data"
    return ["--config=digits_segmentation", f"--workdir={workdir}", data, *SMALL]


@pytest.mark.slow
def test_a_run_that_lost_its_last_checkpoint_ends_with_the_same_state(scene, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    text = run("tlvit.main", *train_command(scene, tmp_path / "again"))
    assert "resumed at step 3" in text
    check_equal_states(tmp_path / "again", workdir)
    check_equal_losses(tmp_path / "again", workdir)


@pytest.mark.slow
def test_an_evaluation_agrees_with_training_and_takes_windows_from_the_flags(workdir, capfd):
    text = call(capfd, "tlvit.main", "--mode=eval", f"--workdir={workdir}")
    assert "images within 96x48, in windows of 24 at distances of 16" in text
    found = json.loads(text.splitlines()[-1])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "eval/raw_miou" in line]
    best = max(trained, key=lambda e: (max(e["eval/raw_miou"], e["eval/ema_miou"]), e["step"]))
    for kind in ("raw", "ema"):
        assert found[kind]["count"] == 40
        assert found[kind]["miou"] == pytest.approx(best[f"eval/{kind}_miou"])
    flags = ["window=0", "ratios=1.0,1.5", "flip=True"]
    flags = [f"--config.segmentation.{flag}" for flag in flags]
    text = call(capfd, "tlvit.main", "--mode=eval", f"--workdir={workdir}", *flags)
    assert "images within 96x48 times 1, 1.5, also mirrored, as a whole" in text
    assert json.loads(text.splitlines()[-1])["raw"]["count"] == 40


@pytest.mark.slow
def test_predictions_of_a_converted_file_are_those_of_the_run(workdir, tmp_path, capfd):
    image = np.random.RandomState(0).randint(0, 256, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    call(capfd, "tlvit.predict", f"--checkpoint={workdir}", f"--out={tmp_path}/maps", tmp_path / "photo.png")
    names = {"photo_classes.png", "photo_overlay.png", "legend.png"}
    assert {path.name for path in (tmp_path / "maps").iterdir()} == names
    classes = np.asarray(Image.open(tmp_path / "maps" / "photo_classes.png"))
    assert classes.shape == (50, 70)
    call(capfd, "tlvit.convert", f"--checkpoint={workdir}", f"--out={tmp_path}/x.safetensors")
    model, info = tlvit.load(tmp_path / "x.safetensors")
    assert (info.model, info.num_classes, info.preprocessing.window) == ("upernet", 11, 24)
    [found] = tlvit.segment(model, info, [tmp_path / "photo.png"])
    np.testing.assert_array_equal(found.classes, classes)
    assert re.match("background|digit|[0-9]", info.class_names[0])
