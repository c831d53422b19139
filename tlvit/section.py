"""How settings are declared and checked: fields of a dataclass with a type, a range and a meaning."""

import dataclasses
import functools
import operator
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from tlvit.records import convert


def setting(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """Declares a field of a section.

    Args:
      default: its default value.
      meaning: one sentence for the settings page.
      choices: the allowed values, if they are few.
      low: the smallest allowed value.
      above: a value that it must exceed.
      high: the largest allowed value.
      below: a value that it must not reach.
    """
    limits = {"low": low, "above": above, "high": high, "below": below}
    metadata = {"meaning": meaning, "choices": choices, **limits}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections: checks every field against its type and its declared range."""

    prefix: ClassVar[str] = "config."

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kind = annotations(type(self))[field.name]
            _check_field(self.prefix + field.name, getattr(self, field.name), kind, field.metadata)


@functools.cache
def annotations(section: type[Section]) -> dict[str, Any]:
    """Name -> type of every field of a section."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _check_field(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> None:
    if metadata.get("choices") and value not in metadata["choices"]:
        raise ValueError(f"{name} must be {' or '.join(metadata['choices'])}, not {value!r}.")
    convert(value, kind, name)
    if not metadata:
        return  # a section
    limits = (("low", "at least", operator.ge), ("above", "above", operator.gt),
              ("high", "at most", operator.le), ("below", "below", operator.lt))  # fmt: skip
    for number in value if isinstance(value, tuple) else (value,):
        for key, words, holds in limits:
            if metadata[key] is not None and not holds(number, metadata[key]):
                raise ValueError(f"{name} must be {words} {_short(metadata[key])}, not {number}.")


def range_text(metadata: Mapping[str, Any]) -> str:
    """The range of a field, from its metadata, for the settings page."""
    if metadata["choices"]:
        return " | ".join(metadata["choices"])
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    return ", ".join(
        f"{sign} {_short(metadata[key])}" for key, sign in signs.items() if metadata[key] is not None
    )


def _short(number: float) -> str:
    """A limit in a message: 1000000 and 0.5."""
    return f"{number:g}" if isinstance(number, float) and number < 1e5 else str(int(number))
