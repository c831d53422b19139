"""The commands on a tiny digits set: train, kill, resume, annotate, evaluate, convert.

Runs that are compared bit for bit, or killed, are processes of their own with one device. Where only messages
and files are checked, the command runs inside the test process, which has eight devices.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import tlvit
from tlvit import main

TINY = [
    "--config.batch_size=16",
    "--config.optim.base_batch_size=16",
    "--config.epochs=4",
    "--config.optim.warmup_epochs=1.0",
    "--config.eval.every_epochs=2",
    "--config.checkpoint.every_epochs=1",
    "--config.log_every=2",
]


def command(module, *arguments, devices=1):
    """[argv, environment] of a program of the checkout, quiet and small."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return {"args": [sys.executable, "-m", module, *map(str, arguments)], "cwd": ROOT, "env": environment}


def run(module, *arguments, devices=1, status=0):
    """Runs a program to its end; its output, both streams."""
    done = subprocess.run(
        **command(module, *arguments, devices=devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def call(capfd, module, *arguments, status=0):
    """Runs a command in this process; what it prints, errors and messages first."""
    capfd.readouterr()
    returned = importlib.import_module(module).main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    printed = err + out
    assert returned == status, printed
    return printed


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A prepared digits set of 64 + 40 scenes."""
    from tlvit.data.sources import digit_scenes as digits

    folder = tmp_path_factory.mktemp("data")
    digits.prepare(folder, num_train=64, num_test=40, num_shards=4)
    return folder


@pytest.fixture(scope="module")
def annotator(scenes, tmp_path_factory):
    """A workdir of the annotator after four epochs of four steps."""
    workdir = tmp_path_factory.mktemp("annotator")
    arguments = ["--config=digits:annotator", f"--workdir={workdir}", f"--config.data.dir={scenes}", *TINY]
    assert main.main(arguments) == 0
    return workdir


@pytest.fixture(scope="module")
def maps(scenes, annotator, tmp_path_factory):
    """Score maps of the training scenes."""
    folder = tmp_path_factory.mktemp("maps") / "maps"
    command = importlib.import_module("tlvit.annotate")
    arguments = [f"--checkpoint={annotator}", "--data=digits", f"--data-dir={scenes}", "--top-k=5"]
    assert command.main([*arguments, f"--out={folder}"]) == 0
    return folder


def student_command(scenes, maps, workdir, *more):
    return [
        "--config=digits", f"--workdir={workdir}", f"--config.data.dir={scenes}",
        f"--config.data.score_maps={maps}", *TINY, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def student(scenes, maps, tmp_path_factory):
    """(workdir, output) of a student trained without interruption: 16 steps."""
    workdir = tmp_path_factory.mktemp("student")
    return workdir, run("tlvit.main", *student_command(scenes, maps, workdir))


def last_state(workdir):
    """The arrays of the last checkpoint, by name."""
    import orbax.checkpoint as ocp

    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    folder = workdir / "checkpoints" / str(max(steps)) / "state"
    with ocp.StandardCheckpointer() as reader:
        return max(steps), {k: np.asarray(v) for k, v in reader.restore(folder).items()}


def records(maps):
    """All score maps of a folder in order."""
    from tlvit.data.score_maps import reader as score_maps

    reader = score_maps.open_score_maps(str(maps))
    return [record for i in range(4) for record in reader.read(i).as_numpy_iterator()]


def losses(workdir):
    """Step -> training loss in metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_the_summary_describes_the_run(student):
    _, text = student
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
    workdir, _ = student
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [line["step"] for line in lines if "eval/raw_top1" in line] == [8, 16]
    assert lines[-1]["eval/images"] == 40
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 4
    assert (workdir / "classes.txt").read_text().split() == list("0123456789")
    assert list(workdir.glob("events.out.tfevents*"))
    assert {p.name for p in (workdir / "checkpoints").iterdir()} >= {"8", "12", "16"}
    assert (workdir / "report.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("number", "after"),
    [
        (signal.SIGTERM, 6),
        pytest.param(signal.SIGINT, 6, marks=pytest.mark.slow),  # handled like SIGTERM
        (signal.SIGKILL, 12),
    ],
)  # checkpoints are written in the background: at step 12 the one of step 4 is complete by then
def test_stopped_run_resumes_bit_for_bit(number, after, scenes, maps, student, tmp_path):
    """Stopped by a signal and started again, the run ends in exactly the state of an uninterrupted one."""
    arguments = student_command(scenes, maps, tmp_path)
    with (tmp_path / "out.txt").open("w") as out:
        process = subprocess.Popen(**command("tlvit.main", *arguments), stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while f"step {after}/16" not in (tmp_path / "out.txt").read_text():
            assert process.poll() is None, (tmp_path / "out.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        status = process.wait(timeout=120)
    text = (tmp_path / "out.txt").read_text()
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 75, text
        assert "the same command resumes" in text
        stopped, _ = last_state(tmp_path)
        assert after <= stopped < 16
    text = run("tlvit.main", *arguments)
    assert re.search(r"resumed at step \d+", text), text
    step, state = last_state(tmp_path)
    expected_step, expected = last_state(student[0])
    assert step == expected_step == 16
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)
    assert losses(tmp_path)[16] == losses(student[0])[16]


def test_finished_run_is_only_evaluated(scenes, maps, student, tmp_path, capfd):
    shutil.copytree(student[0], tmp_path / "w")
    text = call(capfd, "tlvit.main", *student_command(scenes, maps, tmp_path / "w"))
    assert "this run is complete: 16 of 16 steps" in text
    assert "evaluation on 40 images" in text


def test_checkpoint_of_one_device_is_resumed_on_four(scenes, maps, student, tmp_path, capfd):
    shutil.copytree(student[0], tmp_path / "w")
    longer = student_command(scenes, maps, tmp_path / "w", "--config.epochs=5", "--config.mesh.data=4")
    text = call(capfd, "tlvit.main", *longer)
    assert "devices       4 x cpu" in text
    assert "resumed at step 16" in text
    assert last_state(tmp_path / "w")[0] == 20


def test_evaluation_mode_agrees_with_training_and_counts_every_image(scenes, student, capfd):
    evaluate = [f"--workdir={student[0]}", "--config=digits", f"--config.data.dir={scenes}", "--mode=eval"]
    results = []
    for batch_size, devices in ((16, 1), (24, 8)):
        size = (f"--config.eval.batch_size={batch_size}", f"--config.mesh.data={devices}")
        text = call(capfd, "tlvit.main", *evaluate, *size)
        results.append(json.loads(text.splitlines()[-1]))
    trained = [json.loads(line) for line in (student[0] / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in trained if "eval/raw_top1" in line]
    # The later of two equal checkpoints is the best.
    best = max(evaluations, key=lambda e: (max(e["eval/raw_top1"], e["eval/ema_top1"]), e["step"]))
    for result in results:
        assert result["raw"]["count"] == result["ema"]["count"] == 40
        assert result["raw"]["top1"] == pytest.approx(best["eval/raw_top1"])
        assert result["ema"]["top1"] == pytest.approx(best["eval/ema_top1"])


def test_interrupted_annotation_resumes(scenes, annotator, maps, tmp_path, capfd):
    shutil.copytree(scenes, tmp_path / "data")
    [victim] = (tmp_path / "data").rglob("*train.tfrecord-00002-of-00004")
    data = ["--data=digits", f"--data-dir={tmp_path / 'data'}"]
    arguments = [f"--checkpoint={annotator}", *data, "--top-k=5"]
    out = tmp_path / "maps"
    victim.rename(tmp_path / "away")
    text = call(capfd, "tlvit.annotate", *arguments, f"--out={out}", status=1)
    assert victim.name in text
    assert "Traceback" not in text
    assert len(list(out.glob("maps-*"))) == 2
    (tmp_path / "away").rename(victim)
    text = call(capfd, "tlvit.annotate", *arguments, f"--out={out}")
    assert "2 of 4 shards" in text
    for resumed, uninterrupted in zip(records(out), records(maps), strict=True):
        assert resumed["key"] == uninterrupted["key"]
        np.testing.assert_array_equal(resumed["index"], uninterrupted["index"])
        np.testing.assert_array_equal(resumed["value"], uninterrupted["value"])
    assert "verified 64 score maps" in call(capfd, "tlvit.maps", out, *data)


def test_the_student_is_exported_and_opened_again(student, tmp_path, capfd):
    path = tmp_path / "student.safetensors"
    call(capfd, "tlvit.convert", f"--checkpoint={student[0]}", "--to=pytorch", f"--out={path}")

    one, info = tlvit.load(student[0])
    other, again = tlvit.load(path)
    assert info.model == again.model == "lvvit_s"
    images = np.random.RandomState(0).standard_normal((2, 48, 48, 3)).astype(np.float32)
    np.testing.assert_array_equal(one(images).logits, other(images).logits)


def test_fine_tuning_starts_from_other_weights_at_another_size(scenes, maps, student, tmp_path, capfd):
    options = (f"--config.model.init_from={student[0]}", "--config.image_size=64", "--config.epochs=1")
    text = call(capfd, "tlvit.main", *student_command(scenes, maps, tmp_path, *options))
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
def test_bad_settings_are_one_clear_sentence(change, message, scenes, maps, tmp_path, capfd):
    text = call(capfd, "tlvit.main", *student_command(scenes, maps, tmp_path, *change), status=1)
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
        (["--config=digitz"], "'digitz' is not a shipped recipe or a .py file; recipes: deit, digits"),
        (["--config=configs/nothing.py"], "The recipe file configs/nothing.py does not exist; shipped"),
        (["--config.model.options.depht=2"], "lvvit_s has no option 'depht'; did you mean depth?"),
        (["--confg=x"], "config"),
    ],
)
def test_unknown_settings_and_wrong_types_are_refused(
    change, message, scenes, maps, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(ROOT)
    text = call(capfd, "tlvit.main", *student_command(scenes, maps, tmp_path, *change), status=1)
    assert message in text
    assert "Traceback" not in text


def test_a_signal_during_the_start_is_status_75_and_a_sentence(
    scenes, maps, student, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("tlvit.training.run_data.open_data", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    text = call(capfd, "tlvit.main", *student_command(scenes, maps, tmp_path), status=75)
    assert "stopped by SIGTERM. There is no checkpoint yet: the same command starts again." in text
    shutil.copytree(student[0], tmp_path / "w")
    text = call(capfd, "tlvit.main", *student_command(scenes, maps, tmp_path / "w"), status=75)
    assert (
        "stopped by SIGTERM. The checkpoint of step 16 is complete: the same command resumes from it." in text
    )
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda w: w.write_text("x"), "w is not a folder"),
        (lambda w: (w / "metrics.jsonl").mkdir(parents=True), "metrics.jsonl is a folder, but a run writes"),
        (lambda w: w.symlink_to("/proc/none/w"), "w is not a folder"),
    ],
)
def test_a_workdir_that_cannot_be_written_is_one_sentence(prepare, message, scenes, maps, tmp_path, capfd):
    prepare(tmp_path / "w")
    text = call(capfd, "tlvit.main", *student_command(scenes, maps, tmp_path / "w"), status=1)
    assert message in text
    assert "Traceback" not in text


def test_the_heartbeat_timeout_of_several_processes_is_a_setting(scenes, maps, tmp_path, capfd, monkeypatch):
    found = {}

    def initialize(**options):
        found.update(options)
        raise ValueError("no cluster")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    arguments = student_command(scenes, maps, tmp_path, "--multihost", "--config.mesh.heartbeat_timeout=30")
    assert "no cluster" in call(capfd, "tlvit.main", *arguments, status=1)
    assert found == {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 30}


def test_workdir_of_another_model_is_refused_and_kept(scenes, maps, student, capfd):
    before = (student[0] / "config.json").read_text()
    changed = student_command(scenes, maps, student[0], "--config.model.options.depth=3")
    text = call(capfd, "tlvit.main", *changed, status=1)
    assert re.search(r"holds another run.*\n.*model.options", text), text
    assert (student[0] / "config.json").read_text() == before


def test_not_finite_loss_stops_names_the_step_and_keeps_the_last_checkpoint(scenes, maps, tmp_path, capfd):
    blow_up = [
        "--config.optim.learning_rate=1000",
        "--config.optim.weight_decay=1000",  # -1e6 times the weights a step
        "--config.optim.clip_norm=0.0",
        "--config.optim.warmup_epochs=2.0",
    ]
    text = call(capfd, "tlvit.main", *student_command(scenes, maps, tmp_path, *blow_up), status=1)
    found = re.search(r"The loss of step (\d+) is (nan|inf)", text)
    assert found, text
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert all(step < int(found.group(1)) for step in saved)


def test_unreadable_last_checkpoint_falls_back_to_the_one_before(scenes, maps, student, tmp_path):
    shutil.copytree(student[0], tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "16" / "state")
    text = run("tlvit.main", *student_command(scenes, maps, tmp_path / "w"))
    assert "checkpoint of step 16 cannot be read and is skipped" in text
    assert "resumed at step 12" in text
    _, again = last_state(tmp_path / "w")
    _, expected = last_state(student[0])
    for name, array in expected.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_damaged_and_foreign_score_maps_are_refused(scenes, maps, tmp_path, capfd):
    from tlvit.data.sources import digit_scenes as digits

    damaged = tmp_path / "damaged"
    shutil.copytree(maps, damaged)
    shard = sorted(damaged.glob("maps-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-20])
    text = call(capfd, "tlvit.main", *student_command(scenes, damaged, tmp_path / "a"), status=1)
    assert shard.name in text
    assert "Traceback" not in text
    digits.prepare(tmp_path / "other", num_train=48, num_test=40, num_shards=4)
    text = call(capfd, "tlvit.main", *student_command(tmp_path / "other", maps, tmp_path / "b"), status=1)
    assert "train48" in text
    assert "train64" in text
