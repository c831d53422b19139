"""Everything that a training step changes, as one pytree of plain nested dicts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tlvit.models.functional import Net, functionalize
from tlvit.training.mesh import replicated
from tlvit.types import Array, PyTree, pytree


@pytree
class TrainState:
    """Attributes:
    step: int32 scalar, optimizer steps done.
    params: trained arrays.
    stats: BatchNorm statistics and fixed buffers.
    opt_state: of the optimizer.
    ema: {"params", "stats"}, their moving average; or None.
    key: PRNG key of the run; step s uses fold_in(key, s).
    """

    step: Array
    params: PyTree
    stats: PyTree
    opt_state: PyTree
    ema: PyTree
    key: Array


def abstract_model(build: Callable[[], nnx.Module]) -> tuple[Net, PyTree, PyTree]:
    """`functionalize` of a model that is never allocated: shapes in place of arrays."""
    return functionalize(nnx.eval_shape(build))


def init_state(
    build: Callable[[], nnx.Module],
    make_tx: Callable[[PyTree], optax.GradientTransformation],
    *,
    mesh: Mesh,
    seed: int = 0,
    ema: bool = True,
) -> tuple[Net, optax.GradientTransformation, TrainState]:
    """Builds the model abstractly, then the whole state in one compiled call, already in its place on the
    mesh.

    Args:
      build: makes the model, e.g. lambda: create_model("lvvit_s").
      make_tx: params (shapes) -> optimizer.
      mesh: the devices.
      seed: of the run's random numbers.
      ema: keep a moving average.

    Returns:
      (net, optimizer, state).
    """
    net, params, _ = abstract_model(build)
    tx = make_tx(params)

    def init() -> TrainState:
        _, params, stats = functionalize(build())
        return state_from(params, stats, tx, seed=seed, ema=ema)

    # The program runs once: on a CPU, compiling it with all optimizations costs five times what that saves.
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    return net, tx, jax.jit(init, out_shardings=replicated(mesh), compiler_options=quick)()


def state_from(
    params: PyTree, stats: PyTree, tx: optax.GradientTransformation, *, seed: int = 0, ema: bool = True
) -> TrainState:
    """The state at step 0 of a run that starts from (copies of) these weights; so does the average."""
    params, stats = jax.tree.map(jnp.copy, (params, stats))  # a training step gives its arrays away
    average = jax.tree.map(jnp.copy, {"params": params, "stats": stats}) if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        opt_state=tx.init(params),
        ema=average,
        key=jax.random.key(seed),
    )
