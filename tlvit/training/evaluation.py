"""Accuracy over exactly the images of a split: of weights at hand, or of a run or checkpoint
(--mode=eval)."""

import pathlib
from collections.abc import Callable, Iterable

import jax
from flax import nnx
from ml_collections import ConfigDict

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo, image_size_pair
from tlvit.models.functional import functionalize
from tlvit.training import mesh as sharding
from tlvit.training.check_config import check_numbers
from tlvit.training.prefetch import Prefetch
from tlvit.training.step import make_eval_step
from tlvit.types import Array, Batch, PyTree


def evaluate(
    eval_step: Callable[[PyTree, PyTree, Batch], dict[str, Array]],
    weights: dict[str, dict[str, PyTree]],
    batches: Iterable[Batch],
) -> dict[str, dict[str, float]]:
    """Runs every batch through each set of weights and adds up; the sums stay on the devices until the end.

    Args:
      eval_step: from `make_eval_step`.
      weights: name, such as "raw" and "ema" -> {"params", "stats"}.
      batches: global batches whose padding is masked.

    Returns:
      name -> {"top1", "top5"} in percent, {"loss"} the mean cross entropy, {"count"} the number of images;
      and {"real"} in percent where the images have ReaL's sets of labels (Beyer et al. 2020,
      arXiv:2006.07159).

    Raises:
      ValueError: there is no image.
    """
    total = None
    for batch in batches:
        sums = {name: eval_step(w["params"], w["stats"], batch) for name, w in weights.items()}
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    if total is None:
        raise ValueError("The evaluation split holds no image.")
    return {name: _means(sums) for name, sums in jax.device_get(total).items()}


def _means(sums: dict[str, Array]) -> dict[str, float]:
    count = float(sums["count"])
    means = {k: 100 * float(sums[k]) / count for k in ("top1", "top5")}
    if "real" in sums:  # ImageNet ReaL leaves out images without a label
        means["real"] = 100 * float(sums["real"]) / max(float(sums["real_count"]), 1.0)
    return {**means, "loss": float(sums["loss"]) / count, "count": int(count)}


def evaluate_checkpoint(
    path: str | pathlib.Path, config: ConfigDict, *, ema: bool | None = None
) -> dict[str, float]:
    """Evaluates a workdir's best checkpoint, a model folder or a PyTorch file on the config's evaluation
    split.

    Args:
      path: of the checkpoint. The model is its own (of a PyTorch file whose tensors do not tell: the
        config's), and the image size unless config.eval.image_size says another; data and crop_pct are the
        config's.
      config: as from `configs/common.py`.
      ema: averaged (True) or raw weights (False), or averaged where there are any.

    Raises:
      ValueError: the checkpoint has another number of classes than the data.
    """
    from tlvit.data import pipeline
    from tlvit.data.sources import tfds as sources

    check_numbers(config)
    model, info = _open(pathlib.Path(path), config, ema=ema)
    source = sources.open_source(config.data.name, config.data.eval_split, data_dir=config.data.dir or None)
    if info.num_classes != source.num_classes:
        raise ValueError(
            f"{path} distinguishes {info.num_classes} classes, {source.identity} has {source.num_classes}."
        )
    mesh = sharding.make_mesh()
    net, params, stats = functionalize(model)
    weights = jax.device_put({"params": params, "stats": stats}, sharding.replicated(mesh))
    batch_size = config.eval.batch_size or config.batch_size
    sharding.local_batch_size(batch_size, mesh)
    batches = pipeline.eval_batches(
        source,
        batch_size=batch_size,
        image_size=info.image_size,
        crop_pct=config.eval.crop_pct,
        interpolation=config.eval.interpolation,
        max_bad=config.eval.max_bad,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads or None,
    )
    step = make_eval_step(net, mesh=mesh, mean=info.preprocessing.mean, std=info.preprocessing.std)
    return evaluate(step, {"": weights}, Prefetch(batches, mesh))[""]


def _open(path: pathlib.Path, config: ConfigDict, *, ema: bool | None) -> tuple[nnx.Module, ModelInfo]:
    size = image_size_pair(config.eval.image_size) if config.eval.image_size else None
    try:
        return load(path, ema=ema, image_size=size)
    except ValueError:
        if path.is_dir():
            raise
        options = {"model": config.model.name, **config.model.options.to_dict()}
        return load(path, ema=ema, image_size=size, **options)
