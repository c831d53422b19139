"""tlvit.class_names: files of class names are written and read line by line."""

import pytest

from tlvit.class_names import read_class_names, write_class_names


def test_names_are_read_as_they_were_written(tmp_path):
    names = ("n2", "a dog", "Bär", "東京", "x\x85y", "a\u2028b")
    write_class_names(tmp_path / "classes.txt", names)
    assert read_class_names(tmp_path / "classes.txt") == names
    assert [path.name for path in tmp_path.iterdir()] == ["classes.txt"]


def test_files_of_other_systems_and_editors_are_read(tmp_path):
    (tmp_path / "names").write_bytes("\ufeffone\r\n\r\n  two \r\nthree".encode())
    assert read_class_names(tmp_path / "names") == ("one", "two", "three")


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "", " ", " a", "a ", "\udcff"])
def test_names_that_would_shift_or_change_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be a class name"):
        write_class_names(tmp_path / "classes.txt", ("cat", name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xffcat", "names is not UTF-8 text: byte 0 is invalid"),
        (b" \n\n", "names has no class names; it needs one a line"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / "names")


def test_what_is_not_a_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        read_class_names(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match="is a folder, not a file of class names"):
        read_class_names(tmp_path)
