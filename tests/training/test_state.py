"""The training state: initialized on the mesh, equal to the model that it is made from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tlvit
from tlvit.models.functional import functionalize
from tlvit.training.mesh import make_mesh, replicated
from tlvit.training.state import abstract_model, abstract_state, init_state, state_from


def build():
    return tlvit.create_model(
        "lvvit_s", dim=16, depth=1, num_heads=2, stem_width=4, image_size=32, num_classes=3, seed=4
    )


@pytest.mark.slow
def test_the_state_equals_the_model_and_is_on_every_device():
    mesh, tx = make_mesh(), optax.adam(1e-3)
    net = abstract_model(build)[0]
    start = init_state(build, tx, mesh=mesh, seed=9)
    _, params, stats = functionalize(build())
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7)
    jax.tree.map(close, (start.params, start.stats), (params, stats))
    jax.tree.map(close, start.ema, {"params": params, "stats": stats})
    assert all(x.sharding.is_equivalent_to(replicated(mesh), x.ndim) for x in jax.tree.leaves(start))
    assert (int(start.step), start.step.dtype) == (0, jnp.int32)
    assert start.key == jax.random.key(9)
    assert jax.tree.structure(start.opt_state) == jax.tree.structure(jax.eval_shape(tx.init, params))
    images = np.random.RandomState(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(
        net.apply(start.params, start.stats, images)[0].logits, build()(images).logits, atol=1e-5
    )


def test_no_two_leaves_share_memory():
    """A buffer that occurs twice cannot be donated."""
    start = init_state(build, optax.adam(1e-3), mesh=make_mesh(jax.devices()[:1]))
    leaves = [x for x in jax.tree.leaves(start) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    pointers = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(pointers)) == len(pointers)


def test_the_average_is_optional():
    start = state_from({"a": jnp.ones(2)}, {}, optax.sgd(0.1), ema=False)
    assert start.ema is None
    kept = state_from({"a": jnp.ones(2)}, {"b": jnp.zeros(1)}, optax.sgd(0.1))
    assert set(kept.ema) == {"params", "stats"}
    assert kept.ema["params"]["a"].unsafe_buffer_pointer() != kept.params["a"].unsafe_buffer_pointer()


def test_abstract_model_allocates_nothing():
    net, params, _ = abstract_model(lambda: tlvit.create_model("lvvit_l", image_size=448))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    logits = jax.eval_shape(net.apply, params, _, jax.ShapeDtypeStruct((2, 448, 448, 3), jnp.float32))[
        0
    ].logits
    assert logits.shape == (2, 1000)


def test_the_abstract_state_has_the_shapes_and_places_of_the_real_one():
    mesh, tx = make_mesh(), optax.adam(1e-3)
    abstract, start = abstract_state(build, tx, mesh=mesh), init_state(build, tx, mesh=mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(start)
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(start), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert abstract_state(build, tx, mesh=mesh, ema=False).ema is None
