"""Accuracy on exactly the images of a split: during a run, or of a checkpoint (--mode=eval)."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterable

import jax
from flax import nnx

from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import Config, parse_image_size
from tlvit.files import as_path
from tlvit.models.functional import functionalize
from tlvit.training.mesh import batch_part, local_batch_size, make_mesh, state_shardings
from tlvit.training.prefetch import Prefetch
from tlvit.training.state import TrainState
from tlvit.training.step import make_eval_step
from tlvit.types import Array, Batch, PyTree

log = logging.getLogger("tlvit")


def evaluate(
    eval_step: Callable[[PyTree, PyTree, Batch], dict[str, Array]],
    weights: dict[str, dict[str, PyTree]],
    batches: Iterable[Batch],
) -> dict[str, dict[str, float]]:
    """Evaluates one or several sets of weights in one pass. The sums stay on the devices until the end.

    Args:
      eval_step: from `make_eval_step`.
      weights: name, such as "raw" or "ema" -> {"params", "stats"}.
      batches: global batches whose padding is masked.

    Returns:
      name -> {"top1", "top5"} in percent, {"loss"} the mean cross entropy, {"count"} the number of images;
      and {"real"} in percent for data sets with ReaL labels (Beyer et al. 2020, arXiv:2006.07159).

    Raises:
      ValueError: there are no images.
    """
    total = None
    for batch in batches:
        sums = {name: eval_step(w["params"], w["stats"], batch) for name, w in weights.items()}
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    if total is None:
        raise ValueError("The evaluation split has no images.")
    return {name: _means(sums) for name, sums in jax.device_get(total).items()}


def evaluate_state(eval_step: Callable, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    """Accuracy of the raw weights and of their moving average."""
    weights = {"raw": {"params": state.params, "stats": state.stats}}
    if state.ema is not None:
        weights["ema"] = state.ema
    found = evaluate(eval_step, weights, batches)
    result = {f"eval/{name}_{k}": v for name, sums in found.items() for k, v in sums.items() if k != "count"}
    result["eval/images"] = found["raw"]["count"]
    parts = [f"{name} top-1 {found[name]['top1']:.2f}% top-5 {found[name]['top5']:.2f}%" for name in weights]
    log.info("step %d  evaluation on %d images: %s", state.step, result["eval/images"], ", ".join(parts))
    return result


def best_weights(result: dict[str, float]) -> str:
    """Which weights have the higher top-1 accuracy; the average in a tie."""
    return "ema" if result.get("eval/ema_top1", -1.0) >= result["eval/raw_top1"] else "raw"


def score(result: dict[str, float]) -> float:
    """The top-1 accuracy by which the best checkpoint is chosen: that of its best weights."""
    return result[f"eval/{best_weights(result)}_top1"]


def evaluate_checkpoint(
    path: str | pathlib.Path, config: Config, *, weights: str = "auto"
) -> dict[str, float]:
    """Evaluates a checkpoint on the evaluation split of the settings.

    Args:
      path: a workdir (its best checkpoint), a model folder or a PyTorch file. A file whose tensors do not
        tell their model is opened as `config.model`.
      config: data and evaluation settings. The image size and crop_pct are the checkpoint's unless
        `config.eval.image_size` and `config.eval.crop_pct` are set.
      weights: "ema", "raw" or "auto", see `tlvit.load`.

    Returns:
      The values of `evaluate`.

    Raises:
      ValueError: the checkpoint has another number of classes than the data, or the batch size does not fit
        the devices.
    """
    # TensorFlow is imported here, not above, so that the lower layers run without it.
    from tlvit.data.pipeline import eval_batches
    from tlvit.data.sources.open import open_source

    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, model=config.mesh.model)
    local_batch_size(config.eval_batch_size, mesh)
    model, info = _open(as_path(path), config, weights)
    data = config.data
    source = open_source(data.name, data.eval_split, data_dir=data.dir or None, exif=data.exif)
    if info.num_classes != source.num_classes:
        raise ValueError(
            f"{path} has {info.num_classes} classes, but {source.identity} has {source.num_classes}."
        )
    net, params, stats = functionalize(model)
    arrays = {"params": params, "stats": stats}
    arrays = jax.device_put(arrays, state_shardings(arrays, mesh))
    part, parts = batch_part(mesh)
    batches = eval_batches(
        source,
        info,
        batch_size=config.eval_batch_size,
        max_corrupt=config.eval.max_corrupt,
        threads=config.data.threads,
        process_index=part,
        process_count=parts,
    )
    step = make_eval_step(net, mesh, info.preprocessing)
    return evaluate(step, {"": arrays}, Prefetch(batches, mesh))[""]


def _open(path: pathlib.Path, config: Config, weights: str) -> tuple[nnx.Module, ModelInfo]:
    size = parse_image_size(config.eval.image_size) if config.eval.image_size else None
    try:
        opened = open_checkpoint(path, weights=weights, image_size=size)
    except ValueError:
        if path.is_dir():
            raise
        options = dict(config.model.options)
        opened = open_checkpoint(path, weights=weights, image_size=size, model=config.model.name, **options)
    model, info = opened.model, opened.info
    if config.eval.crop_pct:
        preprocessing = dataclasses.replace(info.preprocessing, crop_pct=config.eval.crop_pct)
        info = dataclasses.replace(info, preprocessing=preprocessing)
    pixels = "x".join(map(str, info.image_size))
    crop_pct = info.preprocessing.crop_pct
    log.info("evaluating %s: %s, %s pixels, crop_pct %g", path, opened.section, pixels, crop_pct)
    return model, info


def _means(sums: dict[str, Array]) -> dict[str, float]:
    count = float(sums["count"])
    means = {k: 100 * float(sums[k]) / count for k in ("top1", "top5")}
    if "real" in sums:  # ReaL leaves out images without a correct label
        means["real"] = 100 * float(sums["real"]) / max(float(sums["real_count"]), 1.0)
    return {**means, "loss": float(sums["loss"]) / count, "count": int(count)}
