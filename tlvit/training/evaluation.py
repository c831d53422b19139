"""Metrics on exactly the images of a split: during a run, or of a checkpoint (--mode=eval)."""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.torch_names import UnknownModelError
from tlvit.config import Config, parse_image_size
from tlvit.files import as_path
from tlvit.models.functional import functionalize
from tlvit.models.table import model_task
from tlvit.training.classification import CLASSIFICATION
from tlvit.training.mesh import local_batch_size, make_mesh, place, state_shardings
from tlvit.training.prefetch import Prefetch
from tlvit.training.run_summary import scene_evaluation
from tlvit.training.state import TrainState
from tlvit.training.step import make_eval_step
from tlvit.training.task import EvalStep, Task
from tlvit.training.tasks import TASKS
from tlvit.types import Batch, PyTree

log = logging.getLogger("tlvit")


def evaluate(
    eval_step: EvalStep,
    weights: dict[str, dict[str, PyTree]],
    batches: Iterable[Batch],
    task: Task = CLASSIFICATION,
) -> dict[str, dict[str, float]]:
    """Evaluates one or several sets of weights in one pass. The sums stay on the devices until the end.

    Args:
      eval_step: from `make_eval_step`.
      weights: name, such as "raw" or "ema" -> {"params", "stats"}.
      batches: global batches whose padding is masked.
      task: what the sums mean.

    Returns:
      name -> {"loss"} the mean cross entropy, {"count"} the number of images, and in percent {"top1", "top5"}
      and, for data sets with ReaL labels (Beyer et al. 2020, arXiv:2006.07159), {"real"}; in segmentation
      {"miou", "macc", "aacc"}, see `iou_summary`.

    Raises:
      ValueError: there are no images.
    """
    total = None
    for batch in batches:
        sums = {name: eval_step(w["params"], w["stats"], batch) for name, w in weights.items()}
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    if total is None:
        raise ValueError("The evaluation split has no images.")
    return {name: task.means(sums) for name, sums in jax.device_get(total).items()}


def evaluate_state(
    eval_step: EvalStep, state: TrainState, batches: Iterable[Batch], task: Task = CLASSIFICATION
) -> dict[str, float]:
    """Metrics of the raw weights and of their moving average."""
    weights = {"raw": {"params": state.params, "stats": state.stats}}
    if state.ema is not None:
        weights["ema"] = state.ema
    found = evaluate(eval_step, weights, batches, task)
    result = {f"eval/{name}_{k}": v for name, sums in found.items() for k, v in sums.items() if k != "count"}
    result["eval/images"] = found["raw"]["count"]
    parts = [f"{name} {task.describe(found[name])}" for name in weights]
    log.info("step %d  evaluation on %d images: %s", state.step, result["eval/images"], "; ".join(parts))
    return result


def best_weights(result: dict[str, float], score: str = "top1") -> str:
    """Which weights have the higher value of `score`; the average in a tie."""
    return "ema" if result.get(f"eval/ema_{score}", -1.0) >= result[f"eval/raw_{score}"] else "raw"


def best_score(result: dict[str, float], score: str = "top1") -> float:
    """The value by which the best checkpoint is chosen: that of its best weights."""
    return result[f"eval/{best_weights(result, score)}_{score}"]


def evaluate_checkpoint(
    path: str | pathlib.Path, config: Config, *, weights: str = "auto"
) -> dict[str, float]:
    """Evaluates a checkpoint on the evaluation split of the settings.

    Args:
      path: a workdir (its best checkpoint), a model folder or a PyTorch file. A file whose tensors do not
        tell their model is opened as `config.model`.
      config: data and evaluation settings. The image size, crop_pct, the interpolation and the channels' mean
        and std are the checkpoint's unless they are set in `config.eval` and `config.data`. In segmentation
        the scale and the windows are those of `config.segmentation`.
      weights: "ema", "raw" or "auto", see `tlvit.load`.

    Returns:
      The values of `evaluate`.

    Raises:
      ValueError: the checkpoint is of another task or has another number of classes than the data, or the
        batch size does not fit the devices.
    """
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, model=config.mesh.model)
    local_batch_size(config.eval_batch_size, mesh)
    model, info = _open(as_path(path), config, weights)
    if (kind := model_task(info.model)) != config.task:
        raise ValueError(
            f"{path} is a model for {kind} ({info.model}), but config.task is {config.task}. Give "
            f"the --config of a recipe for {kind}."
        )
    task = TASKS[config.task]
    source = task.open_source(config, config.data.eval_split)
    if info.num_classes != source.num_classes:
        raise ValueError(
            f"{path} has {info.num_classes} classes, but {source.identity} has {source.num_classes}."
        )
    net, params, stats = functionalize(model)
    arrays = {"params": params, "stats": stats}
    arrays = place(arrays, state_shardings(arrays, mesh))
    batches = Prefetch(task.eval_batches(source, config, info, mesh), mesh)
    step = make_eval_step(net, mesh, info.preprocessing, config.segmentation)
    return evaluate(step, {"": arrays}, batches, task)[""]


def _open(path: pathlib.Path, config: Config, weights: str) -> tuple[nnx.Module, ModelInfo]:
    size = parse_image_size(config.eval.image_size) if config.eval.image_size else None
    try:
        opened = open_checkpoint(path, weights=weights, image_size=size)
    except UnknownModelError:  # a PyTorch file: the settings say which model it is
        options = dict(config.model.options)
        opened = open_checkpoint(path, weights=weights, image_size=size, model=config.model.name, **options)
    model, info = opened.model, opened.info
    interpolation = config.eval.interpolation
    given = {
        "crop_pct": config.eval.crop_pct,
        "interpolation": "" if interpolation == "auto" else interpolation,
        "mean": config.data.mean,
        "std": config.data.std,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value}
    if config.task == "segmentation":
        settings = config.segmentation
        changes |= {"scale": settings.scale, "window": settings.window, "stride": settings.stride}
    info = dataclasses.replace(info, preprocessing=dataclasses.replace(info.preprocessing, **changes))
    log.info("evaluating %s: %s, %s", path, opened.section, _how(config, info))
    return model, info


def _how(config: Config, info: ModelInfo) -> str:
    """How the images of an evaluation are prepared."""
    if config.task == "segmentation":
        return scene_evaluation(config)
    rule = info.preprocessing
    return f"{'x'.join(map(str, info.image_size))} pixels, crop_pct {rule.crop_pct:g}, {rule.interpolation}"
