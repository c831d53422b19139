"""The progress line, metrics.jsonl after a kill, TensorBoard events and log messages."""

import json
import logging
import re
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlvit.files import as_path
from tlvit.training import run_log
from tlvit.training.run_log import MetricsFile, Progress, duration, read_metrics, start_logging


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(run_log.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def logger(caplog):
    """The `tlvit` logger, captured by caplog and restored afterwards."""
    log = logging.getLogger("tlvit")
    before = log.handlers, log.propagate, log.level
    with caplog.at_level(logging.INFO, logger="tlvit"):
        yield log
    for handler in log.handlers:
        if handler not in before[0]:
            handler.close()
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


def step_metrics(loss, norm=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}


def test_progress_line(clock, caplog):
    """10 of 40 steps of 32 images; the first step, which compiles, counts for the loss but not for the
    speed."""
    progress = Progress(0, 40, steps_per_epoch=8, batch_size=32)
    for i in range(1, 11):
        progress.add(step_metrics(i, norm=2 * i))
        clock.now += 0 if i == 1 else 0.5
    line = progress.flush(10, lr=1e-3, wait_s=0.9)
    assert line == pytest.approx(
        {
            "train/epoch": 1.25,
            "train/loss": 5.5,
            "train/grad_norm": 11.0,
            "train/lr": 1e-3,
            "train/images_per_s": 64.0,  # 9 steps of 32 in 4.5 s
            "train/data_wait": 0.2,
        }
    )
    assert (
        "step 10/40  epoch 1.25  loss 5.5000  lr 1.00e-03  64 images/s  waiting for data 20%  ETA 0m15s"
        in (caplog.text)
    )


def test_the_next_line_counts_its_own_steps_only(clock):
    progress = Progress(0, 40, steps_per_epoch=8, batch_size=32)
    progress.add(step_metrics(9))
    clock.now += 3
    progress.flush(1, lr=1.0, wait_s=0.0)
    for _ in range(4):
        clock.now += 0.25
        progress.add(step_metrics(2))
    line = progress.flush(5, lr=1.0, wait_s=0.25)
    assert (line["train/loss"], line["train/images_per_s"], line["train/data_wait"]) == (2.0, 128.0, 0.25)


def test_evaluation_and_saving_do_not_slow_the_line(clock):
    progress = Progress(0, 40, steps_per_epoch=8, batch_size=32)
    progress.add(step_metrics(1))
    progress.flush(1, lr=1.0, wait_s=0.0)
    clock.now += 600  # an evaluation
    progress.restart()
    progress.add(step_metrics(1))
    clock.now += 0.5
    assert progress.flush(2, lr=1.0, wait_s=9.0) == pytest.approx(
        {"train/epoch": 0.25, "train/loss": 1.0, "train/grad_norm": 1.0, "train/lr": 1.0,
         "train/images_per_s": 64.0, "train/data_wait": 1.0}
    )  # fmt: skip


def test_the_first_line_without_a_timed_step_has_no_speed(clock, caplog):
    progress = Progress(0, 4, steps_per_epoch=2, batch_size=8)
    progress.add(step_metrics(1))
    line = progress.flush(1, lr=1.0, wait_s=5.0)
    assert np.isnan([line["train/images_per_s"], line["train/data_wait"]]).all()
    assert caplog.messages[-1].endswith("lr 1.00e+00")  # and nothing behind it


def test_few_steps_are_in_flight():
    """A run that is asked to stop waits for the steps that are started, so these must be few."""
    progress = Progress(0, 40, steps_per_epoch=8, batch_size=32)
    slow_step = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ y / 64, x))
    state, losses = jnp.ones((512, 512)), []
    for _ in range(6):
        state = slow_step(state)
        losses.append(state[0, 0])
        progress.add({"loss": losses[-1], "grad_norm": losses[-1]})
        assert all(loss.is_ready() for loss in losses[: -run_log.IN_FLIGHT])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_by_its_step(value):
    """Step 17 is the first of steps 11 to 20 that is not finite."""
    progress = Progress(10, 100, steps_per_epoch=10, batch_size=8)
    for step in range(11, 21):
        progress.add(step_metrics(value if step >= 17 else 1.0))
    with pytest.raises(FloatingPointError, match=rf"The loss of step 17 is {value} and .*last checkpoint"):
        progress.flush(20, lr=1.0, wait_s=0.0)


def test_the_named_step_counts_from_the_last_check():
    progress = Progress(0, 100, steps_per_epoch=10, batch_size=8)
    for _ in range(4):
        progress.add(step_metrics(1.0))
    progress.check(4)
    progress.add(step_metrics(1.0))
    progress.add(step_metrics(float("nan")))
    with pytest.raises(FloatingPointError, match="step 6 "):
        progress.check(6)


def test_a_gradient_that_is_not_finite_stops_the_run_too():
    """The loss of a step is from before its update: with a NaN gradient the weights are NaN."""
    progress = Progress(0, 100, steps_per_epoch=10, batch_size=8)
    progress.add(step_metrics(1.0, norm=float("nan")))
    with pytest.raises(FloatingPointError, match="step 1"):
        progress.check(1)


# metrics.jsonl


def lines_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_metrics_resume_after_the_checkpoint(tmp_path):
    """Steps 10 to 40 were written and the checkpoint is of step 20: the lines of 30 and 40 and an incomplete
    line are removed."""
    metrics = MetricsFile(tmp_path, 0)
    for step in (10, 20, 30, 40):
        metrics.write(step, {"train/loss": step / 10})
    metrics.write(20, {"eval/raw_top1": 12.5})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    metrics = MetricsFile(tmp_path, 20)
    metrics.write(30, {"train/loss": 3.5, "eval/images": float("nan"), "x": float("inf")})
    metrics.close()
    assert lines_of(tmp_path) == [
        {"step": 10, "train/loss": 1.0},
        {"step": 20, "train/loss": 2.0},
        {"step": 20, "eval/raw_top1": 12.5},
        {"step": 30, "train/loss": 3.5},
    ]
    assert read_metrics(tmp_path) == lines_of(tmp_path)


def test_every_line_is_on_disk_at_once(tmp_path):
    """A killed run keeps all lines that it wrote."""
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(1, {"train/loss": 1.0})
    assert lines_of(tmp_path) == [{"step": 1, "train/loss": 1.0}]
    metrics.close()


def test_an_incomplete_last_line_is_ignored(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra')
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 1.0}]


def test_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    metrics = MetricsFile(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step, {"train/loss": 2.0**step, "train/images_per_s": float("nan")})
    metrics.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert events.Tags()["tensors"] == ["train/loss"]
    found = [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors("train/loss")]
    assert found == [(1, 2.0), (2, 4.0), (3, 8.0)]


# Messages


def test_start_logging_writes_to_terminal_and_file(tmp_path, logger, capfd):
    start_logging(tmp_path / "new" / "run")
    logger.info("hello")
    start_logging(tmp_path / "new" / "run")  # a second run in one process: no line twice
    logger.info("again")
    lines = (tmp_path / "new" / "run" / "log.txt").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["hello", "again"]
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    assert capfd.readouterr().err.splitlines() == lines


def test_start_logging_without_a_workdir(logger, capfd):
    start_logging()
    logger.info("only here")
    assert "only here" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0m00s"), (59.6, "1m00s"), (3599.4, "59m59s"), (3599.6, "1h00m"), (3723, "1h02m"),
     (360000, "100h00m"), (float("nan"), "?"), (float("inf"), "?")],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_metrics_in_a_bucket(bucket, monkeypatch):
    """Lines after the first step are removed; others are appended. TensorFlow writes the events itself."""
    from clu import metric_writers

    monkeypatch.setattr(metric_writers, "SummaryWriter", unittest.mock.MagicMock())
    (bucket / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    with MetricsFile(as_path("gs://bucket"), 1) as file:
        file.write(2, {"train/loss": 0.5})
    assert read_metrics("gs://bucket") == [{"step": 1}, {"step": 2, "train/loss": 0.5}]
