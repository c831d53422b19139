"""`Checkpoints` writes and restores the training state of a run, through Orbax."""

import contextlib
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from tlvit.checkpoints.fit import check_same_shapes
from tlvit.checkpoints.native.checksums import check_files, write_checksums
from tlvit.checkpoints.native.step_folders import (
    INCOMPLETE,
    NO_SCORE,
    complete_steps,
    read_record,
    read_score,
    remove_incomplete,
    replace_records,
)
from tlvit.checkpoints.trees import flatten_state, unflatten_state
from tlvit.error_text import brief
from tlvit.files import absolute_path, as_path, is_local
from tlvit.types import PyTree

log = logging.getLogger("tlvit")
# Orbax logs routine messages as warnings, and every error with its traceback before it raises it.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of a run. They are written atomically, in the background.

    Its `with` block waits at the end until everything is written, except after an interrupt (Ctrl-C).

    Args:
      folder: of the checkpoints; created if missing. Incomplete checkpoints are removed from it, so it must
        belong to this run.
      keep: number of latest checkpoints to keep, in addition to the best one.

    Raises:
      OSError: the folder cannot be created or read.
      ImportError: the folder is in gs:// and google-cloud-storage, which Orbax uses there, is missing.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 3):
        self.folder, self._keep = absolute_path(folder), keep
        if not is_local(self.folder):
            _check_bucket_client()
        if jax.process_index() == 0:
            remove_incomplete(self.folder)
        keep_best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        self._manager = _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=_score,
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), keep_best]),
                async_options=ocp.AsyncOptions(
                    # If a folder cannot be made in the background, Orbax's threads wait 300 s for it.
                    create_directories_asynchronously=False,
                    post_finalization_callback=self._write_checksums,
                ),
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, Exception):
            try:
                self.close()
            except OSError as error:  # the first error is raised
                log.error("%s", error)

    def steps(self) -> list[int]:
        """Returns the steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step with the highest score, the later one of a tie; None if no step has a score."""
        scores = {step: _score(self._manager.metrics(step)) for step in self.steps()}
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        return best if best is not None and scores[best] >= 0 else None

    def save(
        self, state: PyTree, *, score: float | None = None, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Starts to write the state. Later changes or donation of the state do not affect what is written.

        A step that has a checkpoint already is not saved again.

        Args:
          state: a TrainState.
          score: of an evaluation at this step, at least 0, higher is better; None if there was none.
          extra: JSON record to store with the state, usually `ModelInfo.to_json()`.

        Raises:
          OSError: this checkpoint or the one before cannot be written. Earlier ones are complete.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(flatten_state(state)), extra=ocp.args.JsonSave(dict(extra or {}))
        )
        with self._writing():
            self._manager.save(
                step, args=items, metrics={"score": NO_SCORE if score is None else float(score)}
            )

    def rate(self, step: int, *, score: float, extra: Mapping[str, Any]) -> None:
        """Replaces the score and the JSON record of a saved step. Waits until it is written.

        Raises:
          OSError: the step or its record cannot be written.
        """
        self.wait()
        with self._writing():
            if jax.process_index() == 0:
                replace_records(self.folder / str(step), score=score, extra=extra)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("records replaced")
            self._manager.reload()
            for surplus in {*self.steps()[: -self._keep]} - {self.best_step()}:
                self._manager.delete(surplus)

    def check(self) -> None:
        """Raises OSError if a checkpoint could not be written in the background. Waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record that was saved with a step.

        Raises:
          OSError: it cannot be read.
          ValueError: it is damaged.
        """
        return read_record(self.folder / str(step))

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
        """Waits until everything is written.

        Raises:
          OSError: a checkpoint cannot be written. Earlier ones are complete.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written and frees the background threads.

        Raises:
          OSError: a checkpoint cannot be written. Earlier ones are complete.
        """
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns every exception into an OSError that says what is kept."""
        try:
            yield
        except Exception as error:
            steps = complete_steps(self.folder)
            kept = f"The checkpoint of step {steps[-1]} is complete." if steps else "There is none yet."
            raise OSError(
                f"A checkpoint cannot be written to {self.folder}: {_reason(error)}. {kept}"
            ) from error

    def _write_checksums(self) -> None:
        """Orbax calls this in its thread on process 0, before it renames a checkpoint that is written.

        A bucket renames nothing, and keeps checksums itself.
        """
        if not is_local(self.folder):
            return
        [folder] = self.folder.glob(INCOMPLETE)
        write_checksums(folder)

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
            folder = self.folder / str(step)
            names = [f"{step}.unreadable", *(f"{step}.unreadable-{i}" for i in range(2, 100))]
            if jax.process_index() == 0:
                free = next(name for name in names if not folder.with_name(name).exists())
                folder.rename(folder.with_name(free))
        if steps and jax.process_count() > 1:
            multihost_utils.sync_global_devices("unreadable checkpoints renamed")
        if steps:
            self._manager.reload()

    def _metadata(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of the saved arrays, if their files are not damaged."""
        if jax.process_index() == 0:
            check_files(self.folder / str(step), ("state/", "extra/"))
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise FileNotFoundError("its array metadata are missing")
        return {k: tuple(v.shape) for k, v in saved.items()}


class _Manager(ocp.CheckpointManager):
    """Orbax's manager. A damaged score is an unknown one, where Orbax raises JSONDecodeError."""

    def metrics(self, step: int) -> dict[str, float]:
        return {"score": read_score(as_path(self.directory) / str(step))}


def _check_bucket_client() -> None:
    """Raises ImportError without the package that Orbax lists and deletes checkpoints in a bucket with."""
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError as error:
        raise ImportError(f'Checkpoints in gs:// need "tlvit[gcs]" (google-cloud-storage): {error}') from None


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what was read, ""), or (None, reason) if any process failed: all resume from the same checkpoint."""
    found, problem = None, ""
    try:
        found = read()
    except Exception as error:
        problem = brief(error)
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(problem))).any():
        problem = problem or "another process cannot read it"
    return found, problem


def _score(metrics: Mapping[str, float] | None) -> float:
    return float((metrics or {}).get("score", NO_SCORE))


def _reason(error: BaseException) -> str:
    """What the operating system said, also inside of a message of TensorStore; else the error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r"([A-Z][^:\[\]]*) \[os_error_code", str(error))
    return found[1] if found else brief(error)
