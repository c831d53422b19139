"""What a run writes while it trains: messages, the progress line, metrics.jsonl and TensorBoard events."""

import contextlib
import json
import logging
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import jax
import numpy as np

from tlvit.files import as_path, is_local, write_text
from tlvit.training.workdir import make_workdir
from tlvit.types import Array

IN_FLIGHT = 2  # steps that are started before an earlier one is waited for; enough to keep a device busy

log = logging.getLogger("tlvit")


def start_logging(workdir: pathlib.Path | None = None) -> None:
    """Sends tlvit's messages to the terminal and, on process 0, to log.txt in a local workdir.

    Messages of libraries below the level of errors are hidden.

    Raises:
      OSError: the workdir cannot be created.
    """
    for library in ("absl", "jax", "orbax"):
        logging.getLogger(library).setLevel(logging.ERROR)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    log.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    if workdir is not None and jax.process_index() == 0:
        make_workdir(workdir)
        if is_local(workdir):
            handlers.append(logging.FileHandler(workdir / "log.txt"))
    log.handlers, log.propagate = handlers, False
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))


class Progress:
    """Collects the metrics of each step on the device and sums them up in one line.

    Args:
      first_step: number of steps done before this process started.
      total_steps: number of steps of the whole training.
      steps_per_epoch: for the epoch that is shown.
      batch_size: images in a step.
    """

    def __init__(self, first_step: int, total_steps: int, steps_per_epoch: int, batch_size: int):
        self._first, self._total = first_step, total_steps
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._pending: list[dict[str, Array]] = []
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._timed = 0  # steps since _start
        self._start: float | None = None
        self._created = time.perf_counter()

    def add(self, metrics: dict[str, Array]) -> None:
        """Adds the metrics of a step, still on the device.

        Waits for the first step, which compiles, and for the step IN_FLIGHT steps before. Without a limit
        all steps up to the next progress line would be queued, with their batches, and a run that is asked
        to stop would first have to finish them.
        """
        self._pending.append(metrics)
        if len(self._pending) > IN_FLIGHT:
            jax.block_until_ready(self._pending[-1 - IN_FLIGHT])
        if self._start is None:
            jax.block_until_ready(metrics)
            self._start = time.perf_counter()
            log.info("first step done after %.0f s: first batch and compilation", self._start - self._created)
        else:
            self._timed += 1

    def check(self, step: int) -> None:
        """Fetches the metrics that are still on the device.

        Raises:
          FloatingPointError: a loss or gradient is not finite; names the first such step.
        """
        for i, values in enumerate(jax.device_get(self._pending)):
            loss, norm = float(values["loss"]), float(values["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                bad = step - len(self._pending) + 1 + i
                raise FloatingPointError(
                    f"The loss of step {bad} is {loss} and the norm of its gradient is {norm}: stopped "
                    "without saving. The last checkpoint is from before. Try a lower "
                    "config.optim.learning_rate, config.optim.clip_norm=1.0 or config.model.dtype=float32."
                )
            self._losses.append(loss)
            self._norms.append(norm)
        self._pending = []

    def flush(self, step: int, *, lr: float, wait_s: float) -> dict[str, float]:
        """Prints the progress line of the steps since the last call and returns its values."""
        self.check(step)
        elapsed = time.perf_counter() - (self._start or time.perf_counter())
        rate = self._timed * self._batch_size / elapsed if self._timed else float("nan")
        line = {
            "epoch": step / self._steps_per_epoch,
            "loss": float(np.mean(self._losses)),
            "grad_norm": float(np.mean(self._norms)),
            "lr": lr,
            "images_per_s": rate,
            "data_wait": min(wait_s / elapsed, 1.0) if self._timed else float("nan"),
        }
        eta = (self._total - step) * self._batch_size / rate if self._timed else float("nan")
        speed = f"  {rate:.0f} images/s  waiting for data {100 * line['data_wait']:.0f}%  ETA {duration(eta)}"
        log.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e%s",
            step, self._total, line["epoch"], line["loss"], lr, speed if self._timed else "",
        )  # fmt: skip
        self._losses, self._norms = [], []
        self.restart()
        return {f"train/{k}": v for k, v in line.items()}

    def restart(self) -> None:
        """Restarts the clock, after an evaluation or a checkpoint."""
        self._timed, self._start = 0, time.perf_counter()


class MetricWriter(Protocol):
    """Where a run's metrics also go, for example an experiment tracker.

    The writers of `clu.metric_writers` have these methods.
    """

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""

    def close(self) -> None:
        """Is called once, at the end of the run."""


class MetricsFile:
    """Writes metrics.jsonl and TensorBoard events of a workdir, and to other writers, on process 0.

    Lines after `first_step`, which a run wrote that was killed between two checkpoints, are removed, and so
    is the evaluation of `first_step` if it is made again.

    Raises:
      OSError: a file cannot be written. Its `with` block closes the files.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        first_step: int,
        *,
        evaluate_again: bool = False,
        writers: Sequence[MetricWriter] = (),
    ):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        from clu import metric_writers  # imports TensorFlow, which only a run needs

        def is_kept(line: str) -> bool:
            step = _step_of(line)
            again = evaluate_again and step == first_step and '"eval/' in line
            return step is not None and step <= first_step and not again

        self._path = workdir / "metrics.jsonl"
        write_text(self._path, "".join(line + "\n" for line in _lines(self._path) if is_kept(line)))
        self._writers = [metric_writers.SummaryWriter(str(workdir)), *writers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(*() if kind is None else (Exception,)):  # the first error is raised
            self.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line {"step", …}. Values that are not finite are left out."""
        if self._writes:
            values = {k: v for k, v in values.items() if math.isfinite(v)}
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            for writer in self._writers:
                writer.write_scalars(step, values)

    def close(self) -> None:
        """Closes the writers."""
        if self._writes:
            for writer in self._writers:
                writer.close()


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, float]]:
    """The lines of a workdir's metrics.jsonl."""
    lines = _lines(as_path(workdir) / "metrics.jsonl")
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def duration(seconds: float) -> str:
    """3723 -> "1h02m"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s"


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []


def _step_of(line: str) -> int | None:
    """The step of a line; None for an incomplete last line of a killed run, and for a damaged line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
