"""Warnings at the start of a run: settings that are allowed, but with which the run learns little."""

from tlvit.config import Config
from tlvit.models.table import model_options
from tlvit.training.optimizer import peak_learning_rate

FEW_STEPS = 5  # in an epoch
SMALL_SCALE = 1 / 16  # of the learning rate, by the batch size
INITIAL_SHARE = 0.1  # of the initial weights in the average at the end


def run_warnings(config: Config, num_images: int, steps_per_epoch: int) -> list[str]:
    """The warnings, with their numbers and a setting that changes them.

    Args:
      config: settings of the run.
      num_images: training images.
      steps_per_epoch: optimizer steps in an epoch.
    """
    return [
        text
        for text in (
            _warmup(config, steps_per_epoch),
            _learning_rate(config),
            _steps(config, num_images, steps_per_epoch),
            _average(config, steps_per_epoch),
            _token_head(config),
            _score_maps(config),
        )
        if text
    ]


def _warmup(config: Config, steps_per_epoch: int) -> str:
    optim, total = config.optim, config.total_epochs
    if config.steps or optim.warmup_steps:
        return _warmup_steps(config, steps_per_epoch)
    if optim.warmup_epochs <= total / 2 or optim.learning_rate == 0:
        return ""
    peak = peak_learning_rate(optim, config.batch_size)
    if optim.warmup_epochs >= total:
        what = f"{optim.warmup_epochs:g} epochs and the run has {total}, so the learning rate never reaches"
    else:
        what = f"{optim.warmup_epochs:g} of {total} epochs, so for most of the run the learning rate is below"
    return (
        f"The warm-up takes {what} its peak of {peak:.3g}. Try --config.optim.warmup_epochs={total / 20:g}."
    )


def _warmup_steps(config: Config, steps_per_epoch: int) -> str:
    """As `_warmup`, for a run or a warm-up whose length is given in steps."""
    optim, total = config.optim, config.total_steps(steps_per_epoch)
    warmup = optim.warmup_steps or optim.warmup_epochs * steps_per_epoch
    if warmup <= total / 2 or optim.learning_rate == 0:
        return ""
    unit = "" if optim.schedule_unit == "step" else " --config.optim.schedule_unit=step"
    return (
        f"The warm-up takes {warmup:g} of {total} steps, so for most of the run the learning rate is below "
        f"its peak of {peak_learning_rate(optim, config.batch_size):.3g}. Try "
        f"--config.optim.warmup_steps={max(total // 20, 1)}{unit}."
    )


def _learning_rate(config: Config) -> str:
    optim, size = config.optim, config.batch_size
    if size > optim.base_batch_size * SMALL_SCALE:
        return ""
    return (
        f"The learning rate {optim.learning_rate:g} is given for a batch of {optim.base_batch_size} and "
        f"scaled to {peak_learning_rate(optim, size):.3g} for {size} images. For {optim.learning_rate:g} "
        f"itself: --config.optim.base_batch_size={size}."
    )


def _steps(config: Config, num_images: int, steps_per_epoch: int) -> str:
    if steps_per_epoch >= FEW_STEPS:
        return ""
    steps = "step" if steps_per_epoch == 1 else "steps"
    smaller = max(2, num_images // 20 * 2)  # even, as mixing needs
    return (
        f"An epoch of {num_images} images has {steps_per_epoch} {steps}, and the whole run has "
        f"{config.total_steps(steps_per_epoch)}. For more steps: --config.batch_size={smaller}."
    )


def _average(config: Config, steps_per_epoch: int) -> str:
    steps, ema = config.total_steps(steps_per_epoch), config.ema
    share = ema.decay**steps
    if ema.warmup or ema.decay == 0 or share < INITIAL_SHARE or config.model.init_from:
        return ""
    return (
        f"After {steps} steps the average of the weights still has {100 * share:.0f} % of the initial "
        f"weights (ema.decay {ema.decay:g}). Set --config.ema.warmup=True."
    )


def _token_head(config: Config) -> str:
    options = {**model_options(config.model.name), **config.model.options}
    if config.learns_patches or not options.get("token_head") or options["rule"] == "class":
        return ""
    return (
        f"Nothing trains the token head, but it counts in the logits (rule {options['rule']}). Set "
        "--config.model.options.rule=class, or --config.model.options.token_head=False."
    )


def _score_maps(config: Config) -> str:
    if config.needs_maps or not config.data.score_maps:
        return ""
    why = (
        "loss.dense_weight is 0 and loss.cls_target is label"
        if config.token_labels
        else "token_labels is off"
    )
    return f"Nothing learns from data.score_maps={config.data.score_maps}: {why}."
