"""Loads the model that runs inside the training step: a teacher or an annotator."""

import logging

from flax import nnx
from jax.sharding import Mesh

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import Config, parse_image_size
from tlvit.models.functional import Net, functionalize
from tlvit.training.mesh import place, replicated, state_shardings
from tlvit.training.task import Teacher
from tlvit.types import PyTree

log = logging.getLogger("tlvit")


def load_step_teacher(config: Config, info: ModelInfo, mesh: Mesh) -> Teacher | None:
    """The model that the settings ask for, `distill.teacher` or `data.annotator`; None without one.

    Args:
      config: settings of the run.
      info: the model that is trained.
      mesh: the devices. Parameters are placed as those of the run's state.

    Raises:
      ValueError: it cannot be opened, has another number of classes than the data, or has no dense logits,
        which an annotator needs.
      FileNotFoundError: there is no such file.
    """
    if config.data.annotator:
        return load_annotator(config, info, mesh)
    return load_teacher(config, info, mesh) if config.distill.teacher else None


def load_teacher(config: Config, info: ModelInfo, mesh: Mesh) -> Teacher:
    """Opens `config.distill.teacher` at the image size of the run."""
    path = config.distill.teacher
    model, found = load(path, image_size=info.image_size, dtype=config.model.dtype)
    _check_classes(f"The teacher {path}", found, info)
    log.info("teacher: %s from %s, %s distillation", found.model, path, config.distill.kind)
    return Teacher(*_placed(model, mesh))


def load_annotator(config: Config, info: ModelInfo, mesh: Mesh) -> Teacher:
    """Opens `config.data.annotator` at its own image size, or at `config.data.annotator_image_size`."""
    path = config.data.annotator
    size = parse_image_size(config.data.annotator_image_size) if config.data.annotator_image_size else None
    model, found = load(path, image_size=size, dtype=config.model.dtype)
    if not model.has_dense_logits:
        raise ValueError(
            f"config.data.annotator={path} is a {found.model} without dense logits, so it cannot score the "
            "cells of an image."
        )
    _check_classes(f"The annotator {path}", found, info)
    if found.class_names and info.class_names and found.class_names != info.class_names:
        pairs = zip(found.class_names, info.class_names, strict=True)
        number, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        log.warning(
            "warning: class %d of the annotator is called %s, and that of the data %s: the classes must be "
            "the same, in the same order",
            number, theirs, ours,
        )  # fmt: skip
    return Teacher(*_placed(model, mesh), info=found)


def _check_classes(what: str, found: ModelInfo, info: ModelInfo) -> None:
    if found.num_classes != info.num_classes:
        raise ValueError(f"{what} has {found.num_classes} classes, but the data have {info.num_classes}.")


def _placed(model: nnx.Module, mesh: Mesh) -> tuple[Net, PyTree, PyTree]:
    """(net, params, stats) on the devices."""
    net, params, stats = functionalize(model)
    return net, place(params, state_shardings(params, mesh)), place(stats, replicated(mesh))
