"""The loader of JSON records: one sentence names the file, the key and the expectation."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from tlvit.records import build, parse_json, read_json


@dataclasses.dataclass(frozen=True)
class Part:
    file: str
    bytes: int

    def __post_init__(self):
        if self.bytes < 0:
            raise ValueError(f"bytes must be at least 0, not {self.bytes}.")


@dataclasses.dataclass(frozen=True)
class Record:
    name: str
    rate: float
    grid: tuple[int, int]
    parts: tuple[Part, ...] = ()
    flag: bool = False
    kind: Literal["full", "center"] = "full"
    classes: tuple[str, ...] | None = None
    size: int | tuple[int, ...] = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    part: Part = Part("a", 0)


GOOD = {"name": "x", "rate": 1, "grid": [2, 3]}


def test_a_record_becomes_a_dataclass(tmp_path):
    path = tmp_path / "record.json"
    full = Record(
        "é", 0.5, (2, 3), (Part("a", 1), Part("b", 2)), True, "center", ("cat", "dog"), (4, 5),
        {"depth": [1, None]}, {"a": 0.25}, Part("c", 3),
    )  # fmt: skip
    path.write_text(json.dumps(dataclasses.asdict(full)))
    assert build(Record, read_json(path), path) == full
    least = build(Record, GOOD, path)
    assert least == Record("x", 1.0, (2, 3))
    assert isinstance(least.rate, float)
    assert build(Record, {**GOOD, "part": Part("d", 4)}, path).part == Part("d", 4)
    assert build(Record, {**GOOD, "classes": None, "size": 7}, path).size == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": ...}, "f.json: grid is missing."),
        ({"gird": 1}, "f.json: gird is an unknown key; did you mean grid?"),
        ({"q": 1}, "f.json: q is an unknown key; known: name, rate, grid, "),
        ({"name": 3}, "f.json: name must be text, not 3."),
        ({"name": None}, "f.json: name must be text, not null."),
        ({"rate": "fast"}, "f.json: rate must be a number, not 'fast'."),
        ({"rate": True}, "f.json: rate must be a number, not True."),
        ({"rate": float("nan")}, "f.json: rate must be a finite number, not nan."),
        ({"rate": 10**400}, "f.json: rate must be a finite number, not 1000"),
        ({"flag": 1}, "f.json: flag must be true or false, not 1."),
        ({"grid": 7}, "f.json: grid must be a list, not 7."),
        ({"grid": [1, 2, 3]}, "f.json: grid must have 2 values, not 3."),
        ({"grid": [1, 2.5]}, "f.json: grid[1] must be an integer, not 2.5."),
        ({"grid": [1, True]}, "f.json: grid[1] must be an integer, not True."),
        ({"kind": "bogus"}, "f.json: kind must be 'full' or 'center', not 'bogus'."),
        ({"classes": [1]}, "f.json: classes[0] must be text, not 1."),
        ({"classes": "cat"}, "f.json: classes must be a list, not 'cat'."),
        ({"size": "big"}, "f.json: size must be an integer, not 'big'."),
        ({"size": ["big"]}, "f.json: size[0] must be an integer, not 'big'."),
        ({"options": []}, "f.json: options must be an object, not []."),
        ({"shares": {"a": "b"}}, "f.json: shares.a must be a number, not 'b'."),
        ({"parts": [{"file": "a", "bytes": 1}, {"file": "b"}]}, "f.json: parts[1].bytes is missing."),
        (
            {"parts": [{"file": "a", "byte": 1}]},
            "f.json: parts[0].byte is an unknown key; did you mean bytes?",
        ),
        ({"parts": ["a"]}, "f.json: parts[0] must be an object, not 'a'."),
        ({"parts": [{"file": "a", "bytes": -1}]}, "f.json: bytes must be at least 0, not -1."),
        ({"name": ["x" * 900]}, "f.json: name must be text, not ['xxx"),
    ],
)
def test_a_wrong_record_is_one_sentence(change, message):
    record = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    with pytest.raises(ValueError) as raised:
        build(Record, record, "f.json")
    assert str(raised.value).startswith(message)
    assert len(str(raised.value)) < 200


def test_a_record_that_is_no_object():
    with pytest.raises(ValueError, match=r"^f.json: the record must be an object, not \[1\].$"):
        build(Record, [1], "f.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty."),
        (b" \n", "is empty."),
        (b"[1]", "must hold a JSON object, not [1]."),
        (b"null", "must hold a JSON object, not null."),
        (b'{"a": 1,\n "b" 2}', "is not valid JSON: Expecting ':' delimiter at line 2, column 6."),
        (b'{"a"', "is not valid JSON: Expecting ':' delimiter at line 1, column 5."),
        (b'{"b": {"a": 1, "a": 2}}', "is not valid JSON: the key 'a' occurs twice."),
        (b'{"a": "\xff"}', "is not UTF-8 text: byte 7 is invalid."),
        (b"[" * 100_000, "is not valid JSON: maximum recursion depth exceeded"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_record(content, message, tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_json(path)
    assert str(raised.value).startswith(f"{path} {message}")
    with pytest.raises(ValueError) as raised:
        parse_json(content, "gs://b/f.json")
    assert str(raised.value).startswith(f"gs://b/f.json {message}")


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist\.$"):
        read_json(tmp_path / "none.json")
    with pytest.raises(IsADirectoryError, match=r"is a folder, not a file\.$"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match=r"fifo is not a regular file\.$"):
        read_json(tmp_path / "fifo")
