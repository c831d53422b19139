"""The training state: born on the mesh, equal to the model it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tlvit
from tlvit.models.functional import functionalize
from tlvit.training import mesh as sharding
from tlvit.training import state


def build():
    return tlvit.create_model(
        "lvvit_s", dim=16, depth=1, num_heads=2, stem_width=4, image_size=32, num_classes=3, seed=4
    )


def test_the_state_is_the_models_and_lies_on_every_device():
    mesh = sharding.make_mesh()
    shapes = []

    def make_tx(params):
        shapes.append(jax.tree.map(lambda x: x.shape, params))
        return optax.adam(1e-3)

    net, tx, start = state.init_state(build, make_tx, mesh=mesh, seed=9)
    _, params, stats = functionalize(build())
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7)
    jax.tree.map(close, (start.params, start.stats), (params, stats))
    jax.tree.map(close, start.ema, {"params": params, "stats": stats})
    assert shapes == [jax.tree.map(lambda x: x.shape, params)]
    assert all(x.sharding.is_equivalent_to(sharding.replicated(mesh), x.ndim) for x in jax.tree.leaves(start))
    assert (int(start.step), start.step.dtype) == (0, jnp.int32)
    assert start.key == jax.random.key(9)
    assert jax.tree.structure(start.opt_state) == jax.tree.structure(jax.eval_shape(tx.init, params))
    images = np.random.RandomState(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(
        net.apply(start.params, start.stats, images)[0].logits, build()(images).logits, atol=1e-5
    )


def test_no_two_leaves_share_memory():
    """Donation would refuse, or corrupt, a buffer that is there twice."""
    _, _, start = state.init_state(
        build, lambda p: optax.adam(1e-3), mesh=sharding.make_mesh(jax.devices()[:1])
    )
    leaves = [x for x in jax.tree.leaves(start) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    pointers = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(pointers)) == len(pointers)


def test_the_average_is_optional():
    start = state.state_from({"a": jnp.ones(2)}, {}, optax.sgd(0.1), ema=False)
    assert start.ema is None
    kept = state.state_from({"a": jnp.ones(2)}, {"b": jnp.zeros(1)}, optax.sgd(0.1))
    assert set(kept.ema) == {"params", "stats"}
    assert kept.ema["params"]["a"].unsafe_buffer_pointer() != kept.params["a"].unsafe_buffer_pointer()


def test_abstract_model_allocates_nothing():
    net, params, _ = state.abstract_model(lambda: tlvit.create_model("lvvit_l", image_size=448))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    logits = jax.eval_shape(net.apply, params, _, jax.ShapeDtypeStruct((2, 448, 448, 3), jnp.float32))[
        0
    ].logits
    assert logits.shape == (2, 1000)
