"""Refuses settings that do not fit the model, the data or the workdir, before a run starts."""

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from tlvit.config import Config, to_dict
from tlvit.models.functional import Net
from tlvit.models.table import model_options
from tlvit.ops.randaugment_policy import parse_policy
from tlvit.records import read_json

log = logging.getLogger("tlvit")

# A run may be resumed with other values of all settings but these.
FIXED = ("seed", "image_size", "token_labels", "batch_size", "model.name", "model.options", "data.name",
         "data.train_split")  # fmt: skip
# These change the order of the images from the next step on.
ORDER = ("data.shuffle_gib", "augment.repeats")
HINTS = {"batch_size": " (optim.accumulate=N runs a batch in N parts, which needs less memory)"}


def check_model(config: Config, net: Net) -> None:
    """Checks what the settings ask of the model.

    Raises:
      ValueError: a model of another task, a recipe that fine-tunes without weights to start from, token
        labels without a token head, MixToken without patch tokens, token labels without score maps, a
        distillation token without a teacher or a teacher without a distillation token, or a malformed
        RandAugment policy.
    """
    parse_policy(config.augment.randaugment)
    name, teacher = config.model.name, config.distill.teacher
    if net.task != config.task:
        raise ValueError(f"{name} is a model for {net.task}, but config.task is {config.task}.")
    if config.model.init_required and not config.model.init_from:
        raise ValueError(
            "This recipe fine-tunes, but config.model.init_from is empty. Set it to a workdir, a model "
            "folder or a PyTorch file; --config.model.init_required=False starts from new weights."
        )
    if config.learns_patches and not net.has_token_head:
        raise ValueError(
            f"config.token_labels needs a model with a token head, but {name} has none. Set "
            "config.model.options.token_head=True (LV-ViT, T2T-ViT, DeiT), or config.token_labels=False."
        )
    if config.token_labels and config.loss.mixtoken and net.grid is None:
        raise ValueError(
            f"config.loss.mixtoken mixes patch tokens, but {name} has none. Set config.loss.mixtoken=False."
        )
    if config.needs_maps and not (config.data.score_maps or config.data.annotator):
        raise ValueError(
            "config.token_labels is on, but config.data.score_maps is empty. Make score maps of the training "
            "images once (tlvit annotate --help), let an annotator score the images of every step "
            "(--config.data.annotator=CHECKPOINT), or train without them: "
            "--config.token_labels=False --config.augment.mixup=0.8 --config.augment.cutmix=1.0."
        )
    if net.has_distillation_token and not teacher:
        raise ValueError(
            f"{name} has a distillation token, which only a teacher trains: set config.distill.teacher (a "
            "workdir, a model folder or a PyTorch file), or choose a model without _distilled."
        )
    if teacher and not net.has_distillation_token:
        raise ValueError(f"config.distill.teacher is {teacher}, but {name} has no distillation token.")


def check_heads(config: Config, devices: int) -> None:
    """Checks that the devices of the mesh axis `model` divide the model's attention heads.

    Args:
      config: settings.
      devices: size of the axis.

    Raises:
      ValueError: the model has no attention heads, or their number is not a multiple of `devices`.
    """
    name = config.model.name
    options = {**model_options(name), **config.model.options}
    heads = options.get("num_heads", 0)
    attention = options.get("attention", "xla")
    if devices > 1 and attention != "xla":
        raise ValueError(
            f'config.model.options.attention="{attention}" does not divide the heads of an image on TPUs and '
            f'GPUs, and config.mesh.model is {devices}. Set it to 1, or attention="xla".'
        )
    if devices == 1 or (heads and heads % devices == 0):
        return
    if not heads:
        raise ValueError(
            f"config.mesh.model={devices} divides attention heads, but {name} has none: set it to 1."
        )
    fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
    raise ValueError(
        f"config.mesh.model={devices} cannot divide the {heads} attention heads of {name} evenly; "
        f"{fitting} can."
    )


def mixes_images(config: Config) -> bool:
    """Whether a training step mixes the images of a device in pairs: MixToken, mixup or cutmix."""
    mixtoken = config.token_labels and config.loss.mixtoken
    return mixtoken or bool(config.augment.mixup or config.augment.cutmix)


def check_workdir(workdir: pathlib.Path, config: Config, saved: Mapping[str, Any] | None = None) -> None:
    """Checks that the workdir's run has the same model, data and batch size.

    Its learning rate, length and augmentation may differ. Checkpoints count steps, and the order of the
    images depends on the batch size.

    Args:
      workdir: of the run.
      config: settings.
      saved: the settings that its last checkpoint records. Version 0.1 did not record them: then None, and
        config.json is read.

    Raises:
      OSError: config.json cannot be read.
      ValueError: lists the settings that differ; or config.json is damaged.
    """
    path = workdir / "config.json"
    if saved is None and not path.exists():
        log.warning("%s is missing: the settings of the run in this workdir are not compared", path)
        return
    old = read_json(path) if saved is None else saved
    new = json.loads(json.dumps(to_dict(config)))
    differing = [
        f"  {name}: {_get(old, name)!r} in the workdir, {_get(new, name)!r} now{HINTS.get(name, '')}"
        for name in FIXED
        if _get(old, name) != _get(new, name)
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds another run. Use a new --workdir, or its settings:\n" + "\n".join(differing)
        )
    for name in ORDER:
        if _get(old, name) != _get(new, name):
            log.warning(
                "%s was %r and is now %r: the order of the images changes",
                name, _get(old, name), _get(new, name),
            )  # fmt: skip


def _get(record: Mapping[str, Any], name: str) -> object:
    section, _, key = name.rpartition(".")
    values = record.get(section) if section else record
    return values.get(key) if isinstance(values, Mapping) else None
