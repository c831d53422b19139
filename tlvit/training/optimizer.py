"""Learning-rate schedule, weight-decay mask, optimizer, and moving average of the weights."""

import fnmatch
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from tlvit.config import Optim
from tlvit.types import Array, PyTree

Schedule = Callable[[ArrayLike], jax.Array]
NO_DECAY = ("pos_embed", "cls_token", "dist_token")
OPTIMIZERS = ("adamw", "lamb", "sgd")


def peak_learning_rate(optim: Optim, batch_size: int) -> float:
    """The peak learning rate, scaled linearly with the batch size (Goyal et al. 2017, arXiv:1706.02677)."""
    return optim.learning_rate * batch_size / optim.base_batch_size


def make_schedule(optim: Optim, *, epochs: float, steps_per_epoch: int, batch_size: int) -> Schedule:
    """The learning rate: linear warm-up, cosine or polynomial to `optim.min_lr` at `epochs`, constant after
    that.

    Cosine and polynomial start at step 0, so the rate right after the warm-up is a little below the peak, as
    published.

    Args:
      optim: settings.
      epochs: end of the cosine or polynomial.
      steps_per_epoch: optimizer steps in an epoch.
      batch_size: images in a step, which scales the peak.

    Returns:
      step -> learning rate, float32.

    Raises:
      ValueError: an epoch has no step, or `optim.min_lr` is above the peak.
    """
    if steps_per_epoch < 1:
        raise ValueError(f"A schedule needs at least one step in an epoch, not {steps_per_epoch}.")
    peak = peak_learning_rate(optim, batch_size)
    first, lowest = optim.warmup_lr, optim.min_lr
    if lowest > peak > 0:
        raise ValueError(
            f"config.optim.min_lr is {lowest:g}, above the peak learning rate {peak:g} "
            f"({optim.learning_rate:g} for a batch of {optim.base_batch_size}, scaled to {batch_size}). Set "
            "a lower config.optim.min_lr or a higher config.optim.learning_rate."
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
            return poly(step) * jnp.minimum(start + (1 - start) * t / max(warmup_epochs, 1e-9), 1.0)
        warmup = first + t * (peak - first) / max(warmup_epochs, 1e-9)
        cosine = lowest + 0.5 * (peak - lowest) * (1 + jnp.cos(math.pi * jnp.minimum(t / epochs, 1.0)))
        return jnp.where(t < warmup_epochs, warmup, cosine)

    return schedule


def make_optimizer(
    params: PyTree, *, name: str = "adamw", learning_rate: float | Schedule, weight_decay: float = 0.05,
    clip_norm: float | None = None, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8,
) -> optax.GradientTransformation:  # fmt: skip
    """The optimizer. Weight decay is decoupled and masked by `decay_mask`; SGD adds it to the gradient.

    Args:
      params: parameters or their shapes, for the mask. name: "adamw" (Loshchilov & Hutter 2019, all published
      recipes), "lamb" (DeiT III), or "sgd" with Nesterov
        momentum beta1.
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
    mask = decay_mask(params)
    if name in ("adamw", "lamb"):
        make = optax.adamw if name == "adamw" else optax.lamb
        core = make(learning_rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=mask)
    elif name == "sgd":
        decay = optax.add_decayed_weights(weight_decay, mask=mask)
        core = optax.chain(decay, optax.sgd(learning_rate, momentum=beta1, nesterov=True))
    else:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}.")
    return optax.chain(optax.clip_by_global_norm(clip_norm), core) if clip_norm else core


def scale_learning_rates(
    tx: optax.GradientTransformation, params: PyTree, scales: Mapping[str, float]
) -> optax.GradientTransformation:
    """Multiplies the learning rate of the parameters whose names match a pattern.

    A factor of 0 freezes parameters: they are not decayed either. `stop_frozen` makes their gradients zero.
    Statistics of BatchNorm are no parameters and follow the images of every training.

    Args:
      tx: an optimizer, from `make_optimizer`.
      params: parameters or their shapes.
      scales: pattern -> factor, as in `learning_rate_factors`.

    Raises:
      ValueError: a pattern matches no parameter, or all factors are 0.

    Example:
      >>> tx = scale_learning_rates(make_optimizer(params, learning_rate=1e-3), params, {"*": 0, "head/*": 1})
    """
    factors = learning_rate_factors(params, scales)
    if not any(jax.tree.leaves(factors)):
        raise ValueError("config.optim.lr_scale freezes all parameters: there is nothing to learn.")
    scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: f * u, updates, factors))
    return optax.chain(tx, scale)


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


def learning_rate_factors(params: PyTree, scales: Mapping[str, float]) -> PyTree:
    """The factor of every parameter's learning rate.

    Args:
      params: parameters or their shapes.
      scales: pattern -> factor. A pattern is compared with the entire name of a parameter, such as
        "blocks/0/attn/qkv/kernel"; * matches any text. Of several that match, the longest counts. A
        parameter that none matches has factor 1.

    Raises:
      ValueError: a pattern matches no parameter.
    """
    matched: set[str] = set()

    def factor(path: tuple, _: Array) -> float:
        name = "/".join(str(part.key) for part in path)
        found = [pattern for pattern in scales if fnmatch.fnmatchcase(name, pattern)]
        matched.update(found)
        return float(scales[max(found, key=lambda pattern: (len(pattern), pattern))]) if found else 1.0

    factors = jax.tree_util.tree_map_with_path(factor, params)
    if unused := sorted(set(scales) - matched):
        names = ", ".join(sorted(params))
        raise ValueError(
            f"config.optim.lr_scale: no parameter matches {', '.join(map(repr, unused))}; names are such as "
            f"'head/kernel' and start with {names}."
        )
    return factors


def decay_mask(params: PyTree) -> PyTree:
    """True for parameters with weight decay: all but vectors, position embeddings and prefix tokens."""

    def decays(path: tuple, leaf: Array) -> bool:
        return leaf.ndim > 1 and path[-1].key not in NO_DECAY

    return jax.tree_util.tree_map_with_path(decays, params)


def update_ema(ema: PyTree, new: PyTree, step: Array, *, decay: float, warmup: bool = False) -> PyTree:
    """decay * ema + (1 - decay) * new, for parameters and BatchNorm statistics.

    With `warmup` the decay is min(decay, (1 + step) / (10 + step)), so that the average of a short run is not
    dominated by the initial weights.
    """
    t = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t)) if warmup else decay
    return jax.tree.map(lambda old, value: old * keep + value * (1 - keep), ema, new)
