"""`init_from`: the options that a run takes from a checkpoint, and what it says of one that does not fit."""

import dataclasses

import numpy as np
import pytest

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


def start(path, info, **settings):
    """A model of `info` that starts from a checkpoint, with the settings init_missing and init_unexpected."""
    settings = Model(name=info.model, init_from=str(path), **settings)
    return _load_weights(settings, info.build(seed=1), info)


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
        start(folder, other)
    other = dataclasses.replace(INFO, options={**TINY, "dim": 32, "num_heads": 4, "drop_path": 0.3})
    with pytest.raises(
        ValueError, match="its lvvit_t has dim=24, num_heads=2, rule=mean, and this run's"
    ) as caught:
        start(folder, other)
    assert "dim=32, num_heads=4, rule=max. Change or leave out config.model.options.dim" in str(caught.value)


def test_weights_that_fit(folder):
    """Another number of classes and another image size are no misfits."""
    other = dataclasses.replace(INFO, num_classes=5, image_size=(64, 32))
    model = start(folder, other)
    assert (model.grid, model.head.kernel.shape) == ((4, 2), (24, 5))


def test_the_token_head_starts_from_the_class_head(tmp_path, caplog):
    """A file without a token head, for a model that trains on token labels."""
    plain = dataclasses.replace(INFO, options={**INFO.options, "token_head": False})
    source = plain.build()
    save_model_folder(tmp_path / "m", source, plain)
    with pytest.raises(ValueError, match=r"all the same: --config.model.init_missing=aux_head\.$"):
        start(tmp_path / "m", INFO)
    with caplog.at_level("INFO", "tlvit"):
        model = start(tmp_path / "m", INFO, init_missing=("aux_head",))
    np.testing.assert_array_equal(model.aux_head.kernel[...], source.head.kernel[...])
    np.testing.assert_array_equal(model.head.kernel[...], source.head.kernel[...])
    assert model.aux_head.kernel[...] is not model.head.kernel[...]  # a step donates both
    copied = "copied             2  aux_head/bias from head/bias, aux_head/kernel from head/kernel"
    assert copied in caplog.text
    # Heads for other classes are initialized, the token head as well.
    other = start(tmp_path / "m", dataclasses.replace(INFO, num_classes=5), init_missing=("aux_head",))
    assert other.aux_head.kernel.shape == other.head.kernel.shape == (24, 5)
    assert not np.array_equal(other.aux_head.kernel[...], other.head.kernel[...])


def test_a_token_head_may_be_left_out(folder):
    plain = dataclasses.replace(INFO, options={**INFO.options, "token_head": False})
    with pytest.raises(ValueError, match=r"--config.model.init_unexpected=aux_head\.$"):
        start(folder, plain)
    model = start(folder, plain, init_unexpected=("aux_head",))
    assert model.aux_head is None
    np.testing.assert_array_equal(model.head.kernel[...], INFO.build().head.kernel[...])


def test_a_prefix_that_no_parameter_has(folder):
    with pytest.raises(ValueError, match="init_missing=aux_haed: no parameter of lvvit_t begins with it"):
        start(folder, INFO, init_missing=("aux_haed",))


DEIT = {"dim": 24, "depth": 1, "num_heads": 2, "dtype": "float32"}
PLAIN = ModelInfo("deit_tiny_patch16_224", 3, (32, 32), DEIT)
DISTILLED = ModelInfo("deit_tiny_distilled_patch16_224", 3, (48, 32), DEIT)


def test_a_distilled_deit_starts_from_a_plain_one(tmp_path):
    """The distillation token, its position and its head are copies of those of the class token."""
    source = PLAIN.build()
    save_model_folder(tmp_path / "m", source, PLAIN)
    with pytest.raises(ValueError, match=r"--config.model.init_missing=dist_token,head_dist\.$"):
        start(tmp_path / "m", DISTILLED)
    model = start(tmp_path / "m", DISTILLED, init_missing=("dist_token", "head_dist"))
    np.testing.assert_array_equal(model.dist_token[...], source.cls_token[...])
    np.testing.assert_array_equal(model.head_dist.kernel[...], source.head.kernel[...])
    positions = np.asarray(model.pos_embed[...])
    assert positions.shape == (1, 2 + 6, 24)
    for prefix in (0, 1):
        np.testing.assert_array_equal(positions[:, prefix], source.pos_embed[...][:, 0])


def test_a_plain_deit_starts_from_a_distilled_one(tmp_path):
    info = dataclasses.replace(DISTILLED, image_size=(32, 32))
    source = info.build()
    save_model_folder(tmp_path / "m", source, info)
    model = start(tmp_path / "m", PLAIN, init_unexpected=("dist_token", "head_dist"))
    positions = np.asarray(source.pos_embed[...])
    np.testing.assert_array_equal(model.pos_embed[...], np.delete(positions, 1, axis=1))
