"""The training loop of every recipe, from setup to the last checkpoint."""

import dataclasses
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import Checkpoints
from tlvit.class_names import write_class_names
from tlvit.config import Config, to_dict
from tlvit.models.functional import functionalize
from tlvit.training import checks, optimizer, run_data, run_log
from tlvit.training.evaluation import evaluate
from tlvit.training.initialize import initial_state
from tlvit.training.mesh import local_batch_size, make_mesh
from tlvit.training.prefetch import Prefetch
from tlvit.training.run_summary import print_summary
from tlvit.training.run_warnings import run_warnings
from tlvit.training.state import TrainState, abstract_model
from tlvit.training.step import make_eval_step, make_train_step
from tlvit.training.stop_request import StopRequest
from tlvit.training.teacher import load_teacher
from tlvit.types import Batch

log = logging.getLogger("tlvit")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      finished: False if the run was asked to stop (Ctrl-C, SIGTERM) and saved its state.
      step: number of optimizer steps done.
      metrics: values of the last evaluation: eval/raw_top1, eval/ema_top1, … in percent.
    """

    finished: bool
    step: int
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ProfileWindow:
    """The steps whose trace is written to the workdir.

    Attributes:
      start: first step.
      steps: number of steps.
    """

    start: int
    steps: int


def train(
    config: Config, workdir: str | pathlib.Path, *, profile: ProfileWindow | None = None
) -> TrainResult:
    """Trains as the settings say, or resumes the workdir's run after its last checkpoint.

    Args:
      config: settings, from `tlvit.config.resolve`.
      workdir: folder for config.json, classes.txt (class names, one a line), checkpoints/, metrics.jsonl and
        TensorBoard events.
      profile: steps to trace with the JAX profiler.

    Raises:
      ValueError: the settings do not fit the model, the data or the workdir.
      FloatingPointError: a loss or weight is not finite. The last checkpoint is from before.
    """
    # Checks that need no data.
    workdir = pathlib.Path(workdir)
    mesh = make_mesh(data=config.mesh.data)
    local_batch_size(config.batch_size, mesh, parts=config.optim.accumulate)
    local_batch_size(config.eval_batch_size, mesh)
    checks.check_model(config, _abstract_net(config))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    if checkpoints.steps():
        checks.check_workdir(workdir, config)

    # Data, model and state.
    data = run_data.open_data(config)
    info = run_data.model_info(config, data.train)
    net, shapes, _ = abstract_model(info.build)
    steps_per_epoch = run_data.steps_per_epoch(data, config)
    total_steps = config.total_epochs * steps_per_epoch
    schedule = optimizer.make_schedule(
        config.optim, epochs=config.epochs, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size
    )
    tx = optimizer.make_optimizer(
        shapes,
        name=config.optim.name,
        learning_rate=schedule,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
    )
    teacher = load_teacher(config, info, mesh) if config.distill.teacher else None
    state = initial_state(config, info, tx, mesh, checkpoints)
    first_step = int(state.step)
    _write_records(workdir, config, info)
    print_summary(config, data, mesh, net, state, total_steps)
    for text in run_warnings(config, data.train.num_examples, steps_per_epoch):
        log.warning("warning: %s", text)
    log.info("curves: tensorboard --logdir=%s", workdir)

    # The compiled programs and the stream of batches, which starts at this run's first step.
    train_step = make_train_step(net, tx, mesh, config, info, teacher=teacher)
    eval_step = make_eval_step(net, mesh, info.preprocessing)
    batches = Prefetch(run_data.train_batches(data, config, first_step), mesh)
    eval_batches = lambda: Prefetch(run_data.eval_batches(data, config, info), mesh)

    # The loop.
    metrics_file = run_log.MetricsFile(workdir, first_step)
    progress = run_log.Progress(first_step, total_steps, steps_per_epoch, config.batch_size)
    trace = _profiler(workdir, profile)
    result: dict[str, float] = {}
    if first_step < total_steps:
        log.info("compiling the training step: minutes for a large model")
    with StopRequest() as stop:
        for step in range(first_step + 1, total_steps + 1):
            batch = next(batches)
            trace(step)
            with jax.transfer_guard("disallow"):  # a step moves nothing; Prefetch moved the batch
                state, metrics = train_step(state, batch)
            progress.add(metrics)
            if step == first_step + 1:
                batches.wait_s = 0.0  # filling the shuffle buffer belongs to the start
            last = step == total_steps
            evaluating = last or _due(step, config.eval.every_epochs, steps_per_epoch)
            saving = last or _due(step, config.checkpoint.every_epochs, steps_per_epoch)
            stopping = not last and _asked_to_stop(stop, checkpoints, step)
            if step % config.log_every == 0 or evaluating or saving or stopping:
                line = progress.flush(step, lr=float(schedule(step - 1)), wait_s=batches.wait_s)
                batches.wait_s = 0.0
                metrics_file.write(step, line)
            if evaluating and not stopping:
                try:
                    result = _evaluate_weights(eval_step, state, eval_batches)
                except Exception:  # for example a corrupt image or no memory: keep the epoch
                    checkpoints.save(state, extra=info.to_json())
                    checkpoints.close()
                    raise
                metrics_file.write(step, result)
                info = dataclasses.replace(info, best_weights=_best_weights(result))
                progress.restart()
            if saving or stopping:
                _check_weights(eval_step, state, batch)
                score = _score(result) if evaluating and not stopping else None
                checkpoints.save(state, score=score, extra=info.to_json())
                progress.restart()
            if stopping:
                break

    # The end.
    if first_step >= total_steps:
        log.info("this run is complete: %d of %d steps", first_step, total_steps)
        result = _evaluate_weights(eval_step, state, eval_batches)
    checkpoints.close()
    metrics_file.close()
    finished = int(state.step) >= total_steps
    if not finished:
        log.info("stopped at step %d and saved: the same command resumes", state.step)
    return TrainResult(finished=finished, step=int(state.step), metrics=result)


def _abstract_net(config: Config) -> Any:
    """The model's computation, before the number of classes is known."""
    info = ModelInfo(
        config.model.name, 10, config.image_size, {"dtype": config.model.dtype, **config.model.options}
    )
    return functionalize(nnx.eval_shape(info.build))[0]


def _write_records(workdir: pathlib.Path, config: Config, info: ModelInfo) -> None:
    """Writes config.json and classes.txt."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        run_log.atomic_write_text(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
        if info.class_names:
            write_class_names(str(workdir / "classes.txt"), info.class_names)


def _profiler(workdir: pathlib.Path, window: ProfileWindow | None) -> Callable[[int], Any]:
    """Starts and stops a trace when it is called with each step."""
    if window is None:
        return lambda step: None
    from clu import periodic_actions  # imports TensorFlow

    log.info("tracing steps %d to %d", window.start, window.start + window.steps - 1)
    return periodic_actions.Profile(
        logdir=workdir,
        num_profile_steps=window.steps,
        profile_duration_ms=None,
        first_profile=window.start,
        every_secs=None,
    )


def _due(step: int, every_epochs: int, steps_per_epoch: int) -> bool:
    return every_epochs > 0 and step % (every_epochs * steps_per_epoch) == 0


def _asked_to_stop(stop: StopRequest, checkpoints: Checkpoints, step: int) -> bool:
    """Several processes agree on the step through JAX's preemption notice."""
    return checkpoints.preempted(step) if jax.process_count() > 1 else stop.requested


def _evaluate_weights(
    eval_step: Callable, state: TrainState, batches: Callable[[], Iterable[Batch]]
) -> dict[str, float]:
    """Accuracy of the raw weights and of their moving average."""
    weights = {"raw": {"params": state.params, "stats": state.stats}}
    if state.ema is not None:
        weights["ema"] = state.ema
    found = evaluate(eval_step, weights, batches())
    result = {f"eval/{name}_{k}": v for name, sums in found.items() for k, v in sums.items() if k != "count"}
    result["eval/images"] = found["raw"]["count"]
    parts = [f"{name} top-1 {found[name]['top1']:.2f}% top-5 {found[name]['top5']:.2f}%" for name in weights]
    log.info("step %d  evaluation on %d images: %s", state.step, result["eval/images"], ", ".join(parts))
    return result


def _best_weights(result: dict[str, float]) -> str:
    """Which weights have the higher top-1 accuracy; the average in a tie."""
    return "ema" if result.get("eval/ema_top1", -1.0) >= result["eval/raw_top1"] else "raw"


def _score(result: dict[str, float]) -> float:
    """The top-1 accuracy by which the best checkpoint is chosen: that of its best weights."""
    return result[f"eval/{_best_weights(result)}_top1"]


def _check_weights(eval_step: Callable, state: TrainState, batch: Batch) -> None:
    """Evaluates the weights before they are saved: the loss of a step is from before its update.

    Raises:
      FloatingPointError: their loss is not finite.
    """
    loss = float(eval_step(state.params, state.stats, batch)["loss"])
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The weights after step {int(state.step)} give a loss of {loss}: stopped without saving. The "
            "last checkpoint is from before. Try a lower config.optim.learning_rate or "
            "config.optim.clip_norm=1.0."
        )
