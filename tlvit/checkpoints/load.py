"""`load` opens any checkpoint as a model: a workdir, a model folder, a PyTorch file or a safetensors file."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from flax import nnx

from tlvit.checkpoints.fit import LoadReport, check_finite, fit_arrays, resizable
from tlvit.checkpoints.model_info import ModelInfo, check_weights
from tlvit.checkpoints.native import load_model, restore_for_inference
from tlvit.checkpoints.torch_files import Weights, read_weights
from tlvit.checkpoints.torch_names import describe, from_torch, identify
from tlvit.checkpoints.trees import flatten, model_arrays, set_model_arrays
from tlvit.config import parse_image_size
from tlvit.files import as_path
from tlvit.models.options import check_num_classes
from tlvit.models.table import check_model_name

# The layers with one output for each class. Names have dots in files and slashes in folders.
SEGMENTATION_HEADS = [f"{head}_head{dot}conv_seg" for head in ("decode", "auxiliary") for dot in "./"]
HEADS = ("head", "head_dist", "aux_head", *SEGMENTATION_HEADS)


@dataclasses.dataclass(frozen=True)
class Opened:
    """An opened checkpoint.

    Attributes:
      model: the model with its weights.
      info: the ModelInfo.
      report: what was done with the arrays.
      section: which weights of the checkpoint were taken, such as "step 400, ema weights".
    """

    model: nnx.Module
    info: ModelInfo
    report: LoadReport
    section: str


def load(
    path: str | pathlib.Path,
    *,
    model: str | None = None,
    weights: str = "auto",
    image_size: int | tuple[int, int] | None = None,
    pos_grid: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[nnx.Module, ModelInfo]:
    """Opens a workdir, a model folder, a PyTorch checkpoint or a safetensors file for inference.

    Args:
      path: of the folder or file.
      model: architecture of a PyTorch file. Needed only if several models have its tensors, or if it has
        sizes of its own and no record of them. Then `options` are needed, too.
      weights: "ema", "raw", or "auto" for those that scored best in the run. If that is not recorded, "auto"
        takes EMA weights if there are any.
      image_size: image size to use the model at, an int or (height, width). Position embeddings are resized.
        Default: that of the checkpoint.
      pos_grid: (h, w) of the position embeddings of a PyTorch file. Default: a square.
      **options: further options of the model class, such as rule="mean".

    Returns:
      (model, ModelInfo).

    Raises:
      ValueError: the path is not a checkpoint or is damaged, its arrays do not fit the model, or weights are
        NaN or infinite. (`from_torch` takes any values.)
      FileNotFoundError: there is no such file.
      ImportError: the file is a pickle, and torch is not installed.

    Example:
      >>> model, info = tlvit.load("runs/lvvit_s")
      >>> logits = model(images).logits  # float32 [B, H, W, 3], normalized by info.preprocessing
    """
    opened = open_checkpoint(
        path, model=model, weights=weights, image_size=image_size, pos_grid=pos_grid, **options
    )
    return opened.model, opened.info


def open_checkpoint(
    path: str | pathlib.Path,
    *,
    model: str | None = None,
    weights: str = "auto",
    image_size: int | tuple[int, int] | None = None,
    pos_grid: tuple[int, int] | None = None,
    num_classes: int | None = None,
    drop_heads: bool = False,
    allow: Sequence[str] = (),
    **options: Any,
) -> Opened:
    """Opens a checkpoint as `load` does, optionally for other classes, and reports what was loaded.

    Args:
      num_classes: number of classes. Default: that of the checkpoint. Another number needs `drop_heads`.
      drop_heads: leave the heads of the checkpoint out; the model's heads are initialized.
      allow: prefixes of names that may be missing, unexpected or of another shape. A missing aux_head or
        head_dist starts from the class head, a missing dist_token from cls_token.

    Raises:
      ValueError: as of `load`; or another number of classes without `drop_heads`.
    """
    path = as_path(path)
    if model is not None:
        check_model_name(model)
    if path.is_dir():
        saved, fill = _read_folder(path, weights), _from_native
    else:
        saved, fill = read_weights(path, weights=weights), from_torch
    stored = saved.info
    if stored is None:
        patch_size = options.get("patch_size", 16)
        stored = identify(saved.tensors, model=model, pos_grid=pos_grid, patch_size=patch_size)
    elif model not in (None, stored.model):
        raise ValueError(f"{path} holds a {stored.model}, not a {model}.")
    num_classes = stored.num_classes if num_classes is None else num_classes
    check_num_classes(num_classes)
    if num_classes != stored.num_classes and not drop_heads:
        raise ValueError(
            f"{path} has heads for {stored.num_classes} classes, not {num_classes}; drop_heads=True "
            "(--heads=drop) initializes new ones."
        )
    info = dataclasses.replace(
        stored,
        num_classes=num_classes,
        image_size=stored.image_size if image_size is None else parse_image_size(image_size),
        options={**stored.options, **options},
        class_names=None if drop_heads else stored.class_names,
    )
    if pos_grid is None and image_size is not None:
        pos_grid = nnx.eval_shape(dataclasses.replace(info, image_size=stored.image_size).build).grid
    heads = HEADS if drop_heads else ()
    arrays = {name: array for name, array in saved.tensors.items() if not name.startswith(heads)}
    missing, allow = allow, (*heads, *allow, *(() if image_size is None else resizable(arrays)))
    net = info.build() if allow else nnx.eval_shape(info.build)  # initialize only if arrays may be missing
    try:
        report = fill(net, arrays, allow=allow, missing=missing, pos_grid=pos_grid)
    except ValueError as error:
        raise ValueError(_explain(path, saved, info, error)) from error
    check_finite({name: arrays[name] for name in (*report.loaded, *report.resized)}, str(path))
    return Opened(net, info, report, saved.section)


def _explain(path: pathlib.Path, saved: Weights, info: ModelInfo, error: ValueError) -> str:
    """The message for arrays that do not fit the model. A PyTorch file without a record may be of another
    model than the caller said."""
    others = () if saved.info else describe(saved.tensors)
    if others and not info.model.startswith(others):
        return f"{path} holds a {' or '.join(others)}, not a {info.model}."
    hint = (
        f"If this {info.model} has sizes of its own, convert it once with its options: tlvit convert "
        f"--checkpoint={path} --model={info.model} --option=depth=12 … --out=FOLDER."
    )
    return f"{path}, a {info.model}: {error}" + ("" if saved.info else f"\n{hint}")


def _read_folder(path: pathlib.Path, weights: str) -> Weights:
    """The arrays of a workdir or model folder, by path in the model."""
    if (path / "checkpoints").is_dir():
        params, stats, record = restore_for_inference(path, weights=weights)
        section = f"step {record['step']}, {record['weights']} weights"
    else:
        params, stats, record = load_model(path)
        section = "model folder"
        check_weights(weights)
        if weights == "ema":
            raise ValueError(f"{path} has one set of weights, not marked as EMA; use weights='auto'.")
    info = ModelInfo.from_json(record, f"The record of {path}")
    return Weights({**flatten(params), **flatten(stats)}, section, info)


def _from_native(
    model: nnx.Module,
    arrays: dict[str, Any],
    *,
    allow: Sequence[str],
    missing: Sequence[str],
    pos_grid: tuple[int, int] | None,
) -> LoadReport:
    """Fills a model with arrays by path; arguments as of `from_torch`."""
    shapes = {path: tuple(array.shape) for path, array in model_arrays(model).items()}
    chosen, report = fit_arrays(model, shapes, arrays, allow=allow, missing=missing, pos_grid=pos_grid)
    set_model_arrays(model, chosen)
    return report
