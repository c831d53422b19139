"""Reads the weights of a run for inference, and reads and writes model folders."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo, check_weights
from tlvit.checkpoints.native.checksums import check_files, write_checksums
from tlvit.checkpoints.native.step_folders import complete_steps, read_record, read_score
from tlvit.checkpoints.trees import flatten, unflatten
from tlvit.error_text import brief
from tlvit.files import absolute_path, is_local
from tlvit.models.functional import functionalize
from tlvit.records import read_json
from tlvit.types import PyTree


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
    folder = absolute_path(workdir) / "checkpoints"
    steps = complete_steps(folder)
    if not steps or step not in (None, *steps):
        wanted = "" if step is None else f" of step {step} (found: {steps})"
        raise ValueError(f"{workdir} has no checkpoint{wanted}.")
    if step is None:
        step = max(steps, key=lambda s: (read_score(folder / str(s)), s))
    folder, what = folder / str(step), f"The checkpoint of step {step} in {workdir}"
    with _reading(what), ocp.StandardCheckpointer() as reader:
        check_files(folder, ("state/", "extra/"))
        extra = read_record(folder)
        saved = dict(reader.metadata(folder / "state").item_metadata.items())
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
        arrays = reader.restore(folder / "state", args=part)
    tree = unflatten({k.removeprefix(prefix): v for k, v in arrays.items()})
    return tree["params"], tree.get("stats", {}), {**extra, "step": step, "weights": weights}


def save_model_folder(path: str | pathlib.Path, model: nnx.Module, info: ModelInfo) -> None:
    """Writes a model folder, which `load` opens.

    Raises:
      ValueError: the folder exists and is not empty.
    """
    path = absolute_path(path)
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
    if is_local(path):  # a bucket keeps checksums itself
        write_checksums(path)


def load_model(path: str | pathlib.Path) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Reads a model folder onto the default device.

    Returns:
      (params, stats, record), where `ModelInfo.from_json` reads the record.

    Raises:
      ValueError: the folder is not a complete model folder.
    """
    path = absolute_path(path)
    if not (path / "model").is_dir() or not (path / "info").is_dir():
        raise ValueError(f"{path} is not a tlvit model folder (model/ and info/ expected).")
    with _reading(f"The model folder {path}"), ocp.StandardCheckpointer() as reader:
        check_files(path)
        record = read_json(path / "info" / "metadata")
        target = _on_default_device(flatten(reader.metadata(path / "model").item_metadata))
        model = reader.restore(path / "model", {"stats": {}, **unflatten(target)})
    return model["params"], model["stats"], record


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns every exception into a ValueError: Orbax has no common one for a folder with missing parts."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {brief(error)}") from error


def _on_default_device(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Restore targets on one device, so that a checkpoint of eight devices opens on a laptop."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in arrays.items()}
