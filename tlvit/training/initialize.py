"""The state that a run starts from: its last checkpoint, the weights of another one, or new weights."""

import contextlib
import dataclasses
import logging
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from tlvit.checkpoints.fit import fit_arrays, resizable
from tlvit.checkpoints.load import HEADS, load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import Checkpoints
from tlvit.checkpoints.native.step_folders import complete_steps
from tlvit.checkpoints.trees import model_arrays, set_model_arrays
from tlvit.config import Config, Model, resolve
from tlvit.models.functional import functionalize
from tlvit.models.table import model_options, model_task
from tlvit.records import read_json
from tlvit.training.mesh import state_shardings
from tlvit.training.state import TrainState, abstract_state, init_state, state_from

log = logging.getLogger("tlvit")

# Options that a run chooses for itself. All others say what the arrays are and how they are used.
OF_THE_RUN = (
    "dtype", "attention", "remat", "scan_blocks", "drop_rate", "attn_drop", "drop_path", "token_drop",
)  # fmt: skip


# Arrays of a segmentation model that no classifier has.
NOT_IN_CLASSIFIERS = ("decode_head", "auxiliary_head", "side_layer")
# Options of a classifier that mean nothing in the backbone of a segmentation model.
OF_CLASSIFIERS = ("token_head", "rule", "token_weight")


def take_options(config: Config, workdir: pathlib.Path) -> Config:
    """The settings, with the options of `config.model.init_from` that the recipe leaves open.

    A recipe can then name a checkpoint of a model with sizes of its own without repeating them. Dropout,
    drop path, dtype, remat and scan_blocks are the recipe's. A segmentation model takes the options of a
    classifier for its backbone, except those that it sets itself, as upernet_lvvit_l does with skip_lam. A
    run that has checkpoints takes the options that it started with, because the checkpoint of `init_from` may
    be gone.

    Raises:
      ValueError, OSError: the checkpoint cannot be opened.
    """
    if not config.model.init_from:
        return config
    name, theirs = _options_of_the_start(config, workdir)
    given, wanted = config.model.options, config.model.name
    own = OF_THE_RUN
    if model_task(wanted) != model_task(name):  # the classifier becomes the backbone
        defaults = model_options(wanted)
        own = (*own, *OF_CLASSIFIERS, *(k for k, value in defaults.items() if value is not None))
        wanted = {**defaults, **given}.get("backbone", "")
    taken = {k: v for k, v in theirs.items() if k not in (*own, *given)}
    if name != wanted or not taken:
        return config
    listed = ", ".join(f"{option}={value}" for option, value in taken.items())
    log.info("options of the model, as in %s: %s", config.model.init_from, listed)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, options={**taken, **given}))


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
    model = _load_weights(config.model, build(), info)
    _, params, stats = functionalize(model)
    # In a program, because a PRNG key cannot be put on the devices of other processes.
    make = lambda params, stats: state_from(params, stats, tx, seed=config.seed, ema=ema)
    arrays = jax.device_get((params, stats))
    return jax.jit(make, out_shardings=state_shardings(jax.eval_shape(make, *arrays), mesh))(*arrays)


def _options_of_the_start(config: Config, workdir: pathlib.Path) -> tuple[str, Mapping[str, Any]]:
    """(name, options) of the model that a run with `init_from` started with, or starts with."""
    if complete_steps(workdir / "checkpoints"):
        with contextlib.suppress(OSError, ValueError):  # of a damaged config.json: init_from has them
            saved = resolve(read_json(workdir / "config.json")).model
            return saved.name, saved.options
    _, info = load(config.model.init_from)
    return info.model, info.options


def _load_weights(settings: Model, model: nnx.Module, info: ModelInfo) -> nnx.Module:
    """Fills a model, which `info` describes, with the weights of the checkpoint `settings.init_from`.

    Position embeddings are resized to the model's token grid. Heads for another number of classes are
    reinitialized. A classifier fills the backbone of a segmentation model, whose other layers keep their new
    weights. Anything else that differs, and that init_missing and init_unexpected do not name, is an error.
    """
    path = settings.init_from
    other, other_info = load(path)
    heads = () if other_info.num_classes == info.num_classes else HEADS
    saved = model_arrays(other)
    if model_task(info.model) == "segmentation" and model_task(other_info.model) == "classification":
        saved, heads = backbone_arrays(saved), NOT_IN_CLASSIFIERS
    shapes = {name: tuple(array.shape) for name, array in model_arrays(model).items()}
    for prefix in settings.init_missing:
        if not any(name.startswith(prefix) for name in shapes):
            raise ValueError(
                f"config.model.init_missing={prefix}: no parameter of {info.model} begins with it; they "
                f"begin with {', '.join(_modules(shapes))}."
            )
    try:
        arrays, report = fit_arrays(
            model,
            shapes,
            saved,
            allow=(*heads, *resizable(saved)),
            missing=settings.init_missing,
            unexpected=settings.init_unexpected,
            pos_grid=other.grid,
        )
    except ValueError as error:
        hint = _hint(shapes.keys() - saved.keys(), saved.keys() - shapes.keys())
        raise ValueError(_explain(path, other_info, info, error) + hint) from error
    set_model_arrays(model, arrays)
    log.info("starting from %s; tensors:\n%s", path, report)
    return model


def backbone_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a classifier as those of the backbone of a segmentation model, without norm and heads."""
    kept = {name: array for name, array in arrays.items() if not name.startswith((*HEADS, "norm/"))}
    return {f"backbone/{name}": array for name, array in kept.items()}


def _explain(path: str, other: ModelInfo, info: ModelInfo, error: ValueError) -> str:
    """The message for weights that do not fit: what the checkpoint holds and which settings to change."""
    what = f"config.model.init_from={path} does not fit:"
    theirs = {**model_options(other.model), **other.options}
    ours = {**model_options(info.model), **info.options}
    wanted, setting, apart = info.model, "name", OF_THE_RUN
    if model_task(info.model) != model_task(other.model) and "backbone" in ours:
        wanted, setting, apart = ours["backbone"], "options.backbone", (*OF_THE_RUN, *OF_CLASSIFIERS)
        ours = {**model_options(wanted), **{k: v for k, v in ours.items() if k in theirs and v is not None}}
    if other.model != wanted:
        return (
            f"{what} it holds a {other.model}, and this run trains a {wanted}. Set "
            f"config.model.{setting}={other.model}, or choose a checkpoint of a {wanted}."
        )
    differing = [k for k in ours if k not in apart and ours[k] != theirs[k]]
    if not differing:
        return f"{what} {error}"
    return (
        f"{what} its {other.model} has {', '.join(f'{k}={theirs[k]}' for k in differing)}, and this run's "
        f"{', '.join(f'{k}={ours[k]}' for k in differing)}. Change or leave out "
        f"{', '.join(f'config.model.options.{k}' for k in differing)}."
    )


def _hint(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """The settings that accept a checkpoint without, or with further, complete parts of the model."""
    names = {"init_missing": _modules(missing), "init_unexpected": _modules(unexpected)}
    flags = [f"--config.model.{setting}={','.join(parts)}" for setting, parts in names.items() if parts]
    optional = {*HEADS, "dist_token"}.issuperset(names["init_missing"] + names["init_unexpected"])
    return f" To start from it all the same: {' '.join(flags)}." if flags and optional else ""


def _modules(names: Iterable[str]) -> list[str]:
    """The first parts of names such as "aux_head/kernel", sorted."""
    return sorted({re.split("[./]", name)[0] for name in names})
