"""The table that a run prints at its start: devices, model, data, token labels, augmentation, schedule."""

import dataclasses
import logging

import jax
from jax.sharding import Mesh

from tlvit.config import Augment, Config
from tlvit.models.functional import Net, count_parameters
from tlvit.models.macs import model_macs
from tlvit.training.mesh import describe_mesh, state_bytes
from tlvit.training.optimizer import learning_rate_factors, peak_learning_rate
from tlvit.training.run_data import RunData
from tlvit.training.state import TrainState
from tlvit.training.task import Teacher

# The settings that `_augmentation` describes in words.
DESCRIBED = ("crop", "crop_padding", "crop_scale", "hflip", "interpolation", "randaugment", "randaugment_on",
             "randaugment_interpolation", "order", "three_augment", "color_jitter", "repeats",
             "random_erasing", "erase_mixed", "mixup", "cutmix")  # fmt: skip

FEW_FACTORS = 4  # of the learning rate, which are listed one by one

log = logging.getLogger("tlvit")


def print_summary(
    config: Config,
    data: RunData,
    mesh: Mesh,
    net: Net,
    state: TrainState,
    total_steps: int,
    teacher: Teacher | None = None,
) -> None:
    """Logs the summary.

    Args:
      config: settings of the run.
      data: its images and score maps.
      mesh: the devices.
      net: the model's computation.
      state: the state that the run starts from.
      total_steps: steps of the whole training.
      teacher: the model that runs inside the step.
    """
    train, evaluation = data.train, data.eval
    rows = {
        "devices": _devices(mesh),
        "model": _model(config, net, state),
        "state": _state(state),
        "train images": f"{train.num_examples} of {train.num_classes} classes, {train.identity}",
        "eval images": f"{evaluation.num_examples}, {evaluation.identity}",
        "token labels": _token_labels(config, data, teacher),
        "augmentation": _augmentation(config),
        "schedule": _schedule(config, total_steps),
        "start": _start(config, int(state.step)),
    }
    if config.task == "segmentation":
        del rows["token labels"]
        rows |= {"augmentation": _scene_augmentation(config), "evaluation": scene_evaluation(config)}
    if config.optim.lr_scale or config.optim.layer_decay != 1:
        rows["lr scale"] = _learning_rate_scale(config, state)
    width = max(map(len, rows))
    for label, text in rows.items():
        log.info("%s  %s", label.ljust(width), text)


def _devices(mesh: Mesh) -> str:
    device, count = mesh.devices.flat[0], mesh.devices.size
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{count} x {device.device_kind} ({device.platform}){processes}, mesh {describe_mesh(mesh)}"


def _state(state: TrainState) -> str:
    on_device, whole = (size / 1e6 for size in state_bytes(state))
    return f"{on_device:.1f} of {whole:.1f} MB on each device (parameters, optimizer and average)"


def _model(config: Config, net: Net, state: TrainState) -> str:
    millions = count_parameters(state.params) / 1e6
    macs = model_macs(net, state.params, state.stats, config.image_size) / 1e9
    return f"{config.model.name}, {millions:.2f} M parameters, {macs:.3g} G MACs, {config.model.dtype}"


def _token_labels(config: Config, data: RunData, teacher: Teacher | None) -> str:
    if config.data.annotator and teacher is not None and teacher.info is not None:
        info = teacher.info
        macs = model_macs(teacher.net, teacher.params, teacher.stats, info.image_size) / 1e9
        size, student = ("x".join(map(str, s)) for s in (info.image_size, config.image_size))
        resized = "" if size == student else f", resized from {student}"
        return (
            f"ON: {info.model} from {config.data.annotator} scores the augmented images in every step, at "
            f"{size}{resized}, all {info.num_classes} classes, {macs:.3g} G MACs an image; "
            f"{_class_token(config)}"
        )
    if data.maps is None:
        and_teacher = ", the distillation token on a teacher" if config.distill.teacher else ""
        return f"OFF: trained on the labels of the images{and_teacher}"
    info = data.maps.info
    grid = "x".join(map(str, info.grid))
    return (
        f"ON: {info.num_images - info.num_missing} maps of {grid} cells, top {info.top_k}, for "
        f"{data.train.num_examples} images, by {info.annotator}, crop {config.data.label_crop}, "
        f"{_class_token(config)}"
    )


def _class_token(config: Config) -> str:
    target = f"learns the {config.loss.cls_target} target"
    return f"class token {target}" if config.learns_patches else f"only the class token learns: it {target}"


def _augmentation(config: Config) -> str:
    """The augmentations in the order in which they run, then other settings that are not the default."""
    augment: Augment = config.augment
    size = "x".join(map(str, config.image_size))
    crop = [
        f"crop {augment.crop_scale[0]:g}-{augment.crop_scale[1]:g}",
        f"{augment.interpolation} resize to {size}",
    ]
    if augment.crop == "padded":
        padded = f"{size} crop of the image padded by {augment.crop_padding}"
        crop = [f"{augment.interpolation} resize", padded]
    flip = [f"flip {augment.hflip:g}"]
    colors = [
        "3-Augment" if augment.three_augment else "",
        f"color jitter {augment.color_jitter:g}" if augment.color_jitter else "",
    ]
    where = "whole image" if augment.order == "published" else augment.randaugment_on
    kind = "" if augment.randaugment_interpolation == "bilinear" else f"{augment.randaugment_interpolation} "
    policy = [f"{kind}{augment.randaugment} on the {where}" if augment.randaugment else ""]
    erasing = [f"random erasing {augment.random_erasing:g}" if augment.random_erasing else ""]
    mixing = [
        f"mixup {augment.mixup:g}" if augment.mixup else "",
        f"cutmix {augment.cutmix:g}" if augment.cutmix else "",
    ]
    steps = [
        f"{augment.repeats} views of an image" if augment.repeats > 1 else "",
        *(
            [*flip, *policy, *crop, *colors]
            if augment.order == "published"
            else [*crop, *flip, *colors, *policy]
        ),
        *([*mixing, *erasing] if augment.erase_mixed else [*erasing, *mixing]),
        "MixToken" if config.token_labels and config.loss.mixtoken else "",
    ]
    others = [
        f"{field.name} {getattr(augment, field.name)}"
        for field in dataclasses.fields(augment)
        if field.name not in DESCRIBED and getattr(augment, field.name) != field.default
    ]
    return ", ".join(step for step in steps + others if step)


def _scene_augmentation(config: Config) -> str:
    """The augmentations of segmentation in the order in which they run."""
    settings, size = config.segmentation, "x".join(map(str, config.crop_size))
    limits, (low, high) = "x".join(map(str, settings.scale)), settings.scale_range
    ratio = settings.max_class_ratio
    steps = [
        f"resize within {limits} times {low:g}-{high:g}",
        f"crop {size}" + (f" with less than {100 * ratio:g} % of one class" if ratio < 1 else ""),
        f"flip {config.augment.hflip:g}",
        "brightness, contrast, saturation and hue" if settings.photometric else "",
        "padding",
    ]
    return ", ".join(step for step in steps if step)


def scene_evaluation(config: Config) -> str:
    """How the images of a segmentation run are evaluated."""
    settings = config.segmentation
    text = f"images within {'x'.join(map(str, settings.scale))}"
    if settings.ratios != (1.0,):
        text += f" times {', '.join(f'{ratio:g}' for ratio in settings.ratios)}"
    text += ", also mirrored" if settings.flip else ""
    if settings.window:
        return f"{text}, in windows of {settings.window} at distances of {settings.stride}"
    return f"{text}, as a whole"


def _schedule(config: Config, total_steps: int) -> str:
    optim = config.optim
    peak = peak_learning_rate(optim, config.batch_size)
    length = f"{config.epochs} + {config.cooldown_epochs} epochs = {total_steps} steps"
    shape = f"{optim.schedule} + cooldown"
    if config.steps:
        length, shape = f"{total_steps} steps", optim.schedule
    return (
        f"{length} of {config.batch_size} images ({shape}); peak learning rate {peak:.2e} "
        f"({optim.learning_rate:g} for batch {optim.base_batch_size}), changes every {optim.schedule_unit}"
    )


def _learning_rate_scale(config: Config, state: TrainState) -> str:
    """How many parameters have which factor; of layer-wise decay the range."""
    optim = config.optim
    factors = jax.tree.leaves(learning_rate_factors(state.params, optim.lr_scale, optim.layer_decay))
    counts: dict[float, int] = {}
    for factor, value in zip(factors, jax.tree.leaves(state.params), strict=True):
        counts[factor] = counts.get(factor, 0) + value.size
    words = lambda factor: "frozen" if factor == 0 else f"at {factor:g} times the learning rate"
    if len(counts) <= FEW_FACTORS:
        text = ", ".join(f"{count / 1e6:.2f} M parameters {words(f)}" for f, count in sorted(counts.items()))
    else:
        moving = [factor for factor in counts if factor]
        frozen = f"{counts[0.0] / 1e6:.2f} M parameters frozen, the others" if 0.0 in counts else "parameters"
        text = f"{frozen} at {min(moving):.2g} to {max(moving):.2g} times the learning rate"
    return text if optim.scale_min_lr else f"{text}; all end at {optim.min_lr:g}"


def _start(config: Config, step: int) -> str:
    if step:
        return f"resumed at step {step}"
    return f"weights of {config.model.init_from}" if config.model.init_from else "new weights"
