"""The state that a run starts from: its last checkpoint, the weights of another one, or new weights."""

import logging

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from tlvit.checkpoints.fit import fit_arrays
from tlvit.checkpoints.load import HEADS, load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import Checkpoints
from tlvit.checkpoints.trees import model_arrays, set_model_arrays
from tlvit.config import Config
from tlvit.models.functional import functionalize
from tlvit.training.mesh import replicated
from tlvit.training.state import TrainState, abstract_state, init_state, state_from

log = logging.getLogger("tlvit")


def initial_state(
    config: Config, info: ModelInfo, tx: optax.GradientTransformation, mesh: Mesh, checkpoints: Checkpoints
) -> TrainState:
    """Restores the last checkpoint of the workdir, or makes the state at step 0.

    Exactly one state is allocated.

    Args:
      config: settings of the run.
      info: its model.
      tx: its optimizer.
      mesh: the devices.
      checkpoints: of the workdir.

    Raises:
      ValueError: the checkpoints or `config.model.init_from` do not fit the model.
    """
    build = lambda: info.build(seed=config.seed)
    ema = config.ema.decay > 0
    restored = checkpoints.restore(abstract_state(build, tx, mesh=mesh, ema=ema))
    if restored is not None:
        return restored[0]
    if not config.model.init_from:
        return init_state(build, tx, mesh=mesh, seed=config.seed, ema=ema)
    model = _load_weights(config.model.init_from, build(), info.num_classes)
    _, params, stats = functionalize(model)
    return jax.device_put(state_from(params, stats, tx, seed=config.seed, ema=ema), replicated(mesh))


def _load_weights(path: str, model: nnx.Module, num_classes: int) -> nnx.Module:
    """Fills a model with the weights of a checkpoint.

    Position embeddings are resized to the model's token grid. Heads for another number of classes are
    reinitialized. Anything else that differs is an error.
    """
    other, other_info = load(path)
    heads = () if other_info.num_classes == num_classes else HEADS
    shapes = {name: tuple(array.shape) for name, array in model_arrays(model).items()}
    allow = (*heads, "pos_embed")
    arrays, report = fit_arrays(model, shapes, model_arrays(other), allow=allow, pos_grid=other.grid)
    set_model_arrays(model, arrays)
    log.info("starting from %s:\n%s", path, report)
    return model
