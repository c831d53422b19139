"""Loads the teacher of a model with a distillation token."""

import logging

import jax
from jax.sharding import Mesh

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import Config
from tlvit.models.functional import functionalize
from tlvit.training.mesh import replicated, state_shardings
from tlvit.training.step import Teacher

log = logging.getLogger("tlvit")


def load_teacher(config: Config, info: ModelInfo, mesh: Mesh) -> Teacher:
    """Opens `config.distill.teacher` at the image size of the run and places it as the state of a run.

    Raises:
      ValueError: the teacher has another number of classes than the data.
    """
    path = config.distill.teacher
    model, found = load(path, image_size=info.image_size, dtype=config.model.dtype)
    if found.num_classes != info.num_classes:
        raise ValueError(
            f"The teacher {path} has {found.num_classes} classes, but the data have {info.num_classes}."
        )
    net, params, stats = functionalize(model)
    params = jax.device_put(params, state_shardings(params, mesh))
    stats = jax.device_put(stats, replicated(mesh))
    log.info("teacher: %s from %s, %s distillation", found.model, path, config.distill.kind)
    return Teacher(net, params, stats)
