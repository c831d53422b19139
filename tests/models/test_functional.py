"""Modules as pure functions over nested dicts."""

import functools

import conftest
import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from flax import nnx

import tlvit
from tlvit.models import batch_norm, functional
from tlvit.ops import mixing
from tlvit.types import ModelOutput


def small(name="lvvit_s", **options):
    return model_goldens.fresh(name, **options)


images = functools.partial(conftest.images, 4)


def keys_of(tree):
    return {k for path, _ in jax.tree_util.tree_leaves_with_path(tree) for k in (p.key for p in path)}


def test_params_and_stats_are_plain_nested_dicts_with_string_keys():
    _, params, stats = functional.functionalize(small())
    assert type(params) is dict
    assert type(params["blocks"]["1"]) is dict
    assert all(isinstance(k, str) for k in keys_of(params) | keys_of(stats))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((params, stats)))
    assert set(stats["patch_embed"]) == {"bn1", "bn2", "bn3"}
    assert set(stats["patch_embed"]["bn1"]) == {"mean", "var"}
    assert functional.count_parameters({"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros(5)}}) == 17


def test_apply_equals_the_module_and_leaves_the_stats():
    model = small()
    net, params, stats = functional.functionalize(model)
    output, new = net.apply(params, stats, images())
    direct = model(images())
    for got, expected in zip(jax.tree.leaves(output), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert new is stats


def test_training_moves_the_stats_and_nothing_else():
    model = small()
    before = jax.tree.map(np.array, functional.functionalize(model)[1:])
    net, params, stats = functional.functionalize(model)
    output, new = jax.jit(lambda p, s, x: net.apply(p, s, x, train=True))(params, stats, images())
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), new, stats)
    assert min(jax.tree.leaves(moved)) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, (params, stats), before)
    jax.tree.map(np.testing.assert_array_equal, functional.functionalize(model)[1:], before)
    assert np.abs(output.logits - net.apply(params, stats, images())[0].logits).max() > 1e-4


def test_a_key_drops_and_no_key_does_not():
    net, params, stats = functional.functionalize(small("vit", drop_path=0.5, drop_rate=0.2))
    run = lambda key, train=True: np.asarray(net.apply(params, stats, images(), train=train, key=key)[0].cls)
    plain = run(None, train=False)
    np.testing.assert_allclose(run(None), plain, atol=1e-6)
    np.testing.assert_array_equal(run(jax.random.key(0), train=False), plain)  # evaluation never drops
    first, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-4
    assert np.abs(first - other).max() > 1e-4


def test_abstract_models_split_into_shapes_of_the_same_tree():
    build = lambda: small()
    concrete = functional.functionalize(build())
    abstract = functional.functionalize(nnx.eval_shape(build))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    assert shapes(concrete[1:]) == shapes(abstract[1:])
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract[1:]))
    # The abstract computation runs with the concrete arrays.
    expected = concrete[0].apply(*concrete[1:], images())[0].logits
    np.testing.assert_allclose(abstract[0].apply(*concrete[1:], images())[0].logits, expected, atol=1e-6)


def test_update_writes_back():
    model, other = small(seed=0), small(seed=1)
    _, params, stats = functional.functionalize(other)
    stats = jax.tree.map(lambda x: x + 0.5, stats)
    functional.update(model, params, stats)
    jax.tree.map(np.testing.assert_array_equal, functional.functionalize(model)[1:], (params, stats))
    assert np.abs(model(images()).logits - other(images()).logits).max() > 1e-4  # the statistics differ


def test_bind_gives_the_module_of_either_mode():
    net, params, stats = functional.functionalize(small())
    assert net.bind(params, stats).patch_embed.bn1.use_running_average is True
    assert net.bind(params, stats, train=True).patch_embed.bn1.use_running_average is False


def test_a_mask_for_a_model_without_tokens_is_refused():
    class Tiny(nnx.Module):
        def __init__(self):
            self.bn = batch_norm.BatchNorm(3)

        def __call__(self, x, key=None):
            x = jnp.mean(self.bn(x), (1, 2))
            return ModelOutput(logits=x, cls=x)

    net, params, stats = functional.functionalize(Tiny())
    assert net.apply(params, stats, images())[0].cls.shape == (4, 3)
    with pytest.raises(ValueError, match="Tiny has no token grid"):
        net.apply(params, stats, images(), mix=mixing.mixtoken_mask_from_box((0, 0, 1, 1), (2, 2)))


def test_gradients_reach_every_parameter():
    net, params, stats = functional.functionalize(small())
    score = lambda p: jnp.sum(net.apply(p, stats, images(), train=True)[0].logits ** 2)
    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(score))(params)):
        assert float(jnp.abs(g).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("name", "options", "grid", "token_head", "distillation_token", "dense_logits"),
    [
        ("lvvit_s", {"image_size": (32, 64)}, (2, 4), True, False, True),
        ("vit", {}, (14, 14), False, False, True),
        ("t2t_vit_7", {}, (14, 14), False, False, True),
        ("t2t_vit_7", {"token_head": True}, (14, 14), True, False, True),
        ("deit_tiny_patch16_224", {}, (14, 14), False, False, True),
        ("deit_tiny_distilled_patch16_224", {"token_head": True}, (14, 14), True, True, True),
        ("regnety_002", {}, None, False, False, True),
        ("dm_nfnet_f0", {}, None, False, False, True),
    ],
)
def test_model_and_net_declare_their_capabilities(
    name, options, grid, token_head, distillation_token, dense_logits
):
    model = nnx.eval_shape(lambda: tlvit.create_model(name, **options))
    for declared in (model, functional.functionalize(model)[0]):
        assert declared.grid == grid
        assert declared.has_token_head is token_head
        assert declared.has_distillation_token is distillation_token
        assert declared.has_dense_logits is dense_logits
