"""Learning-rate schedule, weight-decay mask, optimizer and the moving average of the weights."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from tlvit.types import Array, PyTree

NO_DECAY = ("pos_embed", "cls_token", "dist_token")
OPTIMIZERS = ("adamw", "lamb", "sgd")


def scale_learning_rate(learning_rate: float, *, batch_size: int, reference_batch: int) -> float:
    """Linear scaling (Goyal et al. 2017): a rate given for `reference_batch` images, for `batch_size`
    images."""
    return learning_rate * batch_size / reference_batch


def warmup_cosine(
    *, peak: float, epochs: int, steps_per_epoch: int, warmup_epochs: float = 5, warmup_start: float = 1e-6,
    floor: float = 1e-5, per: str = "epoch", lag_epochs: int = 0,
) -> Callable[[Array], Array]:  # fmt: skip
    """Linear warm-up to `peak`, cosine to `floor` at `epochs`, constant after that (the published floor
    epochs).

    Args:
      peak: highest rate; the cosine starts at epoch 0, so just after the warm-up it is a little lower, as
        published.
      epochs: where the cosine ends.
      steps_per_epoch: optimizer steps.
      warmup_epochs, warmup_start: length and first value of the warm-up.
      floor: last value.
      per: "epoch", the rate moves once an epoch (published); or "step".
      lag_epochs: epochs by which the schedule runs late (DeiT's published loop: 1).

    Returns:
      step -> learning rate, float32.

    Raises:
      ValueError: an unknown `per`, or no epoch or step at all.
    """
    if per not in ("epoch", "step"):
        raise ValueError(f'The schedule moves per "epoch" or per "step", not per {per!r}.')
    if epochs <= 0 or steps_per_epoch <= 0:
        raise ValueError(
            f"A schedule needs epochs and steps, not {epochs} epochs of {steps_per_epoch} steps."
        )

    def schedule(step: Array) -> Array:
        step = jnp.asarray(step, jnp.int32)
        # Whole epochs by integer division: compiled float division may fall short of them by one rounding.
        t = step // steps_per_epoch if per == "epoch" else step / steps_per_epoch
        t = jnp.maximum(t.astype(jnp.float32) - lag_epochs, 0.0)
        warmup = warmup_start + t * (peak - warmup_start) / max(warmup_epochs, 1e-9)
        cosine = floor + 0.5 * (peak - floor) * (1 + jnp.cos(math.pi * jnp.minimum(t / epochs, 1.0)))
        return jnp.where(t < warmup_epochs, warmup, cosine)

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: not on vectors (biases, norm scales), position embeddings and extra
    tokens."""

    def decays(path, leaf) -> bool:
        return leaf.ndim > 1 and path[-1].key not in NO_DECAY

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    params: PyTree, *, name: str = "adamw", learning_rate: float | Callable[[Array], Array],
    weight_decay: float = 0.05, clip_norm: float | None = None, beta1: float = 0.9, beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:  # fmt: skip
    """The optimizer of a run; decay is masked by `decay_mask` and decoupled (with sgd it joins the gradient).

    Args:
      params: for the mask; shapes suffice.
      name: "adamw" (Loshchilov & Hutter 2019; all published recipes), "lamb" (DeiT III) or "sgd" (momentum
        beta1).
      learning_rate: a number or step -> number.
      weight_decay: coefficient.
      clip_norm: largest global gradient norm, or None.
      beta1, beta2, epsilon: of the moments.

    Raises:
      ValueError: an unknown name.
    """
    mask = decay_mask(params)
    if name == "adamw":
        core = optax.adamw(
            learning_rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=mask
        )
    elif name == "lamb":
        core = optax.lamb(
            learning_rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=mask
        )
    elif name == "sgd":
        decay = optax.add_decayed_weights(weight_decay, mask=mask)
        core = optax.chain(decay, optax.sgd(learning_rate, momentum=beta1, nesterov=True))
    else:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}.")
    return optax.chain(optax.clip_by_global_norm(clip_norm), core) if clip_norm else core


def update_ema(ema: PyTree, new: PyTree, step: Array, *, decay: float, warmup: bool = False) -> PyTree:
    """decay * ema + (1 - decay) * new, for parameters and statistics alike.

    With `warmup` the decay is min(decay, (1 + step) / (10 + step)), so that a short run's average forgets its
    start.
    """
    t = jnp.asarray(step, jnp.float32)
    decay = jnp.minimum(decay, (1 + t) / (10 + t)) if warmup else decay
    return jax.tree.map(lambda old, value: old * decay + value * (1 - decay), ema, new)
