"""Folders of images with annotations: their layouts, files, classes and errors."""

import numpy as np
import pytest
from PIL import Image

from tlvit.data.sources.annotated_folders import open_annotated_folder
from tlvit.data.sources.open import open_annotated_source


def write(folder, names, layout="{split}/{kind}", split="train"):
    """Image i is of the gray level 10 i; its annotation has the class i."""
    for number, name in enumerate(names):
        for kind, value, suffix in (("images", 10 * number, name[1]), ("annotations", number, ".png")):
            path = folder / layout.format(split=split, kind=kind) / (name[0] + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 8), value, np.uint8)).save(path)


NAMES = [("a2", ".png"), ("a10", ".bmp"), ("sub/b", ".png")]


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
def test_images_and_their_annotations(tmp_path, layout):
    write(tmp_path, NAMES, layout)
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    source = open_annotated_source(str(tmp_path), "train")
    assert (source.num_examples, source.num_classes, source.class_names) == (3, 3, ("x", "y", "z"))
    assert (source.has_annotations, source.exif, source.key_kind) == (True, False, "path")
    found = list(source.read(0).as_numpy_iterator())
    assert sorted(r["key"].decode() for r in found) == ["a10.bmp", "a2.png", "sub/b.png"]
    for record in found:
        number = [a + b for a, b in NAMES].index(record["key"].decode())
        kinds = [("images", NAMES[number][1], "image"), ("annotations", ".png", "annotation")]
        for kind, suffix, field in kinds:
            path = tmp_path / layout.format(split="train", kind=kind) / (NAMES[number][0] + suffix)
            assert record[field] == path.read_bytes()


def test_parts_of_a_split_and_the_number_of_classes(tmp_path):
    write(tmp_path, [(str(i), ".png") for i in range(10)], split="val")
    parts = [
        open_annotated_folder(str(tmp_path), f"validation{p}", num_classes=10) for p in ("[:40%]", "[4:]")
    ]
    assert [part.num_examples for part in parts] == [4, 6]
    keys = [r["key"] for part in parts for r in part.read(0).as_numpy_iterator()]
    assert len(set(keys)) == 10
    assert parts[0].identity.endswith(":val[:40%]")


def test_what_is_missing_is_named(tmp_path):
    write(tmp_path, NAMES)
    with pytest.raises(ValueError, match=r"number of classes in .* is unknown: .*classes.txt, one a line"):
        open_annotated_folder(str(tmp_path), "train")
    (tmp_path / "classes.txt").write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"num_classes is 3, but .*classes.txt has 2 names"):
        open_annotated_folder(str(tmp_path), "train", num_classes=3)
    (tmp_path / "train" / "annotations" / "sub" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images in .* have no annotation in .*: sub/b.png. The "):
        open_annotated_folder(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"has no folder 'val'"):
        open_annotated_folder(str(tmp_path), "val")
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"There is no folder .*test/images: segmentation reads ROOT/"):
        open_annotated_folder(str(tmp_path), "test")
