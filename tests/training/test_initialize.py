"""`init_from`: the options that a run takes from a checkpoint, and what it says of one that does not fit."""

import dataclasses

import pytest
from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import save_model_folder
from tlvit.config import Config, Model
from tlvit.training.initialize import _load_weights, take_options

TINY = {"dim": 24, "depth": 1, "num_heads": 2, "stem_width": 8}
INFO = ModelInfo("lvvit_t", 3, (32, 32), {**TINY, "rule": "mean", "drop_path": 0.1, "dtype": "float32"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    save_model_folder(path, INFO.build(), INFO)
    return str(path)


def config(folder, name="lvvit_t", **options):
    return Config(model=Model(name=name, options=options, init_from=folder))


def test_options_that_the_recipe_leaves_open(folder, tmp_path):
    """Dropout and dtype are the recipe's."""
    assert take_options(config(folder), tmp_path).model.options == {**TINY, "rule": "mean"}
    given = take_options(config(folder, rule="max", depth=2, drop_path=0.3), tmp_path).model.options
    assert given == {**TINY, "rule": "max", "depth": 2, "drop_path": 0.3}
    for unchanged in (config(folder, "lvvit_s"), config("")):
        assert take_options(unchanged, tmp_path) == unchanged


def test_weights_that_do_not_fit_name_the_settings(folder):
    other = dataclasses.replace(INFO, model="lvvit_s", options={})
    with pytest.raises(
        ValueError, match=r"holds a lvvit_t, and this run trains a lvvit_s. Set config.model.nam"
    ):
        _load_weights(folder, nnx.eval_shape(other.build), other)
    other = dataclasses.replace(INFO, options={**TINY, "dim": 32, "num_heads": 4, "drop_path": 0.3})
    with pytest.raises(
        ValueError, match="its lvvit_t has dim=24, num_heads=2, rule=mean, and this run's"
    ) as caught:
        _load_weights(folder, nnx.eval_shape(other.build), other)
    assert "dim=32, num_heads=4, rule=max. Change or leave out config.model.options.dim" in str(caught.value)


def test_weights_that_fit(folder):
    """Another number of classes and another image size are no misfits."""
    other = dataclasses.replace(INFO, num_classes=5, image_size=(64, 32))
    model = _load_weights(folder, other.build(), other)
    assert (model.grid, model.head.kernel.shape) == ((4, 2), (24, 5))
