"""The data of a run."""

import pytest
from PIL import Image

from tlvit.config import Config, Data, Loss
from tlvit.training.run_data import open_data


def test_splits_with_different_classes_are_refused(tmp_path):
    """Without a folder `train` or a file classes.txt, each split has the classes of its own folders."""
    for split, classes in (("training", "abc"), ("validation", "bc")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    data = Data(name=str(tmp_path), train_split="training", eval_split="validation")
    with pytest.raises(ValueError, match=r"different classes: 3 in .*, 2 in .*; only one of them has a\."):
        open_data(Config(data=data, token_labels=False, batch_size=2, loss=Loss(plain_labels=True)))
