"""`tlvit.load`: opens any checkpoint as a model."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo, image_size_pair
from tlvit.checkpoints.torch_files import Weights, read_weights
from tlvit.checkpoints.torch_names import LoadReport, from_torch, identify, to_torch
from tlvit.models.functional import functionalize, update

HEADS = ("head.", "head_dist.", "aux_head.")  # the layers whose width is the number of classes


def load(
    path: str | pathlib.Path,
    *,
    model: str | None = None,
    ema: bool | None = None,
    image_size: int | tuple[int, int] | None = None,
    pos_grid: tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[nnx.Module, ModelInfo]:
    """Opens a model folder, a run's workdir, a PyTorch checkpoint or a safetensors file, ready for inference.

    Args:
      path: of the folder or file.
      model: name of a PyTorch file's model; not needed where only one model has these tensors.
      ema: averaged weights (True), raw ones (False), or averaged where there are any (None).
      image_size: to use the model at, int or (height, width): position embeddings are resized to it.
      pos_grid: (h, w) of a PyTorch file's position embeddings where it is no square.
      **overrides: further options of the model, such as rule="mean".

    Returns:
      (model, ModelInfo).

    Raises:
      ValueError: not a checkpoint, or one that does not fit.
      FileNotFoundError: no such file.
      ImportError: a pickle, and torch is not installed.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return open_weights(
            read_weights(path, ema=ema), model=model, image_size=image_size, pos_grid=pos_grid, **overrides
        )[:2]
    net, info = restore(path, ema=ema)
    if model not in (None, info.model):
        raise ValueError(f"{path} holds a {info.model}, not a {model}.")
    if image_size is None and not overrides:
        return net, info
    weights = Weights(to_torch(net), str(path), info)
    grid = getattr(net, "grid", None)
    return open_weights(weights, image_size=image_size, pos_grid=grid, **overrides)[:2]


def open_weights(
    weights: Weights,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    drop_heads: bool = False,
    allow: Sequence[str] = (),
    pos_grid: tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[nnx.Module, ModelInfo, LoadReport]:
    """Builds the model of a file's tensors and fills it; arguments as of `load`.

    Args:
      num_classes: L; the file's by default. Another number is an error unless `drop_heads`.
      drop_heads: leave the file's heads out, for training on other classes.
      allow: beginnings of further names that may be missing or without a place in the model.

    Raises:
      ValueError: no model or several have these tensors, or something does not fit.
    """
    tensors, known = weights.tensors, weights.info
    if known is None or model not in (None, known.model):
        patch_size = overrides.get("patch_size", 16)
        known = identify(tensors, model=model, pos_grid=pos_grid, patch_size=patch_size)
    elif (
        pos_grid is None and image_size is not None
    ):  # the header knows the size, so also a grid that is no square
        pos_grid = getattr(nnx.eval_shape(known.build), "grid", None)
    if num_classes not in (None, known.num_classes) and not drop_heads:
        raise ValueError(
            f"The weights have heads for {known.num_classes} classes, not {num_classes}: drop_heads=True "
            "(--heads=drop) leaves them out and starts new ones."
        )
    info = dataclasses.replace(
        known,
        num_classes=num_classes or known.num_classes,
        image_size=known.image_size if image_size is None else image_size_pair(image_size),
        overrides={**known.overrides, **overrides},
        class_names=None if drop_heads else known.class_names,
    )
    heads = HEADS if drop_heads else ()
    kept = {k: v for k, v in tensors.items() if not k.startswith(heads or "\0")}
    allow = (*heads, *allow, *(() if image_size is None else ("pos_embed",)))
    net = info.build() if allow else nnx.eval_shape(info.build)  # fresh weights only where some may stay
    return net, info, from_torch(net, kept, allow=allow, pos_grid=pos_grid)


def restore(path: str | pathlib.Path, *, ema: bool | None = None) -> tuple[nnx.Module, ModelInfo]:
    """Opens a model folder or a run's workdir.

    Args:
      path: the folder.
      ema: of a workdir: the averaged weights, where there are any (None, True), or the raw ones (False).

    Returns:
      (model, ModelInfo).

    Raises:
      ValueError: the folder holds no checkpoint, or one of another model than it says.
    """
    from tlvit.checkpoints import native as checkpoints

    path = pathlib.Path(path)
    if (path / "checkpoints").is_dir():
        params, stats, record = checkpoints.restore_for_inference(path, ema=ema is not False)
        record = record.get("info") or record
    else:
        params, stats, record = checkpoints.load_model(path)
    info = ModelInfo.from_json(record)
    model = nnx.eval_shape(info.build)  # fresh weights would only cost time
    problems = _differences(functionalize(model)[1:], (params, stats))
    if problems:
        raise ValueError(f"{path} does not hold a {info.model} as it says:\n  " + "\n  ".join(problems[:20]))
    update(model, params, stats)
    return model, info


def save_folder(path: str | pathlib.Path, model: nnx.Module, info: ModelInfo) -> None:
    """Writes a model folder, which `restore` and `tlvit.load` open.

    Raises:
      ValueError: the folder exists already and is not empty.
    """
    from tlvit.checkpoints import native as checkpoints

    path = pathlib.Path(path)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    _, params, stats = functionalize(model)
    checkpoints.save_model(path, params, stats, info.to_json())


def _differences(wanted: tuple, found: tuple) -> list[str]:
    """Lines that name the arrays whose shapes are not those of the model."""
    wanted, found = dict(_shapes(wanted)), dict(_shapes(found))
    return [
        f"{k}: is {found.get(k, 'missing')}, wanted {wanted.get(k, 'nothing')}"
        for k in sorted({*wanted, *found})
        if wanted.get(k) != found.get(k)
    ]


def _shapes(trees: tuple, prefix: str = ""):
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from _shapes((value,), f"{prefix}{key}.")
            else:
                yield prefix + key, tuple(value.shape)
