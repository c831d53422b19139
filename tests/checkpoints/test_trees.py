"""Flat dicts keyed by path: round trips of dicts, training states and models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tlvit import create_model
from tlvit.checkpoints.trees import (
    flatten,
    model_arrays,
    set_model_arrays,
    unflatten,
    unflatten_like,
)
from tlvit.training.state import state_from


def test_nested_dicts_round_trip():
    tree = {"a": {"0": 1, "10": {"b": 2}}, "c": 3}
    assert flatten(tree) == {"a/0": 1, "a/10/b": 2, "c": 3}
    assert unflatten(flatten(tree)) == tree
    assert flatten({"a": {}}) == flatten({}) == unflatten({}) == {}


def test_paths_of_a_training_state():
    """These are the names of the arrays on disk, so they must never change."""
    params = {"blocks": {"0": {"kernel": jnp.ones((2, 3))}}}
    state = state_from(params, {"bn": {"mean": jnp.zeros(2)}}, optax.adam(1e-3))
    flat = flatten(state)
    assert sorted(flat) == [
        "ema/params/blocks/0/kernel",
        "ema/stats/bn/mean",
        "key",
        "opt_state/0/count",
        "opt_state/0/mu/blocks/0/kernel",
        "opt_state/0/nu/blocks/0/kernel",
        "params/blocks/0/kernel",
        "stats/bn/mean",
        "step",
    ]
    again = unflatten_like(state, flat)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))


def test_arrays_of_a_model():
    build = lambda: create_model(
        "lvvit_s", num_classes=5, image_size=32, dim=24, depth=11, num_heads=2, stem_width=8
    )
    model, abstract = build(), nnx.eval_shape(build)
    arrays = model_arrays(model)
    assert arrays["blocks/10/attn/qkv/kernel"].shape == (24, 72)
    assert arrays["patch_embed/bn1/mean"].shape == (8,)
    assert {k: (v.shape, v.dtype) for k, v in model_arrays(abstract).items()} == {
        k: (v.shape, v.dtype) for k, v in arrays.items()
    }
    set_model_arrays(abstract, arrays)
    images = np.ones((1, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(abstract(images).logits, model(images).logits)
    set_model_arrays(model, {"head/bias": np.arange(5.0), "patch_embed/bn1/mean": np.arange(8.0)})
    np.testing.assert_array_equal(model.head.bias[...], np.arange(5.0))
    np.testing.assert_array_equal(model.patch_embed.bn1.mean[...], np.arange(8.0))
    np.testing.assert_array_equal(model.head.kernel[...], arrays["head/kernel"])
