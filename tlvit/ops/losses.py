"""Losses: cross entropies, token labels and distillation, computed in float32 for inputs of any type."""

import jax
import jax.numpy as jnp

from tlvit.ops.mixing import mix_by_area
from tlvit.shapes import Float, Float32
from tlvit.types import Array, MixTokenMask, ModelOutput, TokenTargets

CLS_TARGETS = ("annotator", "published", "documented", "label")
DISTILLATION = ("hard", "soft")


def soft_cross_entropy(
    logits: Float[Array, "*batch L"], targets: Float[Array, "*batch L"]
) -> Float32[Array, "*batch"]:
    """The cross entropy -sum(targets * log_softmax(logits)) over the last axis.

    Args:
      logits: [..., L].
      targets: [..., L], probabilities.

    Returns:
      float32 [...].

    Raises:
      ValueError: the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"Logits are {list(logits.shape)} but targets {list(targets.shape)}.")
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1)


def binary_cross_entropy(
    logits: Float[Array, "*batch L"], targets: Float[Array, "*batch L"], *, threshold: float = 1.0
) -> Float32[Array, "*batch"]:
    """The mean over the classes of -t log(sigmoid(x)) - (1 - t) log(1 - sigmoid(x)).

    DeiT III (Touvron et al. 2022, arXiv:2204.07118) trains with it: every class of a mixed image is a
    positive one, whatever its share.

    Args:
      logits: x, [..., L].
      targets: t, [..., L], in [0, 1].
      threshold: targets above it become 1 and all others 0, in [0, 1). DeiT III's is 0. With 1 the targets
        stay as they are.

    Returns:
      float32 [...].

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> logits, targets = jnp.zeros((1, 4)), jnp.array([[0.7, 0.3, 0, 0]])
      >>> [round(float(loss), 4) for loss in binary_cross_entropy(logits, targets)]  # log(2)
      [0.6931]
    """
    if logits.shape != targets.shape:
        raise ValueError(f"Logits are {list(logits.shape)} but targets {list(targets.shape)}.")
    x = logits.astype(jnp.float32)
    t = targets if threshold >= 1 else (targets > threshold).astype(jnp.float32)
    return -jnp.mean(t * jax.nn.log_sigmoid(x) + (1 - t) * jax.nn.log_sigmoid(-x), axis=-1)


def token_label_loss(
    output: ModelOutput,
    targets: TokenTargets,
    mix: MixTokenMask | None = None,
    *,
    dense_weight: float = 1.0,
    cls_weight: float = 1.0,
    cls_target: str = "annotator",
) -> Float32[Array, ""]:
    """The objective of token labeling (Jiang et al. 2021, arXiv:2104.10858).

    cls_weight * CE(class token) + dense_weight * mean over tokens of CE(token). The model returns the token
    logits of a mixed batch in the order of the original images, so each token is compared with the target of
    its own image. The class token saw both images, so its target is the two images' targets mixed by area.
    The published commands use 1.0 for both weights; the paper writes 0.5 for the dense term.

    Args:
      output: cls [B, L] and tokens [B, N, L].
      targets: of the images before mixing, as from `make_targets`.
      mix: the mask that the model ran with, or None.
      dense_weight: weight of the token term.
      cls_weight: weight of the class term.
      cls_target: target of the class token. "annotator": the distribution of the score map. "published": the
        mixture that the published `--ground-truth` option computes, r * annotator + (1 - r) * label with
        r = 0.5 where the annotator's best class is the label and r = 0.9 elsewhere. "documented": r = 0.9 and
        0.5, as that option's documentation says. "label": the smoothed label.

    Returns:
      float32 scalar, the mean over the batch.

    Raises:
      ValueError: an unknown cls_target, a model without token logits, or targets of another shape.

    Example:
      >>> logits = jnp.zeros((1, 2))
      >>> output = ModelOutput(logits=logits, cls=logits, tokens=jnp.zeros((1, 4, 2)))
      >>> targets = TokenTargets(cls=jnp.eye(2)[:1], tokens=jnp.ones((1, 4, 2)) / 2, label=jnp.eye(2)[:1])
      >>> round(float(token_label_loss(output, targets)), 4)  # 2 log(2)
      1.3863
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
    target = class_target(targets, cls_target)
    if mix is not None:
        target = mix_by_area(target, mix)
    loss_cls = jnp.mean(soft_cross_entropy(output.cls, target))
    token_targets = targets.tokens
    if targets.weight is not None:
        if targets.weight.shape != token_targets.shape[:2]:
            raise ValueError(
                f"Weights of tokens are {list(targets.weight.shape)} but tokens "
                f"{list(token_targets.shape[:2])} (B, N)."
            )
        # Equal to weighting each token's loss, which XLA for TPUs compiles to more memory traffic.
        token_targets = targets.weight[..., None] * token_targets
    loss_tokens = jnp.mean(soft_cross_entropy(output.tokens, token_targets))
    return cls_weight * loss_cls + dense_weight * loss_tokens


def distillation_loss(
    output: ModelOutput,
    label_probs: Float[Array, "B L"],
    teacher_logits: Float[Array, "B L"],
    *,
    kind: str,
    alpha: float,
    tau: float,
) -> Float32[Array, ""]:
    """The objective of DeiT's distillation token (Touvron et al. 2021, arXiv:2012.12877).

    (1 - alpha) * CE(class token, labels) + alpha * distillation(distillation token, teacher).

    Args:
      output: cls [B, L] and dist [B, L].
      label_probs: [B, L], the (mixed, smoothed) labels.
      teacher_logits: [B, L].
      kind: "hard", cross entropy with the teacher's argmax; or "soft", KL(teacher || student) at temperature
        tau, times tau^2 and divided by B * L as in the published code (L times smaller than the mean over the
        batch).
      alpha: weight of the distillation term, in [0, 1].
      tau: temperature of the soft kind, above 0.

    Returns:
      float32 scalar, the mean over the batch.

    Raises:
      ValueError: an unknown kind, alpha or tau out of range, teacher logits of another shape, or a model
        without a distillation token.

    Example:
      >>> logits, labels = jnp.zeros((1, 2)), jnp.eye(2)[:1]
      >>> output = ModelOutput(logits=logits, cls=logits, dist=logits)
      >>> loss = distillation_loss(output, labels, 5 * labels, kind="hard", alpha=0.5, tau=1.0)
      >>> round(float(loss), 4)  # log(2) for both tokens
      0.6931
    """
    if output.dist is None:
        raise ValueError("distillation_loss needs a model with a distillation token (…_distilled_…).")
    if teacher_logits.shape != output.dist.shape:
        raise ValueError(
            f"Teacher logits are {list(teacher_logits.shape)} but the student's {list(output.dist.shape)}."
        )
    if kind not in DISTILLATION:
        raise ValueError(f"kind must be one of {', '.join(DISTILLATION)}, not {kind!r}.")
    if not (0 <= alpha <= 1 and tau > 0):
        raise ValueError(f"alpha must be in [0, 1] and tau above 0, not {alpha} and {tau}.")
    student = output.dist.astype(jnp.float32)
    teacher = teacher_logits.astype(jnp.float32)
    if kind == "hard":
        distilled = jnp.mean(
            soft_cross_entropy(student, jax.nn.one_hot(jnp.argmax(teacher, -1), teacher.shape[-1]))
        )
    else:
        log_teacher = jax.nn.log_softmax(teacher / tau, axis=-1)
        log_student = jax.nn.log_softmax(student / tau, axis=-1)
        distilled = jnp.mean(jnp.exp(log_teacher) * (log_teacher - log_student)) * tau**2
    return (1 - alpha) * jnp.mean(soft_cross_entropy(output.cls, label_probs)) + alpha * distilled


def class_target(targets: TokenTargets, cls_target: str) -> Float32[Array, "B L"]:
    """The target of the class token.

    Args:
      targets: as from `make_targets`.
      cls_target: "annotator", "published", "documented" or "label", see `token_label_loss`.

    Raises:
      ValueError: another cls_target.
    """
    if cls_target == "annotator":
        return targets.cls
    if cls_target == "label":
        return targets.label
    if cls_target not in CLS_TARGETS:
        raise ValueError(f"cls_target must be one of {', '.join(CLS_TARGETS)}, not {cls_target!r}.")
    agree = jnp.argmax(targets.cls, axis=-1) == jnp.argmax(targets.label, axis=-1)
    r = jnp.where(agree, 0.5, 0.9) if cls_target == "published" else jnp.where(agree, 0.9, 0.5)
    return r[:, None] * targets.cls + (1 - r[:, None]) * targets.label
