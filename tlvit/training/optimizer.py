"""Learning-rate schedule, weight-decay mask, optimizer, and moving average of the weights."""

import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from tlvit.config import Optim
from tlvit.types import Array, PyTree

Schedule = Callable[[ArrayLike], jax.Array]
OPTIMIZERS = ("adamw", "lamb", "sgd", "momentum")
ABOVE_THE_BLOCKS = (  # layers of a transformer, then those of segmentation models
    "norm", "head", "head_dist", "aux_head",
    "side_layer1", "side_layer2", "side_layer3", "side_layer4", "decode_head", "auxiliary_head",
)  # fmt: skip


def peak_learning_rate(optim: Optim, batch_size: int) -> float:
    """The peak learning rate, scaled linearly with the batch size (Goyal et al. 2017, arXiv:1706.02677)."""
    return optim.learning_rate * batch_size / optim.base_batch_size


def make_schedule(
    optim: Optim, *, epochs: float, steps_per_epoch: int, batch_size: int, factor: float = 1.0
) -> Schedule:
    """The learning rate: linear warm-up, cosine or polynomial to `optim.min_lr` at `epochs`, constant after
    that.

    Cosine and polynomial start at step 0, so the rate right after the warm-up is a little below the peak, as
    published.

    Args:
      optim: settings.
      epochs: end of the cosine or polynomial.
      steps_per_epoch: optimizer steps in an epoch.
      batch_size: images in a step, which scales the peak.
      factor: of the peak and the first rate, and of `optim.min_lr` with `optim.scale_min_lr`.

    Returns:
      step -> learning rate, float32.

    Raises:
      ValueError: an epoch has no step, or `optim.min_lr` is above the peak.
    """
    if steps_per_epoch < 1:
        raise ValueError(f"A schedule needs at least one step in an epoch, not {steps_per_epoch}.")
    peak = factor * peak_learning_rate(optim, batch_size)
    first = factor * optim.warmup_lr
    lowest = optim.min_lr * (factor if optim.scale_min_lr else 1.0)
    if lowest > peak > 0:
        times = f"{batch_size}" if factor == 1 else f"{batch_size}, times {factor:g} by lr_scale, layer_decay"
        raise ValueError(
            f"config.optim.min_lr is {lowest:g}, above the peak learning rate {peak:g} ("
            f"{optim.learning_rate:g} for a batch of {optim.base_batch_size}, scaled to {times}). "
            "Set a lower config.optim.min_lr or a higher config.optim.learning_rate; "
            f"config.optim.base_batch_size={batch_size} keeps the learning rate as it is given."
        )

    warmup_epochs = optim.warmup_steps / steps_per_epoch if optim.warmup_steps else optim.warmup_epochs
    total_steps = max(round(epochs * steps_per_epoch), 1)

    def poly(step: jax.Array) -> jax.Array:
        """The rate after the warm-up. The steps that are left are counted exactly."""
        step = step // steps_per_epoch * steps_per_epoch if optim.schedule_unit == "epoch" else step
        left = jnp.clip(total_steps + optim.lag_epochs * steps_per_epoch - step, 0, total_steps)
        return lowest + (peak - lowest) * (left / total_steps) ** optim.power

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        # Integer division: a compiled float division can be one rounding below a whole epoch.
        t = step // steps_per_epoch if optim.schedule_unit == "epoch" else step / steps_per_epoch
        t = jnp.maximum(t.astype(jnp.float32) - optim.lag_epochs, 0.0)
        if optim.schedule == "poly":
            start = first / peak if peak else 1.0
            warm = jnp.where(t < warmup_epochs, start + (1 - start) * t / max(warmup_epochs, 1e-9), 1.0)
            return poly(step) * warm
        warmup = first + t * (peak - first) / max(warmup_epochs, 1e-9)
        cosine = lowest + 0.5 * (peak - lowest) * (1 + jnp.cos(math.pi * jnp.minimum(t / epochs, 1.0)))
        return jnp.where(t < warmup_epochs, warmup, cosine)

    return schedule


def run_optimizer(
    optim: Optim, params: PyTree, *, epochs: float, steps_per_epoch: int, batch_size: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of a run and its learning rate.

    Args:
      optim: settings.
      params: parameters or their shapes.
      epochs: end of the cosine or polynomial.
      steps_per_epoch: optimizer steps in an epoch.
      batch_size: images in a step.

    Raises:
      ValueError: as `make_schedule` and `scale_learning_rates`.
    """
    schedule_of = functools.partial(
        make_schedule, optim, epochs=epochs, steps_per_epoch=steps_per_epoch, batch_size=batch_size
    )
    schedule = schedule_of()
    decay = (optim.weight_decay, decay_mask(params, optim.no_decay))
    tx = _make(optim.name, schedule, decay, optim.clip_norm, b1=0.9)
    if not optim.lr_scale and optim.layer_decay == 1:
        return tx, schedule
    if optim.scale_min_lr:
        return scale_learning_rates(tx, params, optim.lr_scale, optim.layer_decay), schedule
    factors = _factors_that_learn(params, optim.lr_scale, optim.layer_decay)
    schedules = {f: schedule_of(factor=f) for f in set(jax.tree.leaves(factors)) - {0.0}}
    return optax.chain(tx, _follow_schedules(factors, schedule, schedules)), schedule


def make_optimizer(
    params: PyTree, *, name: str = "adamw", learning_rate: float | Schedule, weight_decay: float = 0.05,
    clip_norm: float | None = None, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8,
) -> optax.GradientTransformation:  # fmt: skip
    """The optimizer. Weight decay is masked by `decay_mask` and decoupled; SGD adds it to the gradient.

    Args:
      params: parameters or their shapes, for the mask.
      name: "adamw" (Loshchilov & Hutter 2019, most published recipes), "lamb" (You et al. 2020,
        arXiv:1904.00962; as DeiT III uses it, without the trust ratio for parameters without decay), or SGD
        with the momentum beta1: "sgd" with Nesterov's and "momentum" with the ordinary one, as in timm.
      learning_rate: a number, or step -> number.
      weight_decay: coefficient of the decay.
      clip_norm: largest global norm of the gradient; None or 0 does not clip.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      epsilon: added to the denominator.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> tx = tlvit.make_optimizer(params, learning_rate=1e-3, weight_decay=0.05)
      >>> opt_state = tx.init(params)
    """
    decay = (weight_decay, decay_mask(params))
    return _make(name, learning_rate, decay, clip_norm, b1=beta1, b2=beta2, eps=epsilon)


def _make(
    name: str, learning_rate: float | Schedule, decay: tuple[float, PyTree], clip_norm: float | None,
    *, b1: float, **adam: float,
) -> optax.GradientTransformation:  # fmt: skip
    """The optimizer; `decay` is the coefficient and the mask, `adam` may be b2 and eps."""
    weight_decay, mask = decay
    options: dict[str, Any] = {"b1": b1, "b2": 0.999, "eps": 1e-8, **adam}
    if name == "adamw":
        core = optax.adamw(learning_rate, weight_decay=weight_decay, mask=mask, **options)
    elif name == "lamb":
        core = optax.chain(
            optax.scale_by_adam(**options),
            optax.add_decayed_weights(weight_decay, mask=mask),
            optax.masked(optax.scale_by_trust_ratio(), mask),  # not of what has no decay, as in DeiT III
            optax.scale_by_learning_rate(learning_rate),
        )
    elif name in ("sgd", "momentum"):
        decayed = optax.add_decayed_weights(weight_decay, mask=mask)
        core = optax.chain(decayed, optax.sgd(learning_rate, momentum=b1, nesterov=name == "sgd"))
    else:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}.")
    return _clip(core, clip_norm) if clip_norm else core


def _clip(tx: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    """Clips the global norm of the gradients. The state is that of `tx`, so a run may be resumed with another
    `clip_norm`, or without one."""
    clip = optax.clip_by_global_norm(norm)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        clipped, _ = clip.update(updates, optax.EmptyState(), params)
        return tx.update(clipped, state, params)

    return optax.GradientTransformation(tx.init, update)


def scale_learning_rates(
    tx: optax.GradientTransformation,
    params: PyTree,
    scales: Mapping[str, float],
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Multiplies the learning rate of the parameters whose names match a pattern.

    A factor of 0 freezes parameters: they are not decayed either. `stop_frozen` makes their gradients zero.
    Statistics of BatchNorm are no parameters and follow the images of every training.

    Args:
      tx: an optimizer, from `make_optimizer`.
      params: parameters or their shapes.
      scales: pattern -> factor, as in `learning_rate_factors`.
      layer_decay: as in `learning_rate_factors`.

    Raises:
      ValueError: a pattern matches no parameter, all factors are 0, or the model has no blocks to decay over.

    Example:
      >>> tx = scale_learning_rates(make_optimizer(params, learning_rate=1e-3), params, {"*": 0, "head/*": 1})
    """
    factors = _factors_that_learn(params, scales, layer_decay)
    scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: f * u, updates, factors))
    return optax.chain(tx, scale)


def _follow_schedules(
    factors: PyTree, schedule: Schedule, schedules: Mapping[float, Schedule]
) -> optax.GradientTransformation:
    """Turns updates for the learning rate `schedule` into updates for the schedule of each parameter.

    `schedules` has the one of every factor but 0, which freezes.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        del params
        rate = schedule(state.count)
        # With a rate of 0, as in a warm-up from 0, all updates are 0 and stay so.
        safe = jnp.where(rate > 0, rate, 1.0)
        ratios = {0.0: 0.0, **{factor: s(state.count) / safe for factor, s in schedules.items()}}
        scaled = jax.tree.map(lambda u, factor: ratios[factor] * u, updates, factors)
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    init = lambda params: optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))
    return optax.GradientTransformation(init, update)


def _factors_that_learn(params: PyTree, scales: Mapping[str, float], layer_decay: float) -> PyTree:
    """`learning_rate_factors`, of which some are not 0."""
    factors = learning_rate_factors(params, scales, layer_decay)
    if not any(jax.tree.leaves(factors)):
        raise ValueError("config.optim.lr_scale freezes all parameters: there is nothing to learn.")
    return factors


def stop_frozen(params: PyTree, scales: Mapping[str, float]) -> PyTree:
    """The parameters; those with a factor of 0 have no gradient, and no step computes one.

    Args:
      params: parameters.
      scales: pattern -> factor, as in `learning_rate_factors`.
    """
    if not scales:
        return params
    stop = lambda value, factor: value if factor else jax.lax.stop_gradient(value)
    return jax.tree.map(stop, params, learning_rate_factors(params, scales))


def learning_rate_factors(params: PyTree, scales: Mapping[str, float], layer_decay: float = 1.0) -> PyTree:
    """The factor of every parameter's learning rate.

    Args:
      params: parameters or their shapes.
      scales: pattern -> factor. A pattern is compared with the entire name of a parameter, such as
        "blocks/0/attn/qkv/kernel"; * matches any text. Of several that match, the longest counts. A
        parameter that none matches has factor 1.
      layer_decay: the factor of block i of n is multiplied by layer_decay^(n - i), counted from 0, and that
        of all parameters before the blocks by layer_decay^(n + 1). The last norm and the heads keep theirs
        (Bao et al. 2021, BEiT, arXiv:2106.08254).

    Raises:
      ValueError: a pattern matches no parameter, or the model has no blocks and `layer_decay` is not 1.
    """
    matched: set[str] = set()
    last = _last_block(params) if layer_decay != 1 else 0

    def factor(path: tuple, _: Array) -> float:
        parts = [str(part.key) for part in path]
        name = "/".join(parts)
        found = [pattern for pattern in scales if fnmatch.fnmatchcase(name, pattern)]
        matched.update(found)
        scale = float(scales[max(found, key=lambda pattern: (len(pattern), pattern))]) if found else 1.0
        return scale * layer_decay ** _layers_above(parts, last) if layer_decay != 1 else scale

    factors = jax.tree_util.tree_map_with_path(factor, params)
    if unused := sorted(set(scales) - matched):
        names = ", ".join(sorted(params))
        raise ValueError(
            f"config.optim.lr_scale: no parameter matches {', '.join(map(repr, unused))}; names are such as "
            f"'head/kernel' and start with {names}."
        )
    return factors


def _last_block(params: PyTree) -> int:
    """The index of the last block."""
    params = params.get("backbone", params)  # of a segmentation model
    if "blocks" not in params:
        raise ValueError(
            "config.optim.layer_decay needs a transformer with a list of blocks, but the parameters start "
            f"with {', '.join(sorted(params))}. Set config.optim.layer_decay=1, or config.optim.lr_scale."
        )
    return max(map(int, params["blocks"]))


def _layers_above(parts: Sequence[str], last: int) -> int:
    """How many layers are between a parameter and the last norm, 0 for the norm and the heads."""
    if parts[0] == "backbone":  # of a segmentation model, whose side layers and heads come after the blocks
        parts = parts[1:]
    if parts[0] == "blocks":
        return last + 1 - int(parts[1])
    return 0 if parts[0] in ABOVE_THE_BLOCKS else last + 2


def decay_mask(params: PyTree, no_decay: Sequence[str] | None = None) -> PyTree:
    """True for parameters with weight decay.

    Args:
      params: parameters or their shapes.
      no_decay: "vectors" and last parts of names, as `config.optim.no_decay`. None: its default, all vectors,
        position embeddings and prefix tokens.
    """
    without = Optim().no_decay if no_decay is None else no_decay
    lowest = 1 if "vectors" in without else -1

    def decays(path: tuple, leaf: Array) -> bool:
        return leaf.ndim > lowest and path[-1].key not in without

    return jax.tree_util.tree_map_with_path(decays, params)


def update_ema(ema: PyTree, new: PyTree, step: Array, *, decay: float, warmup: bool = False) -> PyTree:
    """decay * ema + (1 - decay) * new, for parameters and BatchNorm statistics.

    With `warmup` the decay is min(decay, (1 + step) / (10 + step)), so that the average of a short run is not
    dominated by the initial weights.
    """
    t = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t)) if warmup else decay
    return jax.tree.map(lambda old, value: old * keep + value * (1 - keep), ema, new)
