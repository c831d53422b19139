"""The visualize command: its pictures, the form without a picture's name, and its errors."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from tlvit import visualize
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import save_model_folder

INFO = ModelInfo("lvvit_s", 3, (32, 32), {"dim": 32, "depth": 1, "num_heads": 2, "stem_width": None})


def test_without_a_name_the_picture_is_the_report():
    """With the same flags under its own name."""
    flags = ["--checkpoint=run", "--count=3", "--weights=ema"]
    options = visualize._parse(flags)
    assert (options.picture, options.checkpoint, options.count) == ("report", "run", 3)
    assert visualize._parse(["report", *flags]) == options
    assert visualize._parse(["--debug", *flags]).debug


def test_pictures_of_images(capsys):
    options = visualize._parse(["relevance", "run", "a.jpg", "b.jpg", "--class=cat", "--class=3"])
    assert (options.checkpoints, options.images) == (["run"], ["a.jpg", "b.jpg"])
    assert (getattr(options, "class"), options.top, options.out) == (["cat", "3"], 2, None)
    options = visualize._parse(["compare", "one", "two", "a.jpg", "--show=attention"])
    assert (options.checkpoints, options.images, options.show) == (["one", "two"], ["a.jpg"], "attention")
    with pytest.raises(SystemExit):
        visualize._parse(["atention", "run", "a.jpg"])
    assert "no picture 'atention'; choose one of report, attention," in capsys.readouterr().err


def test_what_is_wrong_with_the_arguments(tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    wrong = {
        "The picture is written as .png, not as x.jpg": ["--out=x.jpg"],
        "--model is given once for each checkpoint": ["--model=vit", "--model=vit"],
        "A picture has at most 24 images, not 26": [str(tmp_path / "a.png")] * 25,
    }
    for message, arguments in wrong.items():
        assert visualize.main(["attention", "run", str(tmp_path / "a.png"), *arguments]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["attention", "relevance", "tokens", "compare"])
def test_the_command_writes_a_picture(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "model", INFO.build(), INFO)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    models = ["model", "model"] if picture == "compare" else ["model"]
    assert visualize.main([picture, *models, "a.png", "--classes=classes.txt"]) == 0
    with Image.open(tmp_path / f"{picture}.png") as image:
        assert min(image.size) > 100
