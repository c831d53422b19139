"""The training loop of every recipe, from setup to the last checkpoint."""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import Checkpoints
from tlvit.checkpoints.native.step_folders import complete_steps
from tlvit.class_names import write_class_names
from tlvit.config import Checkpoint as CheckpointSettings
from tlvit.config import Config, Eval, to_dict
from tlvit.files import as_path, is_local, write_text
from tlvit.host_memory import keep_freed_memory, release_freed_memory
from tlvit.models.functional import functionalize
from tlvit.training import checks, optimizer, run_data, run_log
from tlvit.training.evaluation import best_score, best_weights, evaluate_state
from tlvit.training.initialize import initial_state, take_options
from tlvit.training.mesh import local_batch_size, make_mesh
from tlvit.training.prefetch import Prefetch
from tlvit.training.run_summary import print_summary
from tlvit.training.run_warnings import run_warnings
from tlvit.training.state import TrainState, abstract_model
from tlvit.training.step import first_part, make_eval_step, make_train_step
from tlvit.training.stop_request import Stopped, StopRequest, StopWatched
from tlvit.training.tasks import TASKS
from tlvit.training.teacher import load_step_teacher
from tlvit.training.workdir import lock_workdir, make_workdir
from tlvit.types import Batch

log = logging.getLogger("tlvit")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      finished: False if the run was asked to stop (Ctrl-C, SIGTERM) and saved its state.
      step: number of optimizer steps done.
      metrics: values of the last evaluation: eval/raw_top1, eval/ema_top1, … in percent; in segmentation
        eval/raw_miou, eval/ema_miou, …
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
    config: Config,
    workdir: str | pathlib.Path,
    *,
    profile: ProfileWindow | None = None,
    writers: Sequence[run_log.MetricWriter] = (),
) -> TrainResult:
    """Trains as the settings say, or resumes the workdir's run after its last checkpoint.

    Args:
      config: settings, from `tlvit.config.resolve`.
      workdir: folder for config.json, classes.txt (class names, one a line), checkpoints/, metrics.jsonl and
        TensorBoard events.
      profile: steps to trace with the JAX profiler.
      writers: where the metrics also go, for example an experiment tracker.

    Raises:
      ValueError: the settings do not fit the model, the data or the workdir, or another run has the workdir.
      FloatingPointError: a loss or weight is not finite. The last checkpoint is from before.
      OSError: an image cannot be read, or a file of the workdir cannot be written.
      Stopped: Ctrl-C or SIGTERM before the first step is done, or a second Ctrl-C.
    """
    workdir = as_path(workdir)
    if profile is not None and not is_local(workdir):
        raise ValueError(f"--profile writes local files, but the workdir is {workdir}. Use a local one.")
    keep_freed_memory(config.batch_size, config.image_size)
    with StopRequest(interrupts=True) as stop:
        try:
            with contextlib.ExitStack() as stack:
                return _train(config, workdir, profile, writers, stop, stack)
        except KeyboardInterrupt as signal:
            raise Stopped(f"stopped by {signal or 'Ctrl-C'}. {_what_is_kept(workdir)}") from None


def _train(
    config: Config,
    workdir: pathlib.Path,
    profile: ProfileWindow | None,
    writers: Sequence[run_log.MetricWriter],
    stop: StopRequest,
    stack: contextlib.ExitStack,
) -> TrainResult:
    # Checks that need no data.
    config = take_options(config, workdir)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, model=config.mesh.model)
    mixed = checks.mixes_images(config)
    local_batch_size(config.batch_size, mesh, parts=config.optim.accumulate, mixed=mixed)
    local_batch_size(config.eval_batch_size, mesh)
    checks.check_model(config, _abstract_net(config))
    checks.check_heads(config, mesh.shape.get("model", 1))
    make_workdir(workdir)
    stack.enter_context(lock_workdir(workdir))
    checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep))
    if checkpoints.steps():
        checks.check_workdir(workdir, config, _saved_settings(checkpoints))

    # Data, model and state.
    task = TASKS[config.task]
    data = run_data.open_data(config)
    info = run_data.model_info(config, data.train)
    net, shapes, _ = abstract_model(info.build)
    steps_per_epoch = run_data.steps_per_epoch(data, config)
    total_steps = config.total_steps(steps_per_epoch)
    tx, schedule = optimizer.run_optimizer(
        config.optim,
        shapes,
        epochs=config.schedule_epochs(steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        batch_size=config.batch_size,
    )
    teacher = load_step_teacher(config, info, mesh)
    state = initial_state(config, info, tx, mesh, checkpoints)
    first_step = int(state.step)
    evaluation_due = first_step > 0 and _run_record(checkpoints, first_step).get("evaluation_due", False)
    _write_records(workdir, config, info)
    print_summary(config, data, mesh, net, state, total_steps, teacher)
    if jax.process_count() > 1:
        seconds = config.mesh.heartbeat_timeout
        log.info("If a process is lost, JAX ends the others after %d s (mesh.heartbeat_timeout).", seconds)
    for text in run_warnings(config, data.train.num_examples, steps_per_epoch):
        log.warning("warning: %s", text)
    log.info("curves: tensorboard --logdir=%s", workdir)
    if config.ema.decay > 0:
        log.info("evaluations: of the weights as trained (raw) and of their moving average (ema)")

    # The compiled programs and the stream of batches, which starts at this run's first step.
    train_step = make_train_step(net, tx, mesh, config, info, teacher=teacher)
    eval_step = make_eval_step(net, mesh, info.preprocessing, config.segmentation)
    batches = Prefetch(run_data.train_batches(data, config, first_step, mesh), mesh)
    eval_batches = lambda: stop.watch(Prefetch(task.eval_batches(data.eval, config, info, mesh), mesh))
    metrics_file = stack.enter_context(
        run_log.MetricsFile(workdir, first_step, evaluate_again=evaluation_due, writers=writers)
    )

    def record(*, evaluation_due: bool) -> dict[str, Any]:
        return {**info.to_json(), "run": {"config": to_dict(config), "evaluation_due": evaluation_due}}

    def evaluate_and_record(*, saved: bool) -> dict[str, float]:
        nonlocal info
        values = evaluate_state(eval_step, state, eval_batches(), task)
        metrics_file.write(int(state.step), values)
        info = dataclasses.replace(info, best_weights=best_weights(values, task.score))
        if saved:
            extra = record(evaluation_due=False)
            checkpoints.rate(int(state.step), score=best_score(values, task.score), extra=extra)
        return values

    # The loop.
    trace = _profiler(workdir, profile)
    result: dict[str, float] = {}
    batch: Batch | None = None
    evaluated = True
    if evaluation_due:
        log.info("the evaluation of step %d was not finished", first_step)
        result = evaluate_and_record(saved=True)
    progress = run_log.Progress(first_step, total_steps, steps_per_epoch, config.batch_size)
    if first_step < total_steps:
        log.info("compiling the training step: minutes for a large model")
    for step in range(first_step + 1, total_steps + 1):
        try:
            batch = next(batches)
        except Exception:  # for example a lost disk: keep the steps that are done
            if batch is not None and jax.process_count() == 1:  # processes save together
                _check_weights(eval_step, state, first_part(batch, config.optim.accumulate, mesh))
                checkpoints.save(state, extra=record(evaluation_due=False))
            raise
        trace(step)
        with jax.transfer_guard("disallow"):  # a step moves nothing; Prefetch moved the batch
            state, metrics = train_step(state, batch)
        stop.defer()  # now there is something to save
        progress.add(metrics)
        checkpoints.check()
        if step == first_step + 1:
            batches.wait_s = 0.0  # filling the shuffle buffer belongs to the start
        last = step == total_steps
        evaluating = last or _due(step, config.eval, steps_per_epoch)
        saving = last or _due(step, config.checkpoint, steps_per_epoch)
        stopping = not last and _asked_to_stop(stop, checkpoints, step)
        if step % config.log_every == 0 or evaluating or saving or stopping:
            line = progress.flush(step, lr=float(schedule(step - 1)), wait_s=batches.wait_s)
            batches.wait_s = 0.0
            metrics_file.write(step, line)
        if saving or stopping:
            _check_weights(eval_step, state, first_part(batch, config.optim.accumulate, mesh))
            checkpoints.save(state, extra=record(evaluation_due=evaluating))
        if evaluating and not stopping:
            try:
                result = evaluate_and_record(saved=saving)
            except Exception as error:  # for example a corrupt image or no memory: keep the epoch
                if saving or jax.process_count() == 1:
                    checkpoints.save(state, extra=record(evaluation_due=True))
                if not isinstance(error, StopWatched):
                    raise
                stopping, evaluated = True, False
        if saving or evaluating or stopping:
            release_freed_memory()
            progress.restart()
        if stopping:
            break

    # The end.
    if first_step >= total_steps:
        log.info("this run is complete: %d of %d steps", first_step, total_steps)
        result = result or evaluate_state(eval_step, state, eval_batches(), task)
    checkpoints.wait()
    finished = int(state.step) >= total_steps and evaluated
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
        write_text(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
        if info.class_names:
            write_class_names(workdir / "classes.txt", info.class_names)


def _what_is_kept(workdir: pathlib.Path) -> str:
    steps = complete_steps(workdir / "checkpoints")
    if not steps:
        return "There is no checkpoint yet: the same command starts again."
    return f"The checkpoint of step {steps[-1]} is complete: the same command resumes from it."


def _run_record(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """What a checkpoint records of its run: config, evaluation_due. Empty in checkpoints of version 0.1."""
    run = checkpoints.record(step).get("run")
    return run if isinstance(run, dict) else {}


def _saved_settings(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The settings that the last readable checkpoint was saved with; None if that is not recorded."""
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(OSError, ValueError):  # restoring it reports the damage
            return _run_record(checkpoints, step).get("config")
    return None


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


def _due(step: int, settings: Eval | CheckpointSettings, steps_per_epoch: int) -> bool:
    """Whether an evaluation or a checkpoint is due after a step."""
    interval = settings.every_steps or settings.every_epochs * steps_per_epoch
    return interval > 0 and step % interval == 0


def _asked_to_stop(stop: StopRequest, checkpoints: Checkpoints, step: int) -> bool:
    """Several processes agree on the step through JAX's preemption notice."""
    return checkpoints.preempted(step) if jax.process_count() > 1 else stop.requested


def _check_weights(eval_step: Callable, state: TrainState, batch: Batch) -> None:
    """Evaluates the weights before they are saved: the loss of a step is from before its update.

    Args:
      eval_step: from `make_eval_step`.
      state: the new state.
      batch: as many images as the step computes at once, because more may not fit in the devices' memory.

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
