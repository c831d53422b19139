"""Checkpoint files of PyTorch in and out, and `tlvit.load`, which opens any checkpoint.

python -m tlvit.convert weights.pth --model=lvvit_s --out=DIR          # PyTorch -> tlvit model folder
python -m tlvit.convert WORKDIR --to=pytorch --out=weights.pth         # and back (or .safetensors)
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from tlvit.restore import ModelInfo, image_size_pair, restore, save_folder
from tlvit.state_dict import LoadReport, as_float32, from_torch, identify, to_torch

__all__ = [
    "LoadReport",
    "Weights",
    "export",
    "from_torch",
    "load",
    "main",
    "open_weights",
    "read_weights",
    "to_torch",
]

HEADS = ("head.", "head_dist.", "aux_head.")  # the layers whose width is the number of classes
SECTIONS = {"ema": ("state_dict_ema", "model_ema"), "raw": ("state_dict", "model")}
WRAPPERS = ("module.", "_orig_mod.")  # what data-parallel and compiled models write before every name


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a file.

    Attributes:
      tensors: official name -> array, floats as float32.
      section: where in the file they were, such as "state_dict_ema" or "top level".
      info: what a file written by `export` says about its model, else None.
    """

    tensors: dict[str, np.ndarray]
    section: str
    info: ModelInfo | None = None


def read_weights(path: str | pathlib.Path, *, ema: bool | None = None) -> Weights:
    """Reads a PyTorch checkpoint (.pth, .pth.tar, .pt, zip or legacy) or a .safetensors file, whole.

    The format is found in the file, not in its name. Pickles are read by torch's weights-only unpickler,
    which builds tensors, plain values and `argparse.Namespace` (old checkpoints keep their options in one),
    nothing else.

    Args:
      path: the file.
      ema: the averaged weights (True), the raw ones (False), or the averaged where the file has them (None).

    Raises:
      FileNotFoundError: no such file.
      ValueError: no checkpoint, a truncated one, one that would run code, or without the weights asked for.
      ImportError: a pickle, and torch is not installed.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _choose_section(path, _read_pickle(path), ema)
    if start[8:9] == b"{":
        return _read_safetensors(path, ema)
    size = path.stat().st_size
    raise ValueError(
        f"{path} ({size} bytes, the first are {start!r}) is no PyTorch checkpoint and no safetensors file."
    )


def export(model: nnx.Module, path: str | pathlib.Path, *, info: ModelInfo | None = None) -> None:
    """Writes the model for PyTorch: float32 under the official names, as `load_state_dict(strict=True)` of
    the published code takes them. The file appears whole or not at all.

    Args:
      model: with its weights.
      path: .safetensors, or .pth / .pt / .pth.tar (needs torch).
      info: kept in a safetensors file's header, so that `load` knows the model by itself.

    Raises:
      ValueError: another ending.
      ImportError: a pickle, and torch is not installed.
    """
    path = pathlib.Path(path)
    if not path.name.endswith((".safetensors", ".pth", ".pt", ".pth.tar")):
        raise ValueError(f"{path.name}: the ending must be .safetensors, .pth, .pt or .pth.tar.")
    torch = None if path.name.endswith(".safetensors") else _import_torch(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = to_torch(model)
    try:
        if torch is None:
            header = {"format": "pt", **({"tlvit": json.dumps(info.to_json())} if info else {})}
            safetensors.numpy.save_file(tensors, temporary, metadata=header)
        else:
            torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parse(arguments)
    try:
        out = pathlib.Path(options.out)
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise ValueError(f"{options.out} exists already; choose another name or remove it.")
        if options.to == "pytorch":
            model, info = load(
                options.source, model=options.model, ema=options.ema, image_size=options.image_size
            )
            export(model, options.out, info=info)
            print(f"{info.model}: {len(to_torch(model))} tensors written to {options.out}")
            return 0
        weights = read_weights(options.source, ema=options.ema)
        model, info, report = open_weights(
            weights, model=options.model, num_classes=options.num_classes, image_size=options.image_size,
            drop_heads=options.heads == "drop", allow=options.allow, pos_grid=options.pos_grid,
        )  # fmt: skip
        if options.class_names:
            names = pathlib.Path(options.class_names).read_text().splitlines()
            info = dataclasses.replace(info, class_names=tuple(names))
        size = "x".join(map(str, info.image_size))
        what = f"{info.model}, {info.num_classes} classes, {size} pixels"
        print(f"{options.source}: {weights.section} -> {what}\n{report}")
        save_folder(options.out, model, info)
        print(f"written to {options.out}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _read_pickle(path: pathlib.Path) -> Any:
    torch = _import_torch(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one exception for a file that is cut off or something else
        text = str(error)
        wanted = re.search(r"(?:GLOBAL|global:?|class) `?([\w.]+\.[\w.]+)`?", text)
        if wanted or ("weights_only" in text and "Unsupported" in text):
            what = f"it asks for {wanted[1]}" if wanted else "it holds more than tensors and plain values"
            raise ValueError(
                f"{path} is refused: {what}. Nothing in it was executed. If you made this file, save only "
                "the state dict and try again."
            ) from None
        brief = text.splitlines()[0][:200] if text else type(error).__name__
        raise ValueError(f"{path} is truncated or no PyTorch checkpoint: {brief}") from error


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path.name} is a PyTorch pickle, which needs torch: pip install tlvit[torch]. "
            "Safetensors files go without."
        ) from None
    return torch


def _read_safetensors(path: pathlib.Path, ema: bool | None) -> Weights:
    if ema:
        raise ValueError(
            f"{path} is a safetensors file, which holds one set of weights and does not call it EMA."
        )
    try:
        with safetensors.safe_open(path, framework="np") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            record = json.loads((file.metadata() or {}).get("tlvit", "null"))
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    return Weights(_clean(path, tensors), "top level", ModelInfo.from_json(record) if record else None)


def _choose_section(path: pathlib.Path, record: Any, ema: bool | None) -> Weights:
    """Finds the weights in what a checkpoint holds."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{path} holds a {type(record).__name__}, not a dict of tensors.")
    kinds = {None: ("ema", "raw"), True: ("ema",), False: ("raw",)}[ema]
    for section in (s for kind in kinds for s in SECTIONS[kind]):
        tensors = _tensors_of(record.get(section))
        if tensors:
            return Weights(_clean(path, tensors), section)
    tensors = _tensors_of(record)
    if tensors and not ema:
        return Weights(_clean(path, tensors), "top level")
    sought = "no EMA weights" if ema else "no weights"
    raise ValueError(f"{path} has {sought}; its keys are {', '.join(map(str, list(record)[:12]))}.")


def _tensors_of(record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        return {}
    return {
        k: v for k, v in record.items() if isinstance(k, str) and hasattr(v, "shape") and hasattr(v, "dtype")
    }


def _clean(path: pathlib.Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Names without wrappers, tensors as float32."""
    result: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith(WRAPPERS):
            bare = bare.split(".", 1)[1]
        if bare in result:
            raise ValueError(f"{path} holds {bare} twice, once as {name}.")
        result[bare] = as_float32(name, tensor)
    return result


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tlvit.convert", description="Checkpoints from and to PyTorch.")
    parser.add_argument(
        "source", help="a .pth, .pt, .pth.tar or .safetensors file; or a workdir or model folder"
    )
    parser.add_argument(
        "--out", required=True, help="folder, or with --to=pytorch a .pth or .safetensors file"
    )
    parser.add_argument("--to", choices=("tlvit", "pytorch"), default="tlvit")
    parser.add_argument("--model", help="name, where the tensors do not tell")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: EMA where there is one"
    )
    parser.add_argument(
        "--heads", choices=("keep", "drop"), default="keep", help="drop: new ones, for other classes"
    )
    parser.add_argument("--num-classes", type=int, help="with --heads=drop")
    parser.add_argument(
        "--image-size", type=image_size_pair, help="224 or 384x256: position embeddings are resized"
    )
    parser.add_argument(
        "--pos-grid", type=image_size_pair, help="of the file's position embeddings, if no square"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="tensors that may differ"
    )
    parser.add_argument("--class-names", help="a text file, one name a line")
    options = parser.parse_args(arguments)
    options.ema = {"auto": None, "ema": True, "raw": False}[options.weights]
    return options


if __name__ == "__main__":
    sys.exit(main())
