"""Losses: soft cross entropy, the token-label loss and distillation; float32 whatever the model computes
in."""

import jax
import jax.numpy as jnp

from tlvit.ops.mixing import mix_by_area
from tlvit.types import Array, MixTokenMask, ModelOutput, TokenTargets

TRUTH_MIX = ("off", "reference", "intended", "truth")
DISTILLATION = ("hard", "soft")


def soft_cross_entropy(logits: Array, targets: Array) -> Array:
    """-sum(targets * log_softmax(logits)) over classes: [..., L], [..., L] -> float32 [...]."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1)


def token_label_loss(
    output: ModelOutput,
    targets: TokenTargets,
    mix: MixTokenMask | None = None,
    *,
    dense_weight: float = 1.0,
    cls_weight: float = 1.0,
    truth_mix: str = "off",
) -> Array:
    """cls_weight * CE(class token) + dense_weight * mean over tokens of CE(token): the objective of token
    labeling.

    The token logits of a mixed batch are un-mixed by the model, so every token meets its own image's target;
    the class token saw both images and meets their targets mixed by area. Published commands use 1.0 for both
    weights, the paper (Jiang et al. 2021, arXiv:2104.10858) writes 0.5 for the dense term.

    Args:
      output: cls [B, L] and tokens [B, N, L].
      targets: as from `make_targets`.
      mix: the mask the model ran with, or None.
      dense_weight, cls_weight: of the two terms.
      truth_mix: how the true label refines the class token's target: "off" not at all; "reference" as the
        published `--ground-truth` runs: the annotator's share is 0.5 where it agrees with the label and 0.9
        where not; "intended" as its documentation says: the other way round; "truth" the label alone.

    Returns:
      Scalar, the mean over the batch.

    Raises:
      ValueError: an unknown truth_mix, or a model without token logits.
    """
    if output.tokens is None:
        raise ValueError(
            "token_label_loss needs a model with a token head; this model's output has no token logits."
        )
    if output.tokens.shape != targets.tokens.shape:
        raise ValueError(
            f"Token logits are {output.tokens.shape} but targets {targets.tokens.shape} (B, N, L): the "
            "targets' grid or classes are not the model's."
        )
    cls_target = _class_target(targets, truth_mix)
    if mix is not None:
        cls_target = mix_by_area(cls_target, mix)
    loss_cls = jnp.mean(soft_cross_entropy(output.cls, cls_target))
    loss_tokens = jnp.mean(soft_cross_entropy(output.tokens, targets.tokens))
    return cls_weight * loss_cls + dense_weight * loss_tokens


def distillation_loss(
    output: ModelOutput, label_probs: Array, teacher_logits: Array, *, kind: str, alpha: float, tau: float
) -> Array:
    """(1 - alpha) * CE(class token, labels) + alpha * distillation of the distillation token (Touvron et al.
    2021, DeiT).

    Args:
      output: cls [B, L] and dist [B, L].
      label_probs: float [B, L], the (mixed, smoothed) labels.
      teacher_logits: float [B, L].
      kind: "hard", cross entropy with the teacher's argmax; or "soft", KL(teacher || student) at temperature
        tau, times tau^2 and divided by B * L as in the published code (L times smaller than the mean over the
        batch).
      alpha: share of the distillation term.
      tau: temperature of the soft kind.

    Raises:
      ValueError: an unknown kind, or a model without a distillation token.
    """
    if output.dist is None:
        raise ValueError("distillation_loss needs a model with a distillation token (…_distilled_…).")
    student = output.dist.astype(jnp.float32)
    teacher = teacher_logits.astype(jnp.float32)
    if kind == "hard":
        distilled = jnp.mean(
            soft_cross_entropy(student, jax.nn.one_hot(jnp.argmax(teacher, -1), teacher.shape[-1]))
        )
    elif kind == "soft":
        log_teacher = jax.nn.log_softmax(teacher / tau, axis=-1)
        log_student = jax.nn.log_softmax(student / tau, axis=-1)
        distilled = jnp.mean(jnp.exp(log_teacher) * (log_teacher - log_student)) * tau**2
    else:
        raise ValueError(f'distillation kind must be "hard" or "soft", not {kind!r}.')
    return (1 - alpha) * jnp.mean(soft_cross_entropy(output.cls, label_probs)) + alpha * distilled


def _class_target(targets: TokenTargets, truth_mix: str) -> Array:
    if truth_mix == "off":
        return targets.cls
    if truth_mix == "truth":
        return targets.truth
    if truth_mix not in TRUTH_MIX:
        raise ValueError(f"truth_mix must be one of {', '.join(TRUTH_MIX)}, not {truth_mix!r}.")
    agree = jnp.argmax(targets.cls, axis=-1) == jnp.argmax(targets.truth, axis=-1)
    share = jnp.where(agree, 0.5, 0.9) if truth_mix == "reference" else jnp.where(agree, 0.9, 0.5)
    return share[:, None] * targets.cls + (1 - share[:, None]) * targets.truth
