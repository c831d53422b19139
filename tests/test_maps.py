"""Tests of the maps command: verification, its errors, and the import of published score maps."""

import logging
import pathlib
import sys

import numpy as np
import pytest
import tiny_images

from tlvit.maps import main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """19 images in 3 shards, 5 classes."""
    from tlvit.data.sources.tfds import open_tfds

    folder = tmp_path_factory.mktemp("data")
    tiny_images.prepare(folder, [tiny_images.position_image(i, 8, 8) for i in range(19)])
    return open_tfds("tiny_images", "train", data_dir=str(folder))


@pytest.fixture
def data_arguments(source):
    return ["--data=tiny_images", f"--data-dir={pathlib.Path(source.files[0]).parents[2]}"]


@pytest.fixture
def messages(caplog, monkeypatch):
    """What the command logs."""
    monkeypatch.setattr(sys.modules["tlvit.maps"], "start_logging", lambda: None)
    caplog.set_level(logging.INFO, logger="tlvit")
    return caplog


def last(messages):
    return messages.records[-1].getMessage()


def test_verified_maps_are_described(source, data_arguments, tmp_path, messages, capsys):
    maps = tiny_images.write_maps(tmp_path, source, grid=(4, 8), missing=(3,))
    assert main([maps.path]) == 0
    printed = capsys.readouterr().out
    assert f"{maps.path}: verified 18 score maps" in printed
    assert "19 in 3 shards, 1 without a map" in printed
    assert "3 of 5 classes in 4 x 8 cells" in printed
    assert "test (0123)" in printed
    assert "tiny_images/1.0.0:train" in printed
    assert "the entire image" in printed
    assert main([maps.path, *data_arguments]) == 0
    assert main([maps.path, *data_arguments, "--split=train[:50%]"]) == 0  # a part of the maps' images
    assert main([maps.path, *data_arguments, "--split=test"]) == 1
    assert "tiny_images has no split 'test'" in last(messages)


def test_without_a_picture_its_file_is_not_checked(source, tmp_path, monkeypatch):
    maps = tiny_images.write_maps(tmp_path, source)
    monkeypatch.chdir("/proc")  # nothing can be written here
    assert main([maps.path]) == 0


def test_maps_of_other_images_are_found(source, data_arguments, tmp_path, messages):
    swap = lambda shard, keys: [keys[1], keys[0], *keys[2:]] if shard == 1 else keys
    maps = tiny_images.write_maps(tmp_path, source, change=swap)
    assert main([maps.path]) == 0
    assert main([maps.path, *data_arguments]) == 1
    assert "score map of another image" in last(messages)


@pytest.mark.parametrize("damage", ["cut", "flipped", "lost"])
def test_the_error_names_the_damaged_file(damage, source, tmp_path, messages):
    tiny_images.write_maps(tmp_path, source)
    victim = sorted(tmp_path.glob("maps-*"))[1]
    content = bytearray(victim.read_bytes())
    if damage == "lost":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content[:-10] if damage == "cut" else content)
    assert main([str(tmp_path)]) == 1
    assert str(victim) in last(messages)


def test_a_folder_without_maps_is_an_error(tmp_path, messages):
    assert main([str(tmp_path)]) == 1
    assert "is not a folder of score maps" in messages.text


def test_published_maps_are_imported(source, data_arguments, tmp_path, messages, capsys):
    torch = pytest.importorskip("torch")
    (tmp_path / "pt").mkdir()
    for i in range(18):  # not image 18
        classes = np.broadcast_to(np.reshape([i % 5, (i + 1) % 5], (2, 1, 1)), (2, 3, 3))
        tensor = np.stack([np.full((2, 3, 3), float(i)), classes])
        torch.save(torch.tensor(tensor).half(), tmp_path / "pt" / f"img_{i}.pt")
    command = [str(tmp_path / "maps"), f"--import-published={tmp_path / 'pt'}", *data_arguments]
    command += ["--center-fraction=0.9", "--threads=2"]
    assert main(command) == 1
    assert "images of tiny_images/1.0.0:train have no .pt file in" in last(messages)
    assert main([*command, "--max-missing=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "imported 18 score maps" in printed
    assert "2 of 5 classes in 3 x 3 cells" in printed
    assert "center, 0.9" in printed
    from tlvit.data.score_maps.reader import open_score_maps

    info = open_score_maps(tmp_path / "maps").info
    assert (info.geometry, info.center_fraction, info.num_missing) == ("center", 0.9, 1)


def test_an_import_needs_images(capsys):
    with pytest.raises(SystemExit):
        main(["out", "--import-published=labels"])
    assert "--import-published needs --data" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "tlvit maps /data/score_maps --import-published=" in capsys.readouterr().out


@pytest.mark.slow
def test_statistics_are_printed(source, data_arguments, tmp_path, messages, capsys):
    maps = tiny_images.write_maps(tmp_path, source, grid=(4, 8), missing=(3,))
    assert main([maps.path, *data_arguments, "--stats"]) == 0
    printed = capsys.readouterr().out
    assert f"{sum(shard.bytes for shard in maps.info.shards) / 19:,.0f} bytes an image" in printed
    assert "never among the kept ones: 0 of 5" in printed
    assert sum(" to " in line and line.endswith("%") for line in printed.splitlines()) == 10
    assert "images whose label is least probable in their mean map\n    img_" in printed


@pytest.mark.slow
def test_other_statistics(source, data_arguments, tmp_path, messages, capsys):
    """Without images, and with a picture."""
    pytest.importorskip("matplotlib")
    maps, picture = tiny_images.write_maps(tmp_path, source), tmp_path / "doubtful.png"
    assert main([maps.path, "--stats"]) == 0
    assert "agreement  unknown without --data" in capsys.readouterr().out
    assert main([maps.path, *data_arguments, "--stats", f"--least-plausible={picture}"]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_maps_are_drawn(source, data_arguments, tmp_path, messages, capsys):
    pytest.importorskip("matplotlib")
    maps = tiny_images.write_maps(tmp_path, source)
    picture = tmp_path / "maps.png"
    command = [maps.path, *data_arguments, "--images=3", f"--out={picture}", "--config.image_size=64"]
    assert main([*command, "--stats"]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert "verified 19 score maps" in printed
    assert "the label is the best class of the mean map" in printed
    assert f"drawn: {picture}" in printed
    assert main([*command, "--config.data.exif=apply"]) == 1
    assert "EXIF orientation" in last(messages)
    assert main([*command, "--config=lvvit_folder:annotator"]) == 1
    assert "regnety_016 has no tokens" in last(messages)
    assert main([*command, f"--out={tmp_path / 'maps.jpg'}"]) == 1
    assert "The picture is written as .png" in last(messages)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images=3"], "--images needs --data"),
        (["--stats", "--least-plausible=a.png"], "--least-plausible needs --data"),
        (["--data=x", "--least-plausible=a.png"], "--least-plausible needs --stats"),
    ],
)
def test_pictures_need_images(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(["maps", *flags])
    assert message in capsys.readouterr().err
