"""Settings of a run that contradict themselves, each other, the data or the workdir: refused at the start."""

import json
import logging
import pathlib

from ml_collections import ConfigDict

from tlvit.ops.losses import CLS_TARGETS, DISTILLATION
from tlvit.ops.randaugment_policy import parse_policy

log = logging.getLogger("tlvit")

CHOICES = {
    "data.label_crop": ("aligned", "published"),
    "augment.interpolation": ("bilinear", "bicubic", "random"),
    "augment.on": ("host", "device"),
    "loss.cls_target": CLS_TARGETS,
    "distill.kind": DISTILLATION,
    "model.dtype": ("float32", "bfloat16"),
    "eval.interpolation": ("bilinear", "bicubic"),
}
AT_LEAST = {
    "batch_size": 1, "floor_epochs": 0, "log_every": 1, "data.threads": 0, "data.shuffle_gib": 0,
    "augment.color_jitter": 0, "augment.repeats": 1, "augment.mixup": 0, "augment.cutmix": 0,
    "optim.weight_decay": 0, "optim.clip_norm": 0, "optim.warmup_epochs": 0, "optim.warmup_start": 0,
    "optim.floor": 0, "optim.lag_epochs": 0, "optim.accumulate": 1, "optim.reference_batch": 1,
    "eval.every_epochs": 0, "eval.batch_size": 0, "checkpoint.every_epochs": 0, "checkpoint.keep": 1,
}  # fmt: skip
SHARES = (
    "data.max_bad", "data.allow_missing_maps", "augment.flip", "augment.erasing", "loss.smoothing",
    "distill.alpha", "ema.decay", "eval.max_bad",
)  # fmt: skip


def check_numbers(config: ConfigDict) -> None:
    """Every value for itself.

    Raises:
      ValueError: one is not among its choices or out of its range; names it.
    """
    for name, known in CHOICES.items():
        if _get(config, name) not in known:
            raise ValueError(f"config.{name} must be {' or '.join(known)}, not {_get(config, name)!r}.")
    for name, least in AT_LEAST.items():
        if not _get(config, name) >= least:
            raise ValueError(f"config.{name} must be at least {least}, not {_get(config, name)}.")
    for name in SHARES:
        if not 0 <= _get(config, name) <= 1:
            raise ValueError(f"config.{name} is a share between 0 and 1, not {_get(config, name)}.")
    parse_policy(config.augment.randaugment)
    if not 0 < config.eval.crop_pct <= 1:
        raise ValueError(f"config.eval.crop_pct must lie in (0, 1], not {config.eval.crop_pct}.")
    for name, most in (("crop_scale", 1), ("crop_ratio", float("inf"))):
        pair = tuple(config.augment[name])
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
            limit = "" if most > 1 else " <= 1"
            raise ValueError(
                f"config.augment.{name} must be (low, high), 0 < low <= high{limit}, not {pair}."
            )


def check_config(config: ConfigDict, source) -> None:
    """Settings that would otherwise fail late, or be taken for something else.

    Raises:
      ValueError: says what contradicts what, with the numbers.
    """
    check_numbers(config)
    mixing = config.augment.mixup or config.augment.cutmix
    if config.token_labels and mixing:
        raise ValueError(
            "config.token_labels excludes augment.mixup and augment.cutmix: a mixed image's tokens would be "
            "judged by one image's score map. loss.mixtoken takes their place; set both to 0."
        )
    if not (config.token_labels or mixing or config.loss.plain_labels):
        raise ValueError(
            "Neither token labels nor mixup nor cutmix: on image labels alone a vision transformer overfits. "
            "Set config.augment.mixup=0.8 and augment.cutmix=1.0, or config.loss.plain_labels=True."
        )
    if config.batch_size > source.num_examples:
        raise ValueError(
            f"The {source.num_examples} training images are fewer than a batch of {config.batch_size}."
        )


def check_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """A workdir may be continued with another learning rate, but not as another model, on other data or with
    batches of another size, by which its steps and the order of its images are counted.

    Raises:
      ValueError: lists the settings that differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    old = json.loads(path.read_text())
    new = json.loads(json.dumps(config.to_dict()))
    keys = ["seed", "image_size", "token_labels", "batch_size"]
    pairs = {k: (old.get(k), new[k]) for k in keys}
    pairs |= {f"model.{k}": (old["model"].get(k), new["model"][k]) for k in ("name", "dtype", "options")}
    pairs |= {f"data.{k}": (old["data"].get(k), new["data"][k]) for k in ("name", "train_split")}
    hints = {"batch_size": " (optim.accumulate=N runs a batch in N parts, for less memory)"}
    differing = [f"  {k}: {a!r} there, {b!r} now{hints.get(k, '')}" for k, (a, b) in pairs.items() if a != b]
    if differing:
        raise ValueError(
            f"{workdir} holds another run; use a new --workdir, or the old settings:\n" + "\n".join(differing)
        )
    for section, key in (("data", "shuffle_gib"), ("augment", "repeats")):
        a, b = old[section].get(key), new[section][key]
        if a != b:
            log.warning(
                "%s.%s was %r and is %r: from here on images come in another order", section, key, a, b
            )


def score_map_folder(config: ConfigDict, source) -> str:
    """Where the score maps are, or a ValueError that says how to make them."""
    if config.data.score_maps:
        return config.data.score_maps
    raise ValueError(
        "config.token_labels is on but config.data.score_maps is empty. Make maps of the "
        f"{source.num_examples} images once (python -m tlvit.annotate --help), or train without them: "
        "--config.token_labels=False, with mixup and cutmix."
    )


def has_teacher(config: ConfigDict, *, distilled: bool) -> bool:
    """Whether the run distils a teacher, which takes a model with a distillation token, and the other way
    round."""
    name, teacher = config.model.name, config.distill.teacher
    if distilled and not teacher:
        raise ValueError(
            f"{name} has a distillation token, which only a teacher trains: set config.distill.teacher "
            "(a workdir, a model folder or a PyTorch file), or choose a model without _distilled."
        )
    if teacher and not distilled:
        raise ValueError(f"config.distill.teacher is {teacher}, but {name} has no distillation token.")
    if teacher and config.token_labels:
        raise ValueError(
            "config.distill.teacher and config.token_labels are two recipes: choose one of them."
        )
    return distilled


def _get(config: ConfigDict, name: str):
    section, _, key = name.rpartition(".")
    return (config[section] if section else config)[key]
