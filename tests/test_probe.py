"""tlvit probe: the command, from image files to the last line."""

import json

import numpy as np
import pytest
from PIL import Image

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import save_model_folder
from tlvit.probe import main


def test_features_tell_black_from_white(tmp_path, capsys):
    """Even the features of a model that is not trained do, and every image counts once."""
    for split, count in (("train", 6), ("val", 3)):
        for name, gray in (("black", 20), ("white", 230)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((40, 40, 3), gray + i, np.uint8)).save(folder / f"{i}.png")
    info = ModelInfo("vit", 5, (32, 32), {"dim": 16, "depth": 1, "num_heads": 2})
    save_model_folder(tmp_path / "model", info.build(), info)
    data = [f"--checkpoint={tmp_path / 'model'}", f"--data={tmp_path / 'photos'}"]
    assert main([*data, "--method=knn", "--k=1,3", "--batch-size=8"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"train_images": 12, "eval_images": 6, "knn_top1": {"1": 100.0, "3": 100.0}}
    for flag, message in (("--k=0", "numbers above 0"), ("--method=svm", "knn or linear or both")):
        with pytest.raises(SystemExit):
            main([*data, flag])
        assert message in capsys.readouterr().err


def test_splits_with_different_classes_are_refused(tmp_path, capsys):
    """Each split takes its labels from its own folders where ROOT has neither `train` nor `classes.txt`."""
    for split, classes in (("training", "abc"), ("validation", "bc")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    splits = ["--train-split=training", "--eval-split=validation"]
    assert main(["--checkpoint=none", f"--data={tmp_path}", *splits]) == 1
    assert "The splits have different classes: 3 in" in (message := capsys.readouterr().err)
    assert "only one of them has a." in message
