"""Every setting has its range, settings go together or are refused, and a workdir belongs to one run."""

import json

import pytest

from configs import digits
from tlvit.training.check_config import AT_LEAST, CHOICES, SHARES, check_config, check_numbers, check_workdir


class Source:
    """As much of a source as `check_config` looks at."""

    num_examples = 32


def config_for(**changes):
    config = digits.get_config("no_token_labels")
    config.batch_size = 16
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.dtype", "float16", "config.model.dtype must be float32 or bfloat16, not 'float16'"),
        ("data.label_crop", "left", "config.data.label_crop must be aligned or published, not 'left'"),
        ("loss.cls_target", "no", "config.loss.cls_target must be annotator or .*label, not 'no'"),
        ("augment.interpolation", "cubic", "must be bilinear or bicubic or random, not 'cubic'"),
        ("augment.randaugment", "rand-x9", "has the piece 'x9'"),
        ("eval.crop_pct", 0.0, r"config.eval.crop_pct must lie in \(0, 1\], not 0.0"),
        (
            "augment.crop_scale",
            (1.5, 2.0),
            r"crop_scale must be \(low, high\), 0 < low <= high <= 1, not \(1.5, 2.0\)",
        ),
        (
            "augment.crop_ratio",
            (2.0, 1.0),
            r"crop_ratio must be \(low, high\), 0 < low <= high, not \(2.0, 1.0\)",
        ),
        ("log_every", 0, "config.log_every must be at least 1, not 0"),
        ("augment.flip", 2.0, "config.augment.flip is a share between 0 and 1, not 2.0"),
        ("ema.decay", float("nan"), "config.ema.decay is a share between 0 and 1, not nan"),
        ("batch_size", 33, "The 32 training images are fewer than a batch of 33"),
    ],
)
def test_settings_are_checked_at_the_door(key, value, said):
    check_config(config_for(), Source())
    with pytest.raises(ValueError, match=said):
        check_config(config_for(**{key: value}), Source())


def workdir_of(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("image_size", (64, 64)), ("token_labels", True), ("model.name", "lvvit_m"),
     ("model.dtype", "bfloat16"), ("model.options.depth", 3), ("data.name", "mnist"),
     ("data.train_split", "train[:50%]"), ("batch_size", 8)],
)  # fmt: skip
def test_a_workdir_is_of_one_model_and_one_data_set(key, value, tmp_path):
    old = config_for()
    new = config_for(**{key: value})
    if key == "image_size":
        new.image_size = value
    path = workdir_of(tmp_path, old)
    check_workdir(path, old)
    with pytest.raises(ValueError, match=r"holds another run; use a new --workdir") as caught:
        check_workdir(path, new)
    told = ".".join(key.split(".")[:2])
    assert str(caught.value).splitlines()[1].startswith(f"  {told}: ")
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim.learning_rate": 1.0, "epochs": 99, "data.dir": "/elsewhere", "log_every": 9},
    ],
)
def test_a_workdir_may_go_on_with_other_habits(changes, tmp_path):
    check_workdir(workdir_of(tmp_path, config_for()), config_for(**changes))
    check_workdir(tmp_path / "new", config_for())


def test_another_order_of_images_is_told(tmp_path, caplog):
    path = workdir_of(tmp_path, config_for())
    with caplog.at_level("WARNING", "tlvit"):
        check_workdir(path, config_for(**{"data.shuffle_gib": 0.5}))
    assert "data.shuffle_gib was 2.0 and is 0.5: from here on images come in another order" in caplog.text


def test_the_recipes_are_in_range():
    """And every key that has a range exists."""
    for arm in digits.ARMS:
        check_numbers(digits.get_config(arm))
    names = {*CHOICES, *AT_LEAST, *SHARES}
    assert len(names) == len(CHOICES) + len(AT_LEAST) + len(SHARES)
