"""Tests of the description of score maps: its checks, and descriptions of version 0.1."""

import dataclasses
import json
import os

import numpy as np
import pytest

from tlvit.data.score_maps.format import INFO_FILE, STARTED_FILE, MapDescription, ScoreMapInfo
from tlvit.data.score_maps.reader import open_score_maps, verify
from tlvit.data.score_maps.writer import ScoreMapWriter

DESCRIPTION = dict(annotator="net", annotator_hash="ab", top_k=2, grid=(2, 3), num_classes=5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(top_k=6), "top_k must be between 1 and the number of classes, 5, not 6"),
        (dict(top_k=0), "top_k must be between 1 and the number of classes, 5, not 0"),
        (dict(geometry="middle"), "geometry must be full or center, not 'middle'"),
        (dict(geometry="center", center_fraction=1.5), r"center_fraction must be in \(0, 1\], not 1.5"),
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
        (lambda c: [], "cannot be read"),
    ],
)
def test_other_formats_and_damaged_descriptions_raise_an_error(maps, change, match):
    edit(os.path.join(maps.path, INFO_FILE), change)
    with pytest.raises(ValueError, match=match):
        open_score_maps(maps.path)


def version_0_1(content, center):
    """The description as version 0.1 wrote it: with center_share, or before it existed without it."""
    fraction = content.pop("center_fraction")
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
