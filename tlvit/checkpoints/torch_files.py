"""Reads and writes PyTorch checkpoint files, pickles and safetensors. Only this file imports torch."""

import argparse
import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo, check_weights
from tlvit.checkpoints.torch_names import as_float32, to_torch
from tlvit.records import parse_json

# Keys of a checkpoint that hold a state dict, by the value of `weights`.
EMA, RAW = ("state_dict_ema", "model_ema"), ("state_dict", "model", "net")
SECTIONS = {"auto": EMA + RAW, "ema": EMA, "raw": RAW}
WRAPPERS = ("module.", "_orig_mod.")  # name prefixes of data-parallel and compiled models
ENDINGS = (".safetensors", ".pth", ".pt", ".pth.tar")
MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
MAX_COMPRESSION = 8  # a .pth file is a zip archive, which torch does not compress
# What `export` adds: the ModelInfo as JSON, and the SHA-256 of it and of the tensors. A safetensors file has
# them in its metadata. A .pth file has them as attributes of its state dict, an OrderedDict: torch loads and
# ignores them, as it does with the `_metadata` of its own state dicts.
INFO, CHECKSUM = "tlvit", "tlvit_sha256"


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a file.

    Attributes:
      tensors: official name -> array, as float32.
      section: key of the file that holds them, such as "state_dict_ema", or "top level of the file".
      info: the ModelInfo in a file written by `export`, else None.
    """

    tensors: dict[str, np.ndarray]
    section: str
    info: ModelInfo | None = None


def read_weights(path: str | pathlib.Path, *, weights: str = "auto") -> Weights:
    """Reads a PyTorch checkpoint (.pth, .pth.tar, .pt, zip or legacy) or a .safetensors file.

    The content decides the format, not the name. Pickles are read by torch's weights-only unpickler, which
    builds nothing but tensors, plain values and `argparse.Namespace` (in which old checkpoints keep options).

    Args:
      path: the file.
      weights: "ema", "raw", or "auto" for the EMA weights if the file has them.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not a checkpoint, has no tensors, is truncated, would run code, unpacks to much
        more than its size, does not have these weights, or has others than `export` wrote.
      ImportError: the file is a pickle, and torch is not installed.
    """
    check_weights(weights)
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its JSON header. Its first byte may be that of a pickle.
    header_length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header_length <= MAX_HEADER_BYTES:
        return _read_safetensors(path, weights)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _choose_section(path, _read_pickle(path, is_zip=start[:1] == b"P"), weights)
    size = path.stat().st_size
    raise ValueError(
        f"{path} ({size} bytes, the first are {start!r}) is not a PyTorch checkpoint or safetensors file."
    )


def export(model: nnx.Module, path: str | pathlib.Path, *, info: ModelInfo | None = None) -> None:
    """Writes a model for PyTorch, atomically.

    The tensors are float32 with official names, as `load_state_dict(strict=True)` of the published code takes
    them: `model.load_state_dict(torch.load(path))`. `load` verifies the checksum that the file has of them.

    Args:
      model: the model with its weights.
      path: a .safetensors file, or a .pth, .pt or .pth.tar file (needs torch).
      info: stored in the file. `load` reads architecture, class names and preprocessing from it.

    Raises:
      ValueError: the path has another ending.
      ImportError: torch is needed and not installed.

    Example:
      >>> model, info = tlvit.load("runs/lvvit_s")
      >>> tlvit.export(model, "lvvit_s.safetensors", info=info)
    """
    path = pathlib.Path(path)
    check_ending(path)
    torch = None if path.name.endswith(".safetensors") else _import_torch(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = to_torch(model)
    header = {INFO: json.dumps(info.to_json())} if info else {}
    header[CHECKSUM] = _checksum(header, {name: as_float32(name, v) for name, v in tensors.items()})
    try:
        if torch is None:
            safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt", **header})
        else:
            state_dict = collections.OrderedDict((k, torch.from_numpy(v)) for k, v in tensors.items())
            vars(state_dict).update(header)
            torch.save(state_dict, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_ending(path: pathlib.Path) -> None:
    """Raises ValueError unless the name of the file ends as `export` needs it."""
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"{path.name}: the ending must be one of {', '.join(ENDINGS)}.")


def _read_pickle(path: pathlib.Path, *, is_zip: bool) -> Any:
    torch = _import_torch(path)
    if is_zip:
        _check_unpacked_size(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common exception for truncated and other files
        text = str(error)
        wanted = re.search(r"(?:GLOBAL|global:?|class) `?([\w.]+\.[\w.]+)`?", text)
        if wanted or ("weights_only" in text and "Unsupported" in text):
            what = f"it asks for {wanted[1]}" if wanted else "it holds more than tensors and plain values"
            raise ValueError(
                f"{path} is refused: {what}. Nothing in it was executed. If you made this file, save only "
                "the state dict and try again."
            ) from None
        brief = text.splitlines()[0][:200] if text else type(error).__name__
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint: {brief}") from error


def _check_unpacked_size(path: pathlib.Path) -> None:
    """Raises ValueError for a zip archive that is cut or that unpacks to much more than its own size."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # a damaged directory of the archive can raise any exception
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint: {error}") from error
    if unpacked > MAX_COMPRESSION * (size := path.stat().st_size):
        raise ValueError(
            f"{path} is refused: its {size:,} bytes unpack to {unpacked:,}. PyTorch does not compress files."
        )


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path.name} is a PyTorch pickle, which needs torch: pip install tlvit[torch]. "
            "Safetensors files do not need it."
        ) from None
    return torch


def _read_safetensors(path: pathlib.Path, weights: str) -> Weights:
    if weights == "ema":
        raise ValueError(f"{path} has one set of weights, not marked as EMA; use weights='auto'.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            header = file.metadata() or {}
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{path} has no tensors.")
    return _verified(path, "top level of the file", tensors, header)


def _choose_section(path: pathlib.Path, record: Any, weights: str) -> Weights:
    """Finds the state dict in an unpickled checkpoint."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{path} holds a {type(record).__name__}, not a dict of tensors.")
    sections = {section: record.get(section) for section in SECTIONS[weights]}
    if weights != "ema":
        sections["top level of the file"] = record
    for section, state_dict in sections.items():
        if tensors := _tensors_of(state_dict):
            header = vars(state_dict) if isinstance(state_dict, collections.OrderedDict) else {}
            return _verified(path, section, tensors, header)
    wanted = {"auto": "weights", "ema": "EMA weights", "raw": "raw weights"}[weights]
    raise ValueError(f"{path} has no {wanted}; its keys are {', '.join(map(str, list(record)[:12]))}.")


def _verified(
    path: pathlib.Path, section: str, tensors: Mapping[str, Any], header: Mapping[str, Any]
) -> Weights:
    """The weights of a state dict. `header` has what `export` adds, if it wrote the state dict.

    Raises:
      ValueError: the tensors or the record are not those that were written.
    """
    arrays = _clean(path, tensors)
    if CHECKSUM in header and header[CHECKSUM] != _checksum(header, arrays):
        raise ValueError(
            f"{path} is damaged or was changed: its tensors and its record do not have the SHA-256 that was "
            f"stored when tlvit wrote it. Export or download it again, or save it without {CHECKSUM}."
        )
    info = None
    if INFO in header:
        record = parse_json(str(header[INFO]), f"The record of {path}")
        info = ModelInfo.from_json(record, f"The record of {path}")
    return Weights(arrays, section, info)


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the ModelInfo in a header and of the names, shapes and values of all tensors, as float32."""
    digest = hashlib.sha256(str(header.get(INFO, "")).encode())
    for name in sorted(arrays):
        digest.update(f"\0{name}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _tensors_of(record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        return {}
    return {
        k: v for k, v in record.items() if isinstance(k, str) and hasattr(v, "shape") and hasattr(v, "dtype")
    }


def _clean(path: pathlib.Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Strips the wrappers' prefixes off the names and converts the tensors to float32.

    Raises:
      ValueError: two tensors have one name, or there are more values than the file can hold, because tensors
        repeat one value without storing it.
    """
    count, size = sum(math.prod(tensor.shape) for tensor in tensors.values()), path.stat().st_size
    if count > MAX_COMPRESSION * size:
        raise ValueError(f"{path} is refused: its tensors have {count:,} values in {size:,} bytes.")
    result: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith(WRAPPERS):
            bare = bare.split(".", 1)[1]
        if bare in result:
            raise ValueError(f"{path} holds {bare} twice, once as {name}.")
        try:
            result[bare] = as_float32(name, tensor)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return result
