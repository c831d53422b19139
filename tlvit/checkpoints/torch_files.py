"""Reads and writes checkpoint files of PyTorch: pickles and safetensors."""

import argparse
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.torch_names import as_float32, to_torch

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
