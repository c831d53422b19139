"""Reads JSON records into dataclasses. An error is one sentence: the file, the key and what was expected."""

import dataclasses
import difflib
import functools
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tlvit.files import as_path

T = TypeVar("T")

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
WIDER: dict[Any, Any] = {  # what is accepted for a type
    float: (int, float), tuple: (list, tuple), list: (list, tuple), dict: Mapping,
}  # fmt: skip


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      OSError: the file does not exist, is a folder, or cannot be read.
      ValueError: it is not UTF-8, not JSON, or not a JSON object.
    """
    path = as_path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_file():
        raise OSError(f"{path} is not a regular file.")
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, where: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a text.

    Args:
      text: as str, or as bytes of UTF-8.
      where: the file, for messages.

    Raises:
      ValueError: the text is not UTF-8, not JSON, or not a JSON object.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        record = json.loads(text, object_pairs_hook=_object) if text.strip() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {error.start} is invalid.") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is not valid JSON: {error.msg} at {at}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{where} is not valid JSON: {error}.") from None
    if not text.strip():
        raise ValueError(f"{where} is empty.")
    if not isinstance(record, dict):
        raise ValueError(f"{where} must hold a JSON object, not {_shown(record)}.")
    return record


def build(cls: type[T], record: object, where: str | os.PathLike) -> T:
    """Builds a dataclass from a JSON object and checks keys and types by its annotations.

    Lists become tuples and nested objects become nested dataclasses. Fields with a default may be missing.

    Args:
      cls: a dataclass. Its annotations are int, float, bool, str, None, Any, Literal, unions, tuples, lists,
        mappings from text, and such dataclasses.
      record: the object.
      where: the file, for messages.

    Raises:
      ValueError: a key is missing or unknown, a value has another type, a number is not finite, or the class
        refuses the values.

    Example:
      >>> info = build(ScoreMapInfo, read_json("score_maps.json"), "score_maps.json")
    """
    try:
        return _build(cls, record, "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def convert(value: Any, kind: Any, name: str) -> Any:
    """Checks one value against an annotation, as `build` does for each field.

    Args:
      value: a JSON value, or a tuple in place of a list.
      kind: the annotation.
      name: name of the value, with which messages start.

    Returns:
      The value; lists are tuples and integers are floats where the annotation says so.

    Raises:
      ValueError: the value has another type, or is a number that is not finite.
    """
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        kinds = [part for part in parts if part is not type(None)]
        if value is None and len(kinds) < len(parts):
            return None
        matching = [part for part in kinds if _matches(value, part)]
        return convert(value, (matching or kinds)[0], name)
    if not _matches(value, kind):
        raise ValueError(f"{name} must be {_expected(kind)}, not {_shown(value)}.")
    if origin is float and not (math.isfinite(value) if isinstance(value, float) else abs(value) < 1e308):
        raise ValueError(f"{name} must be a finite number, not {_shown(value)}.")
    if origin in (tuple, list):
        kinds = parts if origin is tuple and parts[-1] is not Ellipsis else [parts[0]] * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{name} must have {len(kinds)} values, not {len(value)}.")
        return origin(
            convert(v, k, f"{name}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True))
        )
    if origin in (dict, Mapping) and parts:
        return {key: convert(item, parts[1], f"{name}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
        return _build(origin, value, name + ".")
    return float(value) if origin is float else value


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known name, or else all of them."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]}?" if found else f"known: {', '.join(known)}."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that occurs twice, of which json.loads takes the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return record


def _build(cls: Any, record: Any, prefix: str) -> Any:
    if not isinstance(record, Mapping):
        raise ValueError(f"the record must be an object, not {_shown(record)}.")
    hints = _annotations(cls)
    for key in record:
        if key not in hints:
            raise ValueError(f"{prefix}{key} is an unknown key; {closest(str(key), hints)}")
    for field in dataclasses.fields(cls):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in record:
            raise ValueError(f"{prefix}{field.name} is missing.")
    return cls(**{key: convert(value, hints[key], prefix + key) for key, value in record.items()})


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _matches(value: Any, kind: Any) -> bool:
    """Whether a value has the type of an annotation; the values inside of it are not looked at."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Any:
        return True
    if origin is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping):
        return True
    if isinstance(value, bool) and origin is not bool:  # bool is a subclass of int
        return False
    return isinstance(value, WIDER.get(origin, origin))


def _expected(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return WORDS.get(origin, "a list" if origin in (tuple, list) else "an object")


def _shown(value: Any) -> str:
    """A value in a message, shortened."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
