"""The training loop: what it refuses, how it stops, and what precision and accumulation leave unchanged."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refuse_folders
from flax import nnx

from configs import digits as recipe
from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import Checkpoints, restore_for_inference, save_model_folder
from tlvit.config import resolve
from tlvit.data.score_maps.format import MapDescription
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.recipes import load_recipe
from tlvit.training import run_log
from tlvit.training.loop import ProfileWindow
from tlvit.training.loop import train as train_resolved
from tlvit.training.run_data import model_info
from tlvit.training.run_log import read_metrics
from tlvit.training.stop_request import Stopped
from tlvit.training.workdir import lock_workdir

TINY = {"patch_size": 8, "dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Messages of this file reach the terminal once."""
    run_log.log.setLevel("INFO")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """32 training and 20 test scenes."""
    from tlvit.data.sources import digit_scenes as digits

    folder = tmp_path_factory.mktemp("data")
    digits.prepare(folder, num_train=32, num_test=20, num_shards=2)
    return folder


@pytest.fixture(scope="module")
def maps(data, tmp_path_factory):
    """Score maps of the training scenes: the label in every cell, with a logit that grows to the right."""
    from tlvit.data.sources.open import open_source

    source = open_source("digits", "train", data_dir=str(data))
    folder = tmp_path_factory.mktemp("maps")
    options = {"annotator": "test", "annotator_hash": "0", "top_k": 2, "grid": (6, 6), "num_classes": 10}
    writer = ScoreMapWriter(str(folder), source, MapDescription(**options))
    for shard in range(len(source.shard_lengths)):
        records = list(source.read(shard).as_numpy_iterator())
        label = np.array([int(r["label"]) for r in records])
        index = np.stack([label, (label + 1) % 10], axis=1)[:, :, None, None]
        shape = (len(records), 2, 6, 6)
        value = np.broadcast_to(np.arange(6) * np.array([1.0, 0.5])[:, None, None], shape)
        writer.write_shard(shard, [r["key"].decode() for r in records], value, np.broadcast_to(index, shape))
    writer.finalize()
    return folder


def train(config, workdir, **options):
    """Trains with the settings of a ConfigDict."""
    return train_resolved(resolve(config), workdir, **options)


def config_for(data, maps=None, **changes):
    config = recipe.get_config("token_labels" if maps else "no_token_labels")
    config.data.dir = str(data)
    config.data.score_maps = str(maps or "")
    config.model.options = dict(TINY, stem_width=None, skip_lam=1.0)
    config.batch_size = config.optim.base_batch_size = 16
    config.epochs = 2
    config.log_every = 1
    config.optim.warmup_epochs = 0.0
    config.eval.every_epochs = 1
    config.checkpoint.every_epochs = 1
    config.update_from_flattened_dict(changes)
    return config


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(data, maps, tmp_path_factory):
    """(workdir, result) of four steps in float32, whole batches."""
    workdir = tmp_path_factory.mktemp("plain")
    return workdir, train(config_for(data, maps), workdir)


def test_result_and_metrics(plain):
    workdir, result = plain
    assert (result.finished, result.step) == (True, 4)
    keys = {f"eval/{w}_{k}" for w in ("raw", "ema") for k in ("top1", "top5", "loss")}
    assert result.metrics.keys() == keys | {"eval/images"}
    assert result.metrics["eval/images"] == 20
    lines = metrics_of(workdir)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/raw_top1" in line] == [2, 4]
    assert lines[-1] == {"step": 4, **result.metrics}
    assert [line["train/epoch"] for line in lines if "train/epoch" in line] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.slow
def test_bfloat16_and_accumulation_compute_the_same(plain, data, maps, tmp_path):
    """Two parts of every batch in bfloat16 against whole batches in float32: the same images, the same
    targets, so the same losses to bfloat16's three digits."""
    config = config_for(data, maps, **{"model.dtype": "bfloat16", "optim.accumulate": 2})
    result = train(config, tmp_path)
    assert result.finished
    ours, theirs = ([line for line in metrics_of(w) if "train/loss" in line] for w in (tmp_path, plain[0]))
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=0.01)
        assert a["train/lr"] == b["train/lr"]
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=0.1)
    params, _, extra = restore_for_inference(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert ModelInfo.from_json(extra).options["dtype"] == "bfloat16"


def test_checkpoints_say_how_to_build_the_model(plain, data):
    _, _, extra = restore_for_inference(plain[0])
    info = ModelInfo.from_json(extra)
    assert info.best_weights in ("raw", "ema")
    expected = model_info(resolve(config_for(data)), Source())
    assert dataclasses.replace(info, best_weights=None) == ModelInfo.from_json(expected.to_json())
    assert (info.model, info.image_size, info.num_classes) == ("lvvit_s", (48, 48), 10)
    assert info.preprocessing.crop_pct == 1.0


class Source:
    """The attributes of a source that `model_info` reads."""

    num_classes, num_examples, class_names = 10, 32, tuple("0123456789")


def test_score_of_a_checkpoint_is_the_better_of_both(plain):
    """The best step is that of the highest of raw and averaged top-1."""
    lines = [line for line in metrics_of(plain[0]) if "eval/raw_top1" in line]
    scores = {line["step"]: max(line["eval/raw_top1"], line["eval/ema_top1"]) for line in lines}
    checkpoints = Checkpoints(plain[0] / "checkpoints")
    assert checkpoints.best_step() == max(scores, key=lambda step: (scores[step], step))
    checkpoints.close()


# Stopping


def stop_at(monkeypatch, step):
    """A SIGTERM while this step runs."""
    add, count = run_log.Progress.add, []

    def spying(self, metrics):
        count.append(1)
        if len(count) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, metrics)

    monkeypatch.setattr(run_log.Progress, "add", spying)


@pytest.mark.slow
def test_asked_to_stop_in_its_last_step_a_run_is_finished_and_evaluated(data, tmp_path, monkeypatch):
    """Nothing is left to resume, so this run has to evaluate."""
    stop_at(monkeypatch, 2)
    result = train(config_for(data, epochs=1), tmp_path)
    assert result.finished
    assert "eval/raw_top1" in result.metrics


def params_of(workdir, step):
    """The raw weights of a step."""
    return restore_for_inference(workdir, weights="raw", step=step)[0]


def assert_same_run(workdir, expected):
    """Bit-equal weights at the end, and the same losses and evaluations."""
    jax.tree.map(np.testing.assert_array_equal, params_of(workdir, 4), params_of(expected, 4))
    values = lambda w: [{k: v for k, v in line.items() if "_s" not in k and "wait" not in k} for line in w]
    assert values(metrics_of(workdir)) == values(metrics_of(expected))


def test_a_signal_before_the_first_step_stops_at_once(data, tmp_path, monkeypatch):
    def interrupted(config):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not interrupted")

    monkeypatch.setattr("tlvit.training.run_data.open_data", interrupted)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM. There is no checkpoint yet: the same command"):
        train(config_for(data), tmp_path)


@pytest.mark.slow
def test_an_evaluation_is_left_when_a_stop_is_requested_and_made_up(plain, data, maps, tmp_path, monkeypatch):
    """In the first evaluation, and in the last one. The run is in the end the same as one without signals."""
    from tlvit.data import pipeline

    read, started = pipeline.eval_batches, []

    def terminated(*args, **options):
        started.append(1)
        for batch in read(*args, **options):
            if len(started) in (1, 3):  # the second is the first one, made up
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(pipeline, "eval_batches", terminated)
    for step in (2, 4):
        result = train(config_for(data, maps), tmp_path)
        assert (result.finished, result.step) == (False, step)
        assert not any("eval/raw_top1" in line for line in metrics_of(tmp_path) if line["step"] == step)
        if step == 2:
            monkeypatch.setattr(run_log.Progress, "check", made_up_first(tmp_path, run_log.Progress.check))
    monkeypatch.undo()
    result = train(config_for(data, maps), tmp_path)
    assert (result.finished, result.metrics) == (True, plain[1].metrics)
    assert_same_run(tmp_path, plain[0])
    ours, theirs = Checkpoints(tmp_path / "checkpoints"), Checkpoints(plain[0] / "checkpoints")
    assert (ours.steps(), ours.best_step()) == (theirs.steps(), theirs.best_step())
    assert ours.record(4) == theirs.record(4)


def made_up_first(workdir, check):
    """`check`, and before it that the evaluation of step 2 was made up and rated."""

    def checking(self, step):
        assert [line["step"] for line in metrics_of(workdir) if "eval/raw_top1" in line] == [2]
        assert not Checkpoints(workdir / "checkpoints").record(2)["run"]["evaluation_due"]
        check(self, step)

    return checking


def test_a_read_error_loses_no_step(plain, data, maps, tmp_path, monkeypatch):
    from tlvit.data import pipeline

    read = pipeline.train_batches

    def failing(*args, **options):
        batches = read(*args, **options)
        yield from (next(batches) for _ in range(4))
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_batches", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            train(config_for(data, maps), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]  # step 4 was prefetched
    assert train(config_for(data, maps), tmp_path).finished
    assert_same_run(tmp_path, plain[0])


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run(data, tmp_path, monkeypatch):
    add = run_log.Progress.add

    def spying(self, metrics):
        if (tmp_path / "checkpoints" / "2").exists():
            refuse_folders(monkeypatch, "4.orbax-checkpoint-tmp")
        add(self, metrics)

    monkeypatch.setattr(run_log.Progress, "add", spying)
    with pytest.raises(
        OSError, match=r"cannot be written to .*not permitted. The checkpoint of step 2 is complete"
    ):
        train(config_for(data), tmp_path)


@pytest.mark.slow
def test_a_second_ctrl_c_says_what_is_kept(data, tmp_path, monkeypatch):
    """While the run waits for the last checkpoint: a SIGTERM does nothing, Ctrl-C twice interrupts."""
    wait = Checkpoints.wait

    def interrupted(self):
        wait(self)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not interrupted")

    monkeypatch.setattr(Checkpoints, "wait", interrupted)
    monkeypatch.setattr(Checkpoints, "check", lambda self: None)
    monkeypatch.setattr(Checkpoints, "rate", lambda self, step, **_: None)
    with pytest.raises(Stopped, match=r"stopped by Ctrl-C. The checkpoint of step 2 is complete: the same"):
        train(config_for(data, epochs=1), tmp_path)


def test_two_runs_do_not_share_a_workdir(data, tmp_path):
    with lock_workdir(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        train(config_for(data), tmp_path)


def test_an_evaluation_batch_that_does_not_fit_is_refused_before_training(data, tmp_path):
    with pytest.raises(ValueError, match="20"):
        train(config_for(data, **{"eval.batch_size": 20}), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_model_without_token_head_trains_to_the_end(data, tmp_path):
    config = config_for(data, epochs=1, **{"model.name": "vit"})
    config.model.options = dict(TINY)
    assert train(config, tmp_path).finished


@pytest.mark.slow
def test_after_a_blow_up_the_last_checkpoint_is_good(data, tmp_path):
    """The second step's learning rate is far too high; its loss is still finite, and it is saved. With a
    lower rate the run can be resumed."""
    changes = {"batch_size": 32, "optim.warmup_epochs": 1.0, "optim.schedule_unit": "epoch", "epochs": 6}
    with pytest.raises(FloatingPointError):
        train(config_for(data, **changes, **{"optim.learning_rate": 1000.0}), tmp_path)
    result = train(config_for(data, **changes, **{"optim.learning_rate": 1e-4}), tmp_path)
    assert result.finished


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(plain, data, maps, tmp_path, caplog):
    """The losses and weights of data parallelism, from a run of two epochs on two meshes."""
    meshes = ({"mesh.data": 2, "mesh.fsdp": 4}, {"mesh.model": 2})
    with caplog.at_level("INFO", "tlvit"):
        assert train(config_for(data, maps, **meshes[0]), tmp_path).finished
        shutil.rmtree(tmp_path / "checkpoints" / "4")
        assert train(config_for(data, maps, **meshes[1]), tmp_path).finished
    assert re.findall(r"devices +8 x cpu \(cpu\), mesh (.*)", caplog.text) == [
        "data 2 x fsdp 4",
        "data 4 x model 2",
    ]
    sizes = re.findall(r"state +([\d.]+) of ([\d.]+) MB on each device", caplog.text)
    assert len(sizes) == 2
    assert all(float(on_device) < float(whole) for on_device, whole in sizes)
    assert "resumed at step 2" in caplog.text
    ours, theirs = (
        {line["step"]: line["train/loss"] for line in metrics_of(folder) if "train/loss" in line}
        for folder in (tmp_path, plain[0])
    )
    assert ours == pytest.approx(theirs, abs=1e-4)
    (model, _), (other, _) = (load(folder, weights="raw") for folder in (tmp_path, plain[0]))
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_settings_that_do_not_fit_the_devices_are_refused(data, maps, tmp_path):
    for changes, message in (
        ({"mesh.fsdp": 3, "mesh.data": 4}, "config.mesh: data 4 x fsdp 3 = 12 devices, but there are 8"),
        ({"mesh.model": 8}, "config.mesh.model=8 cannot divide the 2 attention heads of lvvit_s"),
        ({"batch_size": 24, "loss.mixtoken": True}, "24 images over 8 devices is 3 for each"),
        ({"optim.accumulate": 2, "loss.mixtoken": True}, "16 images over 8 devices in 2 .* is 1 for each"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config_for(data, maps, **changes), tmp_path)
    assert not (tmp_path / "config.json").exists()


def distilled(data, teacher, **changes):
    """The recipe of a small DeiT that a teacher distills."""
    config = config_for(data, **{"distill.teacher": str(teacher), **changes})
    config.model.name = "deit_tiny_distilled_patch16_224"
    config.model.options = dict(TINY)
    return config


@pytest.mark.slow
def test_a_run_is_a_teacher(plain, data, tmp_path, caplog):
    with caplog.at_level("INFO", "tlvit"):
        result = train(distilled(data, plain[0]), tmp_path)
    assert result.finished
    assert f"teacher: lvvit_s from {plain[0]}, hard distillation" in caplog.text
    assert all(np.isfinite(line["train/loss"]) for line in metrics_of(tmp_path) if "train/loss" in line)


@pytest.mark.slow
def test_teachers_that_do_not_fit_are_refused(plain, data, maps, tmp_path):
    with pytest.raises(
        ValueError, match=r"deit_tiny_distilled.* has a distillation token, which only a teacher"
    ):
        train(distilled(data, ""), tmp_path)
    with pytest.raises(ValueError, match="lvvit_s has no distillation token"):
        train(config_for(data, **{"distill.teacher": str(plain[0])}), tmp_path)
    labeled = distilled(data, plain[0], token_labels=True, **{"data.score_maps": str(maps)})
    with pytest.raises(ValueError, match=r"teacher and config.token_labels are two recipes"):
        train(labeled, tmp_path)
    info = ModelInfo("regnety_002", 7, (48, 48))
    save_model_folder(tmp_path / "seven", info.build(), info)
    with pytest.raises(ValueError, match="seven has 7 classes, but the data have 10"):
        train(distilled(data, tmp_path / "seven"), tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ValueError, pytest.param(MemoryError, marks=pytest.mark.slow)])
def test_evaluation_that_fails_does_not_lose_the_epoch(kind, data, maps, tmp_path, monkeypatch):
    """A corrupt evaluation image is found only after the first epoch."""

    def fail(*args, **options):
        assert options["max_corrupt"] == 0.25
        raise kind("1 of 20 images cannot be read")
        yield

    config = config_for(data, maps, **{"eval.max_corrupt": 0.25})
    with monkeypatch.context() as patch:
        patch.setattr("tlvit.data.pipeline.eval_batches", fail)
        with pytest.raises(kind, match="1 of 20 images"):
            train(config, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2"]
    result = train(config_for(data, maps), tmp_path)
    assert (result.finished, result.step) == (True, 4)
    assert [line["step"] for line in metrics_of(tmp_path) if "eval/raw_top1" in line] == [2, 4]


# Records


def test_the_settings_of_a_run_are_in_its_checkpoints(plain, data, maps, tmp_path):
    """So config.json may be damaged or missing; it is written again."""
    workdir = tmp_path / "w"
    shutil.copytree(plain[0], workdir)
    for damage in (pathlib.Path.unlink, lambda path: path.write_text('{"seed": 0')):
        damage(workdir / "config.json")
        with pytest.raises(ValueError, match=r"holds another run.*\n  seed: 0 in the workdir, 1 now"):
            train(config_for(data, maps, seed=1), workdir)
    assert train(config_for(data, maps), workdir).finished
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0


def test_model_info(data):
    config = config_for(data, **{"image_size": (48, 64), "model.dtype": "bfloat16", "eval.crop_pct": 0.8})
    info = model_info(resolve(config), Source())
    assert info.options == {"dtype": "bfloat16", **TINY, "stem_width": None, "skip_lam": 1.0}
    assert (info.image_size, info.class_names, info.preprocessing.crop_pct) == (
        (48, 64),
        tuple("0123456789"),
        0.8,
    )
    assert info.preprocessing == Preprocessing(crop_pct=0.8)


def test_model_info_of_the_published_transfer_to_cifar():
    """Checkpoints record what prediction and export need: CIFAR's statistics and the bilinear resize."""
    info = model_info(resolve(load_recipe("transfer:cifar10")), Source())
    assert info.preprocessing == Preprocessing(
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), crop_pct=1.0, interpolation="bilinear"
    )


@pytest.mark.slow
def test_a_workdir_without_a_checkpoint_may_start_with_other_settings(data, tmp_path):
    """The files of a run that failed before its first checkpoint do not matter."""
    config = config_for(data)
    other = config_for(data, **{"model.options.depth": 3, "batch_size": 8})
    (tmp_path / "config.json").write_text(json.dumps(other.to_dict()))
    assert train(config, tmp_path).finished
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == config.batch_size


def test_the_transfer_guard_refuses_a_batch_on_the_host(data, tmp_path, monkeypatch):
    """A step may not move arrays: a batch that the prefetch left on the host is an error."""
    monkeypatch.setattr("tlvit.training.prefetch.to_global", lambda batch, mesh: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(config_for(data), tmp_path)


class Tracker:
    """A metric writer that keeps what it is given."""

    def __init__(self):
        self.lines, self.closed = [], 0

    def write_scalars(self, step, scalars):
        self.lines.append({"step": step, **scalars})

    def close(self):
        self.closed += 1


@pytest.mark.slow
def test_a_profiler_trace_is_written_and_a_tracker_gets_the_metrics(data, tmp_path):
    tracker = Tracker()
    window = ProfileWindow(start=1, steps=1)
    train(config_for(data, epochs=1), tmp_path, profile=window, writers=[tracker])
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert tracker.lines == read_metrics(tmp_path)
    assert tracker.closed == 1


@pytest.mark.slow
def test_without_an_average_the_raw_weights_are_the_best(data, tmp_path):
    result = train(config_for(data, epochs=1, **{"ema.decay": 0.0}), tmp_path)
    assert not any(key.startswith("eval/ema") for key in result.metrics)
    assert ModelInfo.from_json(restore_for_inference(tmp_path)[2]).best_weights == "raw"


@pytest.mark.slow
def test_init_from_without_an_average(plain, data, tmp_path):
    """The run keeps no average. It takes the model's sizes from the checkpoint, and resumes without it."""
    start = tmp_path / "start"
    save_model_folder(start, *load(plain[0]))
    config = config_for(data, epochs=1, **{"ema.decay": 0.0, "model.init_from": str(start)})
    config.model.options = {}
    first = train(config, tmp_path / "run")
    assert not any(key.startswith("eval/ema") for key in first.metrics)
    shutil.rmtree(start)
    config.epochs = 2
    assert train(config, tmp_path / "run").step == 4
