"""Checkpoints on disk: the one file that knows Orbax.

A run's folder `checkpoints/` holds one folder a saved step: the whole PyTree and a small JSON beside it.
A model folder (`save_model`) holds only parameters, statistics and what is needed to build the model again.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from tlvit.types import PyTree

log = logging.getLogger("tlvit")
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax announces its ordinary doings as warnings


class Checkpoints:
    """The checkpoints of a run: written in the background, whole or not at all; the last `keep` and the best
    one stay.

    Args:
      folder: where they lie; made if missing.
      keep: how many of the latest to keep beside the best.
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
        """Steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest score; None without any."""
        scored = [s for s in self.steps() if _score(self._manager.metrics(s) or {}) >= 0]
        return max(scored, key=lambda s: (_score(self._manager.metrics(s)), s)) if scored else None

    def save(
        self, state: PyTree, *, score: float | None = None, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Starts writing the state as of now; the state may be donated to the next step at once.

        Args:
          state: as on the devices.
          score: of an evaluation at this step, higher is better; None if there was none.
          extra: JSON beside it.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flatten(state)), extra=ocp.args.JsonSave(dict(extra or {}))
            ),
            metrics={"score": -1.0 if score is None else float(score)},
        )

    def restore(self, target: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]] | None:
        """The state of `step`, or of the last whole checkpoint: one that any process cannot read is reported,
        renamed and the one before it taken.

        Args:
          target: a state of the run (or its shapes with shardings), which says where the arrays go.
          step: a certain one.

        Returns:
          (state, extra), or None if there is no checkpoint.

        Raises:
          ValueError: checkpoints of another model, named by the first arrays that differ; or none of them can
            be read.
        """
        steps = self.steps() if step is None else [step]
        shapes = {k: _shape(v) for k, v in _flatten(target).items()}
        arguments = {"state": ocp.args.StandardRestore(shapes), "extra": ocp.args.JsonRestore()}
        failure = ""
        for candidate in reversed(steps):
            found, problem = _attempt(lambda step=candidate: self._metadata(step))
            if not problem:
                _check_same(shapes, found, candidate)
                read = lambda step=candidate: self._manager.restore(
                    step, args=ocp.args.Composite(**arguments)
                )
                restored, problem = _attempt(read)
            if not problem:
                self._set_aside([s for s in steps if s > candidate])
                return _unflatten(target, restored["state"]), dict(restored["extra"])
            failure = problem
            log.warning("checkpoint of step %d cannot be read and is passed over: %s", candidate, failure)
        if steps:
            raise ValueError(f"None of the checkpoints of steps {steps} can be read: {failure}")
        return None

    def preempted(self, step: int) -> bool:
        """Whether the cluster announced the end of this job; all processes agree on the step
        (jax.distributed)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()

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
        tree = self._manager.item_metadata(step)["state"]
        if tree is None:
            raise FileNotFoundError("its array metadata are missing")
        return {k: tuple(v.shape) for k, v in tree.items()}


def save_model(path: str | pathlib.Path, params: PyTree, stats: PyTree, info: Mapping[str, Any]) -> None:
    """Writes a model folder: arrays and a JSON `info` that says how to build it (name, options,
    preprocessing).

    Raises:
      ValueError: the folder exists already.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists already; choose another folder or remove it.")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        arrays = {"params": params, "stats": stats}
        writer.save(
            path,
            args=ocp.args.Composite(model=ocp.args.StandardSave(arrays), info=ocp.args.JsonSave(dict(info))),
        )


def load_model(path: str | pathlib.Path) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Reads a model folder onto the default device, whatever devices wrote it.

    Returns:
      (params, stats, info).

    Raises:
      ValueError: the folder is no whole model folder.
    """
    path = pathlib.Path(path).absolute()
    if not (path / "model").is_dir() or not (path / "info").is_dir():
        raise ValueError(f"{path} is no tlvit model folder (model/ and info/ expected).")
    try:
        with ocp.StandardCheckpointer() as reader:
            target = _on_default_device(reader.metadata(path / "model").item_metadata)
            model = reader.restore(path / "model", target)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            info = reader.restore(path, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a tlvit model folder: {_brief(error)}") from error
    return model["params"], model.get("stats") or {}, dict(info)


def restore_for_inference(
    workdir: str | pathlib.Path, *, ema: bool = True, step: int | None = None
) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Weights of a run on the default device, read without building the optimizer's state.

    Args:
      workdir: of the run.
      ema: the moving average, where the run kept one; else the raw weights.
      step: a certain one; the best evaluated one (or the last) by default.

    Returns:
      (params, stats, extra): `extra` is the JSON that the run saved with each checkpoint.

    Raises:
      ValueError: no checkpoint, or none readable.
    """
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    manager = None
    if folder.is_dir():
        options = ocp.CheckpointManagerOptions(best_fn=_score, create=False, read_only=True)
        manager = ocp.CheckpointManager(folder, item_handlers=_handlers(), options=options)
    steps = sorted(manager.all_steps()) if manager else []
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"{workdir} has no checkpoint{'' if step is None else f' of step {step} (found: {steps})'}."
        )
    if step is None:
        step = max(steps, key=lambda s: (_score(manager.metrics(s) or {}), s))
    try:
        shapes = manager.item_metadata(step)["state"]
        average = ema and any(k.startswith("ema/") for k in shapes)
        prefix = "ema/" if average else ""
        wanted = {k: v for k, v in shapes.items() if k.startswith((f"{prefix}params/", f"{prefix}stats/"))}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            target = _on_default_device(wanted)
            where = ocp.checkpoint_utils.construct_restore_args(target)
            part = ocp.args.PyTreeRestore(target, restore_args=where, partial_restore=True)
            arrays = reader.restore(folder / str(step) / "state", args=part)
        extra = manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
    except Exception as error:
        raise ValueError(
            f"The checkpoint of step {step} in {workdir} cannot be read: {_brief(error)}"
        ) from error
    tree = _nest({k.removeprefix(prefix): v for k, v in arrays.items()})
    return tree["params"], tree.get("stats", {}), {**extra, "step": step, "ema": average}


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what was read, ""), or (None, what went wrong) if it did in this process or in another: all of them
    must go on from one checkpoint."""
    found, problem = None, ""
    try:
        found = read()
    except Exception as error:  # Orbax has no one exception for a folder with parts missing
        problem = _brief(error)
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(problem))).any():
        problem = problem or "another process cannot read it"
    return found, problem


def _score(metrics: Mapping[str, float]) -> float:
    return float(metrics.get("score", -1.0))


def _handlers() -> dict[str, Any]:
    return {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}


def _flatten(state: PyTree) -> dict[str, Any]:
    """{"params/blocks/0/…": array}: string keys only, the PRNG key as its raw data."""
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _unflatten(target: PyTree, flat: Mapping[str, Any]) -> PyTree:
    state = jax.tree_util.tree_map_with_path(
        lambda path, _: flat[jax.tree_util.keystr(path, simple=True, separator="/")], target
    )
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _on_default_device(tree: PyTree) -> PyTree:
    """Restore targets on one device, so that a checkpoint of eight devices opens on a laptop."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), _plain(tree))


def _plain(tree: PyTree) -> PyTree:
    """Orbax's metadata trees are mappings of its own."""
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _check_same(target: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], step: int) -> None:
    shapes = {k: tuple(v.shape) for k, v in target.items()}
    differing = [k for k in sorted({*shapes, *found}) if shapes.get(k) != found.get(k)]
    if differing:
        lines = [
            f"  {k}: saved {found.get(k, 'nothing')}, this run {shapes.get(k, 'nothing')}"
            for k in differing[:5]
        ]
        raise ValueError(
            f"The checkpoint of step {step} belongs to another model or optimizer, {len(differing)} arrays "
            "differ:\n" + "\n".join(lines)
        )


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
