"""`load`: model folders and workdirs become models again, at their own image size and at others."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import tlvit
from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.native import Checkpoints, save_model_folder
from tlvit.checkpoints.torch_names import to_torch
from tlvit.checkpoints.trees import model_arrays
from tlvit.models.functional import functionalize
from tlvit.models.t2t_vit import sinusoid_table
from tlvit.ops.resize import resize_pos_embed
from tlvit.training.state import state_from

TINY = {"dim": 24, "depth": 2, "num_heads": 2, "stem_width": 8}
INFO = ModelInfo(
    "lvvit_m", 3, (64, 32), TINY, class_names=("a", "b", "c"), preprocessing=Preprocessing(crop_pct=0.7)
)


def assert_same_arrays(model, expected):
    found, expected = model_arrays(model), model_arrays(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.slow
def test_model_folder_round_trip(tmp_path):
    model = INFO.build(seed=7)
    save_model_folder(tmp_path / "m", model, INFO)
    again, info = tlvit.load(tmp_path / "m")
    assert info == INFO
    assert_same_arrays(again, model)
    images = np.random.RandomState(0).standard_normal((2, 64, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(again(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="exists already"):
        save_model_folder(tmp_path / "m", model, INFO)
    with pytest.raises(ValueError, match="holds a lvvit_m, not a lvvit_s"):
        tlvit.load(tmp_path / "m", model="lvvit_s")
    with pytest.raises(ValueError, match="has one set of weights, not marked as EMA"):
        tlvit.load(tmp_path / "m", weights="ema")
    with pytest.raises(ValueError, match="weights must be one of auto, ema, raw, not True"):
        tlvit.load(tmp_path / "m", weights=True)


@pytest.mark.slow
def test_model_folder_at_another_size(tmp_path):
    """Position embeddings are resized, also for a grid with as many tokens; other arrays are unchanged."""
    model = INFO.build(seed=7)
    save_model_folder(tmp_path / "m", model, INFO)
    for size, grid in (((32, 96), (2, 6)), ((32, 64), (2, 4)), ((64, 32), (4, 2))):
        opened = open_checkpoint(tmp_path / "m", image_size=size)
        assert (opened.model.grid, opened.info.image_size) == (grid, size)
        assert opened.info.class_names == INFO.class_names
        assert opened.report.resized == (() if grid == (4, 2) else ("pos_embed",))
        assert opened.model(np.zeros((1, *size, 3), np.float32)).logits.shape == (1, 3)
        expected = model_arrays(model)
        expected["pos_embed"] = resize_pos_embed(
            expected["pos_embed"], grid, num_prefix=1, old_grid=model.grid
        )
        found = model_arrays(opened.model)
        assert found.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_fixed_tables_are_regenerated_at_another_size(tmp_path):
    """T2T-ViT has sinusoidal positions, which are generated, and random features, which are loaded."""
    info = ModelInfo("t2t_vit_7", 3, (64, 64), {"dim": 24, "depth": 1, "num_heads": 2})
    model = info.build(seed=7)
    save_model_folder(tmp_path / "m", model, info)
    opened = open_checkpoint(tmp_path / "m", image_size=96)
    assert opened.report.resized == ("pos_embed",)
    np.testing.assert_array_equal(opened.model.pos_embed[...], sinusoid_table(1 + 36, 24))
    features = lambda m: m.tokens_to_token.attention1.w[...]
    np.testing.assert_array_equal(features(opened.model), features(model))


@pytest.mark.slow
def test_model_without_tokens_at_another_size(tmp_path):
    info = ModelInfo("regnety_002", 2, (32, 32))
    model = info.build(seed=7)
    save_model_folder(tmp_path / "m", model, info)
    again, info = tlvit.load(tmp_path / "m", image_size=64)
    assert info.image_size == (64, 64)
    assert_same_arrays(again, model)


def test_other_options(tmp_path):
    """Options that keep the arrays are taken; others are an error that lists the arrays."""
    save_model_folder(tmp_path / "m", INFO.build(), INFO)
    model, info = tlvit.load(tmp_path / "m", rule="mean", dtype="bfloat16")
    assert (model.rule, info.options["rule"], info.inference_rule) == ("mean", "mean", "mean")
    assert {a.dtype for a in model_arrays(model).values()} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match=r"m, a lvvit_m: 2 tensors do not fit this LVViT:\n  aux_head/bias"):
        tlvit.load(tmp_path / "m", token_head=False)


def test_a_folder_with_a_wrong_record_is_refused(tmp_path):
    wrong = dataclasses.replace(INFO, num_classes=4, class_names=None)
    save_model_folder(tmp_path / "m", INFO.build(), wrong)
    with pytest.raises(
        ValueError,
        match=r"m, a lvvit_m: 4 tensors do not fit this LVViT:\n.*head/bias: is \[3\], wanted \[4\]",
    ):
        tlvit.load(tmp_path / "m")


def test_a_folder_with_nan_weights_is_refused(tmp_path):
    model = INFO.build()
    model.head.bias[...] = model.head.bias[...].at[1].set(jnp.nan)
    save_model_folder(tmp_path / "m", model, INFO)
    with pytest.raises(ValueError, match="m is not usable: 1 of 3 values of head/bias are NaN or infinite"):
        tlvit.load(tmp_path / "m")


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is not a tlvit model folder"):
        tlvit.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint"):
        tlvit.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        tlvit.load(tmp_path / "nothing")


def make_state(model):
    """A TrainState with SGD whose average is twice the raw weights."""
    _, params, stats = functionalize(model)
    state = state_from(params, stats, optax.sgd(0.1, momentum=0.9))
    return dataclasses.replace(state, ema=jax.tree.map(lambda x: 2 * x, {"params": params, "stats": stats}))


@pytest.mark.parametrize(
    ("best", "weights", "factor"),
    [
        (None, "auto", 2),
        (None, "ema", 2),
        (None, "raw", 1),
        ("raw", "auto", 1),
        ("raw", "ema", 2),
        ("ema", "auto", 2),
        ("ema", "raw", 1),
    ],
)
def test_workdir_gives_the_best_the_averaged_or_the_raw_weights(tmp_path, best, weights, factor):
    model, info = INFO.build(), dataclasses.replace(INFO, best_weights=best)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(make_state(model), extra=info.to_json())
    checkpoints.close()
    opened = open_checkpoint(tmp_path, weights=weights)
    assert opened.info == info
    assert opened.section == f"step 0, {'raw' if factor == 1 else 'ema'} weights"
    found, raw = to_torch(opened.model), to_torch(model)
    np.testing.assert_array_equal(found["norm.weight"], raw["norm.weight"] * factor)
    stats = "patch_embed.bn1.running_var"
    np.testing.assert_array_equal(found[stats], raw[stats] * factor)


# Version 0.1

# The record that version 0.1 saved with every checkpoint.
RECORD_0_1 = {
    "model": "lvvit_m",
    "num_classes": 3,
    "image_size": [64, 32],
    "overrides": {"dtype": "float32", **TINY},
    "class_names": ["a", "b", "c"],
    "preprocessing": {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.7,
    },
}


def write_workdir_0_1(workdir, model, *, step=5):
    """Writes a workdir as version 0.1 did, with Orbax alone: flat names of arrays, no best_weights.

    Returns:
      The arrays by flat name.
    """
    arrays = {"step": jnp.asarray(step, jnp.int32), "key": jax.random.key_data(jax.random.key(3))}
    _, params, stats = functionalize(model)
    for kind, tree in (("params", params), ("stats", stats)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = "/".join(key.key for key in path)
            arrays[f"{kind}/{name}"] = leaf
            arrays[f"ema/{kind}/{name}"] = 2 * leaf
            if kind == "params":
                arrays[f"opt_state/0/trace/{name}"] = 3 * leaf
    manager = ocp.CheckpointManager((workdir / "checkpoints").absolute())
    items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), extra=ocp.args.JsonSave(RECORD_0_1))
    manager.save(step, args=items, metrics={"score": 50.0})
    manager.wait_until_finished()
    manager.close()
    return arrays


def test_workdirs_of_version_0_1_load_for_inference(tmp_path):
    model = INFO.build(seed=7)
    write_workdir_0_1(tmp_path, model)
    raw = to_torch(model)
    for weights, factor in (("auto", 2), ("ema", 2), ("raw", 1)):
        found, info = tlvit.load(tmp_path, weights=weights)
        assert info == dataclasses.replace(INFO, options={"dtype": "float32", **TINY})
        assert (info.best_weights, info.preprocessing.interpolation) == (None, "bicubic")
        for name, array in to_torch(found).items():
            np.testing.assert_array_equal(array, raw[name] * np.asarray(factor, array.dtype), err_msg=name)
    wide, info = tlvit.load(tmp_path, image_size=(32, 96))
    assert (wide.grid, info.image_size) == ((2, 6), (32, 96))


def test_runs_of_version_0_1_resume_bit_for_bit(tmp_path):
    arrays = write_workdir_0_1(tmp_path, INFO.build(seed=7))
    target = make_state(INFO.build(seed=8))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, extra = checkpoints.restore(target)
    checkpoints.close()
    assert extra == RECORD_0_1
    assert int(state.step) == 5
    assert state.key == jax.random.key(3)
    for tree, prefix in (
        (state.params, "params/"),
        (state.stats, "stats/"),
        (state.ema["params"], "ema/params/"),
        (state.ema["stats"], "ema/stats/"),
        (state.opt_state[0].trace, "opt_state/0/trace/"),
    ):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            np.testing.assert_array_equal(leaf, arrays[prefix + "/".join(key.key for key in path)])


def test_importing_tlvit_loads_nothing_heavy():
    code = (
        "import sys, tlvit;"
        "heavy = {'torch', 'tensorflow', 'orbax', 'matplotlib', 'PIL', 'safetensors'} & set(sys.modules);"
        "assert not heavy, heavy; assert callable(tlvit.load);"
        "heavy = {'torch', 'tensorflow', 'matplotlib'} & set(sys.modules); assert not heavy, heavy;"
        "import tlvit.checkpoints.load; assert callable(tlvit.load)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
