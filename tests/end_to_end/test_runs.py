"""The commands on a tiny digits set: train, kill, resume, annotate, evaluate, convert.

Runs that are compared bit for bit, or killed, are processes of their own with one device. Where only messages
and files are checked, the command runs inside the test process, which has eight devices.
"""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import ROOT
from tiny_runs import (
    annotate_command,
    call,
    last_state,
    student_command,
)

import tlvit


@pytest.fixture(scope="module")
def student(scene):
    """The workdir of the student."""
    return scene / "student"


def records(maps):
    """All score maps of a folder in order."""
    from tlvit.data.score_maps import reader as score_maps

    reader = score_maps.open_score_maps(str(maps))
    return [record for i in range(4) for record in reader.read(i).as_numpy_iterator()]


def test_the_summary_describes_the_run(scene):
    text = (scene / "student.txt").read_text()
    for part in (
        r"devices +1 x cpu",
        r"model +lvvit_s, 0\.\d+ M parameters",
        r"train images +64 of 10 classes",
        r"eval images +40",
        r"token labels +ON: 64 maps of 12x12 cells, top 5, for 64 images, by regnety_002, crop aligned",
        r"schedule +4 \+ 0 epochs = 16 steps",
        r"step 16/16 .*images/s .*waiting for data \d+% +ETA",
        r"evaluation on 40 images: raw top-1 .*ema top-1",
    ):
        assert re.search(part, text), part


def test_workdir_has_config_metrics_events_checkpoints_and_picture(student):
    workdir = student
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [line["step"] for line in lines if "eval/raw_top1" in line] == [8, 16]
    assert lines[-1]["eval/images"] == 40
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 4
    assert (workdir / "classes.txt").read_text().split() == list("0123456789")
    assert list(workdir.glob("events.out.tfevents*"))
    assert {p.name for p in (workdir / "checkpoints").iterdir()} >= {"8", "12", "16"}
    assert (workdir / "report.png").stat().st_size > 20_000


@pytest.mark.slow
def test_finished_run_is_only_evaluated(scene, student, tmp_path, capfd):
    shutil.copytree(student, tmp_path / "w")
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path / "w"))
    assert "this run is complete: 16 of 16 steps" in text
    assert "evaluation on 40 images" in text


@pytest.mark.slow
def test_checkpoint_of_one_device_is_resumed_on_four(scene, student, tmp_path, capfd):
    shutil.copytree(student, tmp_path / "w")
    longer = student_command(scene, tmp_path / "w", "--config.epochs=5", "--config.mesh.data=4")
    text = call(capfd, "tlvit.main", *longer)
    assert "devices       4 x cpu" in text
    assert "resumed at step 16" in text
    assert last_state(tmp_path / "w")[0] == 20


def test_evaluation_mode_agrees_with_training_and_counts_every_image(scene, student, capfd):
    evaluate = [f"--workdir={student}", "--config=digits", f"--config.data.dir={scene}/data", "--mode=eval"]
    results = []
    for batch_size, devices in ((16, 1), (24, 8)):
        size = (f"--config.eval.batch_size={batch_size}", f"--config.mesh.data={devices}")
        text = call(capfd, "tlvit.main", *evaluate, *size)
        results.append(json.loads(text.splitlines()[-1]))
    trained = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in trained if "eval/raw_top1" in line]
    # The later of two equal checkpoints is the best.
    best = max(evaluations, key=lambda e: (max(e["eval/raw_top1"], e["eval/ema_top1"]), e["step"]))
    for result in results:
        assert result["raw"]["count"] == result["ema"]["count"] == 40
        assert result["raw"]["top1"] == pytest.approx(best["eval/raw_top1"])
        assert result["ema"]["top1"] == pytest.approx(best["eval/ema_top1"])


@pytest.mark.slow
def test_interrupted_annotation_resumes(scene, tmp_path, capfd):
    shutil.copytree(scene / "data", tmp_path / "data")
    [victim] = (tmp_path / "data").rglob("*train.tfrecord-00002-of-00004")
    out = tmp_path / "maps"
    arguments = annotate_command(tmp_path / "data", scene / "annotator", out)
    victim.rename(tmp_path / "away")
    text = call(capfd, "tlvit.annotate", *arguments, status=1)
    assert victim.name in text
    assert "Traceback" not in text
    assert len(list(out.glob("maps-*"))) == 2
    (tmp_path / "away").rename(victim)
    text = call(capfd, "tlvit.annotate", *arguments)
    assert "2 of 4 shards" in text
    for resumed, uninterrupted in zip(records(out), records(scene / "maps"), strict=True):
        assert resumed["key"] == uninterrupted["key"]
        np.testing.assert_array_equal(resumed["index"], uninterrupted["index"])
        np.testing.assert_array_equal(resumed["value"], uninterrupted["value"])
    check = [out, "--data=digits", f"--data-dir={tmp_path / 'data'}"]
    assert "verified 64 score maps" in call(capfd, "tlvit.maps", *check)


def test_the_student_is_exported_and_opened_again(student, tmp_path, capfd):
    path = tmp_path / "student.safetensors"
    call(capfd, "tlvit.convert", f"--checkpoint={student}", "--to=pytorch", f"--out={path}")

    one, info = tlvit.load(student)
    other, again = tlvit.load(path)
    assert info.model == again.model == "lvvit_s"
    images = np.random.RandomState(0).standard_normal((2, 48, 48, 3)).astype(np.float32)
    np.testing.assert_array_equal(one(images).logits, other(images).logits)


@pytest.mark.slow
def test_fine_tuning_starts_from_other_weights_at_another_size(scene, student, tmp_path, capfd):
    options = (f"--config.model.init_from={student}", "--config.image_size=64", "--config.epochs=1")
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path, *options))
    assert re.search(r"resized +1  pos_embed", text), text
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(first["train/loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--config.data.score_maps="],
            r"config.token_labels is on, but config.data.score_maps is empty.*tlvit.annotate",
        ),
        (["--config.image_size=50"], r"50x50 is not a multiple of the patch size 8"),
        (["--config.model.name=lvvit_x"], r"Unknown model 'lvvit_x'; did you mean"),
        (["--config.augment.mixup=0.8"], r"config.token_labels excludes mixup"),
        (["--config.model.dtype=float16"], r"config.model.dtype must be float32 or bfloat16, not 'float16'"),
        (
            ["--config.loss.cls_target=no"],
            r"config.loss.cls_target must be annotator or published or documented or label, not .no.",
        ),
        (["--config.data.label_crop=left"], r"data.label_crop must be aligned or published, not 'left'"),
        (["--config.data.name=no_such_data"], r"no_such_data"),
        (["--config.batch_size=65", "--config.mesh.data=1"], r"64 training images .*65"),
    ],
)
def test_bad_settings_are_one_clear_sentence(change, message, scene, tmp_path, capfd):
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path, *change), status=1)
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--config.optim.learnign_rate=1"], "learning_rate"),
        (["--config.epochs=many"], "many"),
        (["--config.data.nmae=x"], "config.data.nmae is not a setting; did you mean config.data.name?"),
        (["--config=configs/digits.py:x"], "x is not a variant of digits; choose one of token_labels"),
        (["--config=digitz"], "'digitz' is not a shipped recipe or a .py file; recipes: deit, deit3, digits"),
        (["--config=configs/nothing.py"], "The recipe file configs/nothing.py does not exist; shipped"),
        (["--config.model.options.depht=2"], "lvvit_s has no option 'depht'; did you mean depth?"),
        (["--confg=x"], "config"),
    ],
)
def test_unknown_settings_and_wrong_types_are_refused(change, message, scene, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path, *change), status=1)
    assert message in text
    assert "Traceback" not in text


def test_a_signal_during_the_start_is_status_75_and_a_sentence(scene, student, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("tlvit.training.run_data.open_data", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path), status=75)
    assert "stopped by SIGTERM. There is no checkpoint yet: the same command starts again." in text
    shutil.copytree(student, tmp_path / "w")
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path / "w"), status=75)
    assert (
        "stopped by SIGTERM. The checkpoint of step 16 is complete: the same command resumes from it." in text
    )
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda w: w.write_text("x"), "w is a file, not a folder"),
        (lambda w: (w / "metrics.jsonl").mkdir(parents=True), "metrics.jsonl is a folder, but a run writes"),
        (lambda w: w.symlink_to("/proc/none/w"), "w is not a folder"),
    ],
)
def test_a_workdir_that_cannot_be_written_is_one_sentence(prepare, message, scene, tmp_path, capfd):
    prepare(tmp_path / "w")
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path / "w"), status=1)
    assert message in text
    assert "Traceback" not in text


def test_the_heartbeat_timeout_of_several_processes_is_a_setting(scene, tmp_path, capfd, monkeypatch):
    found = {}

    def initialize(**options):
        found.update(options)
        raise ValueError("no cluster")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    arguments = student_command(scene, tmp_path, "--multihost", "--config.mesh.heartbeat_timeout=30")
    assert "no cluster" in call(capfd, "tlvit.main", *arguments, status=1)
    assert found == {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 30}


def test_workdir_of_another_model_is_refused_and_kept(scene, student, capfd):
    before = (student / "config.json").read_text()
    changed = student_command(scene, student, "--config.model.options.depth=3")
    text = call(capfd, "tlvit.main", *changed, status=1)
    assert re.search(r"holds another run.*\n.*model.options", text), text
    assert (student / "config.json").read_text() == before


@pytest.mark.slow
def test_not_finite_loss_stops_names_the_step_and_keeps_the_last_checkpoint(scene, tmp_path, capfd):
    blow_up = [
        "--config.optim.learning_rate=1000",
        "--config.optim.weight_decay=1000",  # -1e6 times the weights a step
        "--config.optim.clip_norm=0.0",
        "--config.optim.warmup_epochs=2.0",
    ]
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path, *blow_up), status=1)
    found = re.search(r"The loss of step (\d+) is (nan|inf)", text)
    assert found, text
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert all(step < int(found.group(1)) for step in saved)


def test_damaged_and_foreign_score_maps_are_refused(scene, tmp_path, capfd):
    from tlvit.data.sources import digit_scenes as digits

    damaged = tmp_path / "damaged"
    shutil.copytree(scene / "maps", damaged)
    shard = sorted(damaged.glob("maps-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-20])
    maps = f"--config.data.score_maps={damaged}"
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path / "a", maps), status=1)
    assert shard.name in text
    assert "Traceback" not in text
    digits.prepare(tmp_path / "other", num_train=48, num_test=40, num_shards=4)
    data = f"--config.data.dir={tmp_path / 'other'}"
    text = call(capfd, "tlvit.main", *student_command(scene, tmp_path / "b", data), status=1)
    assert "train48" in text
    assert "train64" in text
