"""Blocks that run as one loop give the numbers of blocks that run one after the other."""

import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from conftest import images, randn
from flax import nnx

from tlvit.models import functional, layers
from tlvit.models.t2t_blocks import Transition
from tlvit.models.transformer import Block
from tlvit.ops.mixing import mixtoken_mask_from_box

OPTIONS = {"mlp_ratio": 1.0, "qkv_bias": True, "epsilon": 1e-6}


def blocks_of(rates, **more):
    rngs = nnx.Rngs(0)
    return nnx.List(Block(4, 2, drop_path=rate, rngs=rngs, **OPTIONS, **more) for rate in rates)


def loops(blocks, **options):
    """Lengths of the loops in the program of the blocks."""
    program = jax.make_jaxpr(lambda x: layers.run_blocks(blocks, x, None, scan=True, **options))
    equations = program(jnp.zeros((2, 3, 4))).jaxpr.eqns
    return [equation.params["length"] for equation in equations if equation.primitive.name == "scan"]


@pytest.mark.parametrize(
    ("remat", "options"),
    [
        (False, {"rates": (0.0, 0.3, 0.6)}),
        pytest.param(True, {"rates": (0.0, 0.3, 0.6)}, marks=pytest.mark.slow),
        pytest.param(
            False, {"rates": (0.0, 0.0, 0.0), "drop_rate": 0.2, "attn_drop": 0.1}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_loop_equals_the_blocks_one_after_the_other(remat, options):
    """Outputs and gradients, with the same keys and rates of dropout and drop path."""
    blocks = blocks_of(**options)
    net, params, _ = functional.functionalize(blocks)
    x = randn(8, 3, 4)

    def score(params, key, scan):
        bound = net.bind(params, {})
        return jnp.sum(jnp.sin(layers.run_blocks(bound, x, key, remat=remat, scan=scan)))

    expected, got = (
        jax.jit(jax.value_and_grad(score), static_argnums=2)(params, jax.random.key(1), scan)
        for scan in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6), expected, got)


@pytest.mark.slow
def test_bfloat16_stays():
    x = jnp.asarray(randn(8, 3, 4), jnp.bfloat16)
    blocks, key = blocks_of((0.1, 0.3), dtype=jnp.bfloat16), jax.random.key(1)
    expected, got = (layers.run_blocks(blocks, x, key, scan=scan) for scan in (False, True))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), atol=0.02)


def test_loops_end_where_the_structure_changes():
    blocks = blocks_of((0.0, 0.1, 0.2, 0.3, 0.4))
    assert loops(blocks) == [5]
    blocks[2].skip_lam = 2.0
    assert loops(blocks) == [2, 2]
    assert loops(nnx.List([*blocks_of((0.0, 0.1)), Transition(4, rngs=nnx.Rngs(0))])) == [2]
    assert loops(blocks_of((0.0,))) == []


@pytest.mark.parametrize("name", ["lvvit_s", "deit_tiny_patch16_224", "t2t_vit_7"])
def test_models_run_their_blocks_as_a_loop_and_have_the_same_parameters(name):
    models = [
        nnx.eval_shape(lambda scan=scan: model_goldens.fresh(name, depth=3, scan_blocks=scan))
        for scan in (False, True)
    ]
    (_, params, stats), (net, same, _) = (functional.functionalize(model) for model in models)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, same)
    program = jax.make_jaxpr(lambda p, s, x: net.apply(p, s, x)[0].logits)(params, stats, images())
    (loop,) = (e for e in program.jaxpr.eqns if e.primitive.name == "scan")
    assert loop.params["length"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lvvit_s", {"drop_path": 0.5}),
        ("lvvit_s", {"drop_path": 0.5, "remat": True}),
        ("deit_tiny_distilled_patch16_224", {"token_head": True}),
        ("t2t_vit_7", {"token_head": True, "drop_path": 0.5}),
        ("t2t_vit_14_se", {"token_head": True, "attn_drop": 0.3}),
        ("t2t_vit_dense", {"token_head": True, "depth": (2, 1), "growth": 8}),
    ],
)
def test_models_have_the_same_parameters_outputs_and_gradients(name, options):
    mix = mixtoken_mask_from_box((0, 1, 2, 2), (2, 2))
    found = []
    for scan in (False, True):
        model = model_goldens.small(name, **{"depth": 3, **options}, scan_blocks=scan)
        net, params, stats = functional.functionalize(model)

        def score(params, net=net, stats=stats):
            output, _ = net.apply(params, stats, images(), mix=mix, train=True, key=jax.random.key(3))
            return jnp.mean(output.logits**2) + jnp.mean(output.tokens**2)

        found.append(jax.jit(jax.value_and_grad(score))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6), *found)


@pytest.mark.slow
def test_intermediates_of_a_loop():
    x, key = images(), jax.random.key(2)
    options = {"depth": 5, "drop_path": 0.5}
    plain, loop = (model_goldens.small("lvvit_s", **options, scan_blocks=scan) for scan in (False, True))
    for expected, got in zip(
        plain.intermediates(x, [4, 1, 1], key=key), loop.intermediates(x, [4, 1, 1], key=key), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
