"""Image files in class folders: what is listed, what is left out, names of classes and splits."""

import logging
import os

import image_kinds
import numpy as np
import pytest

from tlvit.data.sources.image_files import find_split, list_images, natural_key

JPEG = image_kinds.image_file("rgb jpeg")


def write(root, *names):
    for name in names:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(JPEG)


def test_pipes_and_broken_links_are_left_out_at_once(tmp_path, caplog):
    write(tmp_path, "train/cat/a.jpg", "elsewhere/b.jpg", "elsewhere/dog/c.jpg")
    cat = tmp_path / "train/cat"
    os.mkfifo(cat / "pipe.jpg")
    (cat / "loop.jpg").symlink_to(cat / "loop.jpg")
    (cat / "gone.jpg").symlink_to(tmp_path / "none.jpg")
    (cat / "link.jpg").symlink_to(tmp_path / "elsewhere/b.jpg")
    (cat / "up").symlink_to(cat)  # a loop of folders
    (tmp_path / "train/dog").symlink_to(tmp_path / "elsewhere/dog")
    (tmp_path / "train/round").symlink_to(tmp_path / "train/round")
    with caplog.at_level(logging.WARNING, "tlvit"):
        files = list_images(str(tmp_path), "train")
    assert files.paths == ("cat/a.jpg", "cat/link.jpg", "dog/c.jpg")
    assert "skipped 4 files that are not images: 3 broken links, 1 pipes or devices" in caplog.text


def test_tiff_and_ppm_files_are_images(tmp_path):
    write(tmp_path, "train/a/1.tif", "train/a/2.TIFF", "train/a/3.ppm", "train/a/4.txt")
    assert list_images(str(tmp_path), "train").paths == ("a/1.tif", "a/2.TIFF", "a/3.ppm")


def test_names_of_files_need_not_be_utf_8(tmp_path):
    write(os.fsencode(tmp_path).decode(), "train/cat/ok.jpg")
    with open(os.fsencode(tmp_path) + b"/train/cat/\xff.jpg", "wb") as file:
        file.write(JPEG)
    assert [os.fsencode(path) for path in list_images(str(tmp_path), "train").paths] == [
        b"cat/ok.jpg",
        b"cat/\xff.jpg",
    ]


@pytest.mark.parametrize("name", [b"a\nb", b"a\rb", b" cat", b"cat ", b"\xff"])
def test_names_of_classes_are_lines_of_text(tmp_path, name):
    write(tmp_path, "train/dog/1.jpg")
    os.mkdir(os.fsencode(tmp_path) + b"/train/" + name)
    list_images(str(tmp_path), "train")  # without an image it is no class
    with open(os.fsencode(tmp_path) + b"/train/" + name + b"/1.jpg", "wb") as file:
        file.write(JPEG)
    with pytest.raises(ValueError, match="cannot be a class name"):
        list_images(str(tmp_path), "train")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Otherwise its images would be missing without a word."""
    write(tmp_path, "train/cat/1.jpg", "train/dog/deep/1.jpg")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="deep"):
        list_images(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", r"classes.txt is not UTF-8 text: byte 0 is invalid"),
        (b"", "classes.txt has no class names"),
        (b"cat\ndog\ncat\n", "classes.txt has the class 'cat' twice, as number 0 and 2"),
        (
            b"cat\x00\n",
            r"1 classes that training does not have: cat. The 1 classes are those of .*classes.txt",
        ),
        (None, "classes.txt is a folder"),
    ],
)
def test_damaged_lists_of_classes_are_named(tmp_path, content, message):
    write(tmp_path, "train/cat/1.jpg")
    if content is None:
        (tmp_path / "classes.txt").mkdir()
    else:
        (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        list_images(str(tmp_path), "train")


def test_validation_is_val_where_only_that_exists(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg")
    assert find_split(str(tmp_path), "validation") == "val"
    (tmp_path / "val").rename(tmp_path / "validation")
    assert find_split(str(tmp_path), "val") == "validation"
    (tmp_path / "validation").rename(tmp_path / "val")
    (tmp_path / "validation").mkdir()
    assert find_split(str(tmp_path), "validation") == "validation"


def test_a_missing_split_names_the_others_but_no_score_maps(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "maps/score_maps.json", "more/score_maps.started.json", ".git/x")
    message = (
        r"has no folder 'validation'; it has \['train'\]. A part of a split is written as 'train\[:90%\]'"
    )
    with pytest.raises(ValueError, match=message):
        find_split(str(tmp_path), "validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"it has no folders of images: put them into ROOT/SPLIT/CLASS/"):
        find_split(str(tmp_path / "empty"), "train")


def test_numbers_are_compared_by_value():
    assert sorted(["a10", "a2", "²", "a٣", "7", "B1"], key=natural_key) == ["7", "a2", "a10", "a٣", "B1", "²"]


def test_labels_follow_the_classes(tmp_path):
    write(tmp_path, "train/b/1.jpg", "train/a/1.jpg", "train/a/2.jpg")
    files = list_images(str(tmp_path), "train")
    np.testing.assert_array_equal(files.labels, [0, 0, 1])
    assert files.classes == ("a", "b")
