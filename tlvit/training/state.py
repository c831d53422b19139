"""The training state: everything that a training step changes, as one pytree of nested dicts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tlvit.models.functional import Net, functionalize
from tlvit.training.mesh import state_shardings
from tlvit.types import Array, PyTree, pytree


@pytree
class TrainState:
    """The state between two steps.

    Attributes:
      step: int32 scalar, number of optimizer steps done.
      params: trained arrays.
      stats: BatchNorm statistics and fixed buffers.
      opt_state: state of the optimizer.
      ema: {"params", "stats"}, their moving average; None without one.
      key: PRNG key of the run. Step s uses fold_in(key, s).
    """

    step: Array
    params: PyTree
    stats: PyTree
    opt_state: PyTree
    ema: PyTree
    key: jax.Array


def abstract_model(build: Callable[[], nnx.Module]) -> tuple[Net, PyTree, PyTree]:
    """`functionalize` of a model that is never allocated: (net, params, stats) with shapes for arrays."""
    return functionalize(nnx.eval_shape(build))


def abstract_state(
    build: Callable[[], nnx.Module], tx: optax.GradientTransformation, *, mesh: Mesh, ema: bool = True
) -> TrainState:
    """The shapes and shardings of a state, for restoring a checkpoint; nothing is allocated."""
    _, params, stats = abstract_model(build)
    shapes = jax.eval_shape(lambda p, s: state_from(p, s, tx, ema=ema), params, stats)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, state_shardings(shapes, mesh))


def init_state(
    build: Callable[[], nnx.Module],
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    seed: int = 0,
    ema: bool = True,
) -> TrainState:
    """Initializes a model and its whole state in one compiled call, directly on the mesh.

    Args:
      build: makes the model, for example lambda: create_model("lvvit_s").
      tx: the optimizer.
      mesh: the devices.
      seed: seeds the run's PRNG key (the model's initialization is seeded by `build`).
      ema: keep a moving average.
    """

    def init() -> TrainState:
        _, params, stats = functionalize(build())
        return state_from(params, stats, tx, seed=seed, ema=ema)

    # The program runs once. On a CPU, compiling it with optimizations takes five times what they save.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    shardings = state_shardings(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=shardings, compiler_options=options)()


def state_from(
    params: PyTree, stats: PyTree, tx: optax.GradientTransformation, *, seed: int = 0, ema: bool = True
) -> TrainState:
    """The state at step 0 of a run that starts from copies of these weights, as does the average."""
    params, stats = jax.tree.map(jnp.copy, (params, stats))  # a training step donates its arrays
    average = jax.tree.map(jnp.copy, {"params": params, "stats": stats}) if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        opt_state=tx.init(params),
        ema=average,
        key=jax.random.key(seed),
    )
