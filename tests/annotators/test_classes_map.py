"""Tests of classes maps: both formats, names and indices, and what is refused."""

import json

import pytest

from tlvit.annotators.classes_map import read_classes_map

ANNOTATOR = ("tabby", "tiger cat", "crane", "crane", "sorrel, horse")
OWN = ("cat", "horse")


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_both_formats(tmp_path):
    """Many to one; a class that is not in the file, or has no class of the images, is dropped."""
    expected = (0, 0, -1, -1, 1)
    table = 'annotator,own\ntabby,cat\n1,cat\n\n2,\n"sorrel, horse",horse\n'
    assert read_classes_map(write(tmp_path / "m.csv", table), ANNOTATOR, OWN) == expected
    record = {"tabby": "cat", "tiger cat": 0, "3": None, "sorrel, horse": "1"}
    assert read_classes_map(write(tmp_path / "m.json", record), ANNOTATOR, OWN) == expected


def test_classes_without_names(tmp_path):
    path = write(tmp_path / "m.csv", "\ufeffannotator,own\r\n0,1\r\n2,0\r\n3,*\r\n")
    assert read_classes_map(path, 4, 2) == (1, -1, 0, -2)


def test_a_name_wins_over_an_index(tmp_path):
    path = write(tmp_path / "m.json", {"1": "a"})
    assert read_classes_map(path, ("1", "0"), ("a",)) == (0, -1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.txt", "", r"m\.txt must be named \.json or \.csv"),
        ("m.csv", "tabby,cat\n", r"The first line of .*m\.csv must be annotator,own\."),
        ("m.csv", "", "The first line of"),
        ("m.csv", "annotator,own\nsorrel, horse,horse\n", "line 2: 3 columns instead of 2; quote names"),
        ("m.csv", "annotator,own\ntaby,cat\n", "line 2: 'taby' is not a class of the annotator; did you"),
        ("m.csv", "annotator,own\ntabby,dog\n", "line 2: 'dog' is not a class of the images; known: cat"),
        ("m.csv", "annotator,own\ncrane,cat\n", "2 classes of the annotator are called 'crane'"),
        ("m.csv", "annotator,own\ntabby,cat\n0,cat\n", "line 3: the class '0' of the annotator occurs"),
        ("m.csv", "annotator,own\n5,cat\n", "'5' is not a class of the annotator"),
        ("m.csv", 'annotator,own\n"tabby,cat\n', "is not CSV text"),
        ("m.json", [1], "must hold a JSON object"),
        ("m.json", {"tabby": True}, "the class of 'tabby' must be text, an index or null"),
        ("m.json", {"tabby": 2}, "entry 'tabby': 2 is not a class of the images"),
    ],
)  # fmt: skip
def test_bad_files(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_classes_map(write(tmp_path / name, content), ANNOTATOR, OWN)


def test_missing_files_and_classes_without_names(tmp_path):
    for name in ("none.csv", "none.json"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            read_classes_map(tmp_path / name, 2, 2)
    (tmp_path / "bytes.csv").write_bytes(b"annotator,own\n\xff,1\n")
    with pytest.raises(ValueError, match="not UTF-8 text: byte 14"):
        read_classes_map(tmp_path / "bytes.csv", 2, 2)
    with pytest.raises(
        ValueError, match=r"'cat' is not a class of the annotator, which have no names: .* 0 to 1"
    ):
        read_classes_map(write(tmp_path / "m.csv", "annotator,own\ncat,1\n"), 2, 2)
    many = [f"class {i}" for i in range(100)]
    with pytest.raises(ValueError, match=r"'zebra' is not a class of the annotator; there are 100 names\."):
        read_classes_map(write(tmp_path / "m.csv", "annotator,own\nzebra,1\n"), many, 2)
