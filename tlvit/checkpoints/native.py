"""Reads and writes tlvit's own checkpoints. This is the only file that uses Orbax.

`checkpoints/` in a workdir has a folder for each saved step, with the training state and a JSON record.
A model folder has the arrays of one model and its ModelInfo.
"""

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from tlvit.checkpoints.fit import check_same_shapes
from tlvit.checkpoints.model_info import ModelInfo, check_weights
from tlvit.checkpoints.trees import flatten, flatten_state, unflatten, unflatten_state
from tlvit.models.functional import functionalize
from tlvit.types import PyTree

log = logging.getLogger("tlvit")
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs routine messages as warnings


class Checkpoints:
    """The checkpoints of a run. They are written atomically, in the background.

    Args:
      folder: of the checkpoints; created if missing.
      keep: number of latest checkpoints to keep, in addition to the best one.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 3):
        keep_best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            pathlib.Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_score,
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), keep_best]),
                enable_async_checkpointing=True,
            ),
            item_handlers=_handlers(),
        )

    def steps(self) -> list[int]:
        """Returns the steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step with the highest score, the later one of a tie; None if no step has a score."""
        scored = [s for s in self.steps() if _score(self._manager.metrics(s)) >= 0]
        return _best_step(self._manager, scored) if scored else None

    def save(
        self, state: PyTree, *, score: float | None = None, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Starts to write the state. Later changes or donation of the state do not affect what is written.

        A step that has a checkpoint already is not saved again.

        Args:
          state: a TrainState.
          score: of an evaluation at this step, at least 0, higher is better; None if there was none.
          extra: JSON record to store with the state, usually `ModelInfo.to_json()`.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(flatten_state(state)), extra=ocp.args.JsonSave(dict(extra or {}))
            ),
            metrics={"score": -1.0 if score is None else float(score)},
        )

    def restore(self, target: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]] | None:
        """Reads the last readable checkpoint, or that of `step`.

        A checkpoint that a process cannot read is reported and skipped in all processes. Skipped checkpoints
        are renamed if an earlier one can be read.

        Args:
          target: a TrainState of the run, or its shapes with shardings. Arrays are placed accordingly.
          step: the step to restore. Default: the last one.

        Returns:
          (state, extra), or None if there is no checkpoint.

        Raises:
          ValueError: the checkpoint belongs to another model or optimizer, or no checkpoint can be read.
        """
        steps = self.steps() if step is None else [step]
        struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        shapes = {path: struct(x) for path, x in flatten_state(target).items()}
        problem = ""
        for candidate in reversed(steps):
            restored, problem = self._restore_step(candidate, shapes)
            if not problem:
                self._set_aside([s for s in steps if s > candidate])
                return unflatten_state(target, restored["state"]), dict(restored["extra"])
            log.warning("checkpoint of step %d cannot be read and is skipped: %s", candidate, problem)
        if steps:
            raise ValueError(f"None of the checkpoints of steps {steps} can be read: {problem}")
        return None

    def preempted(self, step: int) -> bool:
        """Whether the cluster announced the end of this job. All processes agree on the step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written and frees the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _restore_step(self, step: int, shapes: Mapping[str, Any]) -> tuple[Any, str]:
        """(arrays and JSON record of a step, ""), or (None, reason why it cannot be read)."""
        found, problem = _attempt(lambda: self._metadata(step))
        if problem:
            return None, problem
        wanted = {k: tuple(x.shape) for k, x in shapes.items()}
        check_same_shapes(wanted, found, f"The checkpoint of step {step}")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), extra=ocp.args.JsonRestore())
        return _attempt(lambda: self._manager.restore(step, args=items))

    def _set_aside(self, steps: list[int]) -> None:
        """Renames unreadable checkpoints, so that the run can save these steps again."""
        for step in steps:
            folder = self._manager.directory / str(step)
            names = [f"{step}.unreadable", *(f"{step}.unreadable-{i}" for i in range(2, 100))]
            if jax.process_index() == 0:
                free = next(name for name in names if not folder.with_name(name).exists())
                folder.rename(folder.with_name(free))
        if steps and jax.process_count() > 1:
            multihost_utils.sync_global_devices("unreadable checkpoints renamed")
        if steps:
            self._manager.reload()

    def _metadata(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of the saved arrays."""
        return {k: tuple(v.shape) for k, v in _array_metadata(self._manager, step).items()}


def restore_for_inference(
    workdir: str | pathlib.Path, *, weights: str = "auto", step: int | None = None
) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Reads the weights of a run onto the default device, without the state of the optimizer.

    Args:
      workdir: folder of the run.
      weights: "ema", "raw", or "auto" for those that scored best. If that is not recorded, "auto" takes EMA
        weights if there are any.
      step: the step to read. Default: the step with the best score; the last one in a run without scores.

    Returns:
      (params, stats, extra): the JSON record of the step, with "step" and "weights" ("ema" or "raw") added.

    Raises:
      ValueError: no such checkpoint, one that cannot be read, or one without EMA weights for weights="ema".
    """
    check_weights(weights)
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    manager = None
    if folder.is_dir():
        options = ocp.CheckpointManagerOptions(best_fn=_score, create=False, read_only=True)
        manager = ocp.CheckpointManager(folder, item_handlers=_handlers(), options=options)
    steps = [] if manager is None else sorted(manager.all_steps())
    if manager is None or not steps or step not in (None, *steps):
        wanted = "" if step is None else f" of step {step} (found: {steps})"
        raise ValueError(f"{workdir} has no checkpoint{wanted}.")
    step = _best_step(manager, steps) if step is None else step
    what = f"The checkpoint of step {step} in {workdir}"
    with _reading(what):
        extra = manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
        saved = _array_metadata(manager, step)
    has_average = any(path.startswith("ema/") for path in saved)
    if weights == "auto":
        weights = extra.get("best_weights") or ("ema" if has_average else "raw")
    if weights == "ema" and not has_average:
        raise ValueError(f"{what} has no EMA weights; weights='raw' takes the raw ones.")
    prefix = "ema/" if weights == "ema" else ""
    wanted = {k: v for k, v in saved.items() if k.startswith((f"{prefix}params/", f"{prefix}stats/"))}
    with _reading(what), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        target = _on_default_device(wanted)
        placement = ocp.checkpoint_utils.construct_restore_args(target)
        part = ocp.args.PyTreeRestore(target, restore_args=placement, partial_restore=True)
        arrays = reader.restore(folder / str(step) / "state", args=part)
    tree = unflatten({k.removeprefix(prefix): v for k, v in arrays.items()})
    return tree["params"], tree.get("stats", {}), {**extra, "step": step, "weights": weights}


def save_model_folder(path: str | pathlib.Path, model: nnx.Module, info: ModelInfo) -> None:
    """Writes a model folder, which `load` opens.

    Raises:
      ValueError: the folder exists and is not empty.
    """
    path = pathlib.Path(path).absolute()
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if path.exists():
        raise ValueError(f"{path} exists already; choose another folder or remove it.")
    _, params, stats = functionalize(model)
    items = ocp.args.Composite(
        model=ocp.args.StandardSave({"params": params, "stats": stats}),
        info=ocp.args.JsonSave(info.to_json()),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(path, args=items)


def load_model(path: str | pathlib.Path) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Reads a model folder onto the default device.

    Returns:
      (params, stats, record), where `ModelInfo.from_json` reads the record.

    Raises:
      ValueError: the folder is not a complete model folder.
    """
    path = pathlib.Path(path).absolute()
    if not (path / "model").is_dir() or not (path / "info").is_dir():
        raise ValueError(f"{path} is not a tlvit model folder (model/ and info/ expected).")
    with _reading(f"The model folder {path}"):
        with ocp.StandardCheckpointer() as reader:
            target = _on_default_device(flatten(reader.metadata(path / "model").item_metadata))
            model = reader.restore(path / "model", {"stats": {}, **unflatten(target)})
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            record = reader.restore(path, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]
    return model["params"], model["stats"], dict(record)


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns every exception into a ValueError: Orbax has no common one for a folder with missing parts."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {_brief(error)}") from error


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what was read, ""), or (None, reason) if any process failed: all resume from the same checkpoint."""
    found, problem = None, ""
    try:
        found = read()
    except Exception as error:
        problem = _brief(error)
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(problem))).any():
        problem = problem or "another process cannot read it"
    return found, problem


def _score(metrics: Mapping[str, float] | None) -> float:
    return float((metrics or {}).get("score", -1.0))  # -1: the step was not evaluated


def _best_step(manager: ocp.CheckpointManager, steps: list[int]) -> int:
    return max(steps, key=lambda s: (_score(manager.metrics(s)), s))


def _handlers() -> dict[str, Any]:
    return {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}


def _array_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    saved = manager.item_metadata(step)["state"]
    if saved is None:
        raise FileNotFoundError("its array metadata are missing")
    return dict(saved.items())


def _on_default_device(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Restore targets on one device, so that a checkpoint of eight devices opens on a laptop."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in arrays.items()}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
