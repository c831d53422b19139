"""Tests of the description of score maps: its checks, and descriptions of version 0.1."""

import dataclasses
import json
import os

import numpy as np
import pytest

from tlvit.data.score_maps.format import INFO_FILE, STARTED_FILE, MapDescription, ScoreMapInfo
from tlvit.data.score_maps.reader import open_score_maps
from tlvit.data.score_maps.verification import verify
from tlvit.data.score_maps.writer import ScoreMapWriter

DESCRIPTION = dict(annotator="net", annotator_hash="ab", top_k=2, grid=(2, 3), num_classes=5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(top_k=6), "top_k must be between 1 and the number of classes, 5, not 6"),
        (dict(top_k=0), "top_k must be between 1 and the number of classes, 5, not 0"),
        (dict(geometry="middle"), "geometry must be full or center, not 'middle'"),
        (dict(geometry="center", center_fraction=1.5), r"center_fraction must be in \(0, 1\], not 1.5"),
        (dict(center_fraction=float("nan")), r"center_fraction must be in \(0, 1\], not nan"),
        (dict(grid=(0, 3)), r"grid must be two numbers of at least 1, \(h, w\), not \(0, 3\)"),
        (dict(grid=(6, 6, 6)), r"grid must be two numbers of at least 1, \(h, w\), not \(6, 6, 6\)"),
    ],
)
def test_bad_descriptions_raise_an_error(changes, match):
    with pytest.raises(ValueError, match=match):
        MapDescription(**DESCRIPTION | changes)


def test_indices_have_16_bits_up_to_65535_classes():
    dtype = lambda classes: MapDescription(**DESCRIPTION | {"num_classes": classes}).index_dtype
    assert (dtype(65_535), dtype(65_536)) == (np.uint16, np.int32)


def edit(path, change):
    with open(path) as file:
        content = json.load(file)
    with open(path, "w") as file:
        json.dump(change(content), file)


def test_a_description_is_read_as_it_was_written(maps, tmp_path):
    maps.info.write(str(tmp_path / "copy.json"))
    assert ScoreMapInfo.read(str(tmp_path / "copy.json")) == maps.info


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c | {"format": 2}, "its format is not 1"),
        (lambda c: {k: v for k, v in c.items() if k != "grid"}, "grid"),
        (lambda c: c | {"top_k": 9}, "top_k must be between 1 and the number of classes, 5, not 9"),
        (lambda c: [], r"must hold a JSON object, not \[\]"),
        (lambda c: c | {"more": 1}, "more is an unknown key"),
        (lambda c: c | {"grid": "6x6"}, "grid must be a list, not '6x6'"),
        (lambda c: c | {"grid": [6, 6, 6]}, "grid must have 2 values, not 3"),
        (lambda c: c | {"geometry": "bogus"}, "geometry must be full or center, not 'bogus'"),
        (lambda c: c | {"center_fraction": 0}, "center_fraction must be in"),
        (lambda c: c | {"center_fraction": float("nan")}, "center_fraction must be a finite number"),
        (lambda c: c | {"num_images": "20"}, "num_images must be an integer, not '20'"),
        (lambda c: c | {"num_images": 21}, "num_images is 21, but the shards have 20 records"),
        (lambda c: c | {"shards": {}}, "shards must be a list"),
        (lambda c: {k: v for k, v in c.items() if k != "checksum"} | {"shards": []}, "describes no shards"),
        (lambda c: c | {"shards": [1]}, r"shards\[0\] must be an object"),
        (lambda c: c | {"shards": changed(c, file="../other.tfrecord")}, "must be a file of the same folder"),
        (lambda c: c | {"shards": changed(c, file="/etc/passwd")}, "must be a file of the same folder"),
        (lambda c: c | {"shards": changed(c, missing=99)}, "cannot have 7 records, 99 of them without a map"),
        (lambda c: c | {"shards": changed(c, sha256="0")}, "is not a SHA-256"),
    ],
)
def test_other_formats_and_damaged_descriptions_raise_an_error(maps, change, match):
    edit(os.path.join(maps.path, INFO_FILE), change)
    with pytest.raises(ValueError, match=f"{INFO_FILE}.*{match}"):
        open_score_maps(maps.path)


def changed(content, **fields):
    """The shards of a description, the first one with other fields."""
    first, *others = content["shards"]
    return [first | fields, *others]


@pytest.mark.parametrize(
    "fields",
    [
        {"grid": [12, 3]},  # as many cells as 6 x 6
        {"geometry": "center", "center_fraction": 0.5},
        {"checksum": None},
        {"checksum": 3},
    ],
)
def test_an_edited_description_is_not_believed(maps, fields):
    """Its values are possible. Only the checksum tells."""
    edit(os.path.join(maps.path, INFO_FILE), lambda content: content | fields)
    for read in (open_score_maps, verify):
        with pytest.raises(ValueError, match=f"{INFO_FILE} was changed after it was written"):
            read(maps.path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"{", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (None, "is not a regular file"),
        ("pipe", "is not a regular file"),
    ],
)
def test_a_damaged_description_is_named(maps, content, match):
    path = os.path.join(maps.path, INFO_FILE)
    os.remove(path)
    if content is None:
        os.mkdir(path)
    elif content == "pipe":
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            file.write(content)
    with pytest.raises((ValueError, OSError), match=f"{INFO_FILE} {match}"):
        open_score_maps(maps.path)


def version_0_1(content, center):
    """The description as version 0.1 wrote it: with center_share, or before it existed without it."""
    fraction = content.pop("center_fraction")
    for new in ("checksum", "exif"):
        content.pop(new)
    return content | ({} if center is None else {"center_share": fraction})


@pytest.mark.parametrize("center", [None, 1.0])
def test_folders_of_version_0_1_are_read_and_continued(source, maps, center):
    edit(os.path.join(maps.path, INFO_FILE), lambda content: version_0_1(content, center))
    info = open_score_maps(maps.path).info
    assert info == maps.info == verify(maps.path)
    assert len(ScoreMapWriter(maps.path, source, info).done_shards()) == 3


def test_an_unfinished_folder_of_version_0_1_is_continued(source, maps):
    info = dataclasses.replace(maps.info, shards=())
    started = os.path.join(maps.path, STARTED_FILE)
    os.remove(os.path.join(maps.path, INFO_FILE))
    info.write(started)
    edit(started, lambda content: version_0_1(content, 1.0))
    assert ScoreMapWriter(maps.path, source, info).finalize() == maps.info
    assert not os.path.exists(started)


def test_the_center_share_of_version_0_1_is_the_center_fraction(source, maps):
    path = os.path.join(maps.path, INFO_FILE)
    edit(path, lambda c: version_0_1(c, 1.0) | {"geometry": "center", "center_share": 0.75})
    info = open_score_maps(maps.path).info
    assert (info.geometry, info.center_fraction) == ("center", 0.75)
    with pytest.raises(
        ValueError, match=r"already has score maps with center_fraction 0\.75 instead of 0\.5"
    ):
        ScoreMapWriter(maps.path, source, dataclasses.replace(info, center_fraction=0.5))
