"""Losses against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import log_softmax, randn, soft_targets

from tlvit.ops import losses
from tlvit.types import MixTokenMask, ModelOutput, TokenTargets

B, N, L = 4, 6, 5


def cross_entropy(logits, targets):
    return -(targets * log_softmax(logits)).sum(-1)


def draw(seed=0):
    """Output and targets; the annotator's best class is the label for images 0 and 2 only."""
    logits, cls, dist = (randn(B, L, seed=10 * seed + i) for i in range(3))
    output = ModelOutput(logits=logits, cls=cls, tokens=randn(B, N, L, seed=10 * seed + 3), dist=dist)
    cls = soft_targets(10 * seed + 4, B, L)
    best = cls.argmax(-1)
    label = np.where([True, False, True, False], best, (best + 1) % L)
    smoothed = (np.eye(L)[label] * 0.9 + 0.1 / L).astype(np.float32)
    return output, TokenTargets(cls=cls, tokens=soft_targets(10 * seed + 5, B, N, L), label=smoothed)


def test_soft_cross_entropy():
    output, targets = draw()
    np.testing.assert_allclose(
        losses.soft_cross_entropy(output.tokens, targets.tokens),
        cross_entropy(output.tokens, targets.tokens),
        atol=1e-5,
    )
    half = losses.soft_cross_entropy(jnp.array([[100.0, 0.0]], jnp.bfloat16), jnp.array([[0.0, 1.0]]))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, [100.0], atol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_binary_cross_entropy(threshold):
    """torch's BCEWithLogitsLoss: the mean over the classes, here of targets that are turned into 0 and 1."""
    logits = 30 * randn(3, L, seed=1)
    targets = np.array([[1, 0, 0, 0, 0], [0.9, 0.1, 0, 0, 0], [0.5, 0.3, 0.2, 0, 0]], np.float32)
    t = targets if threshold == 1 else (targets > threshold).astype(np.float64)
    x = logits.astype(np.float64)
    expected = (np.logaddexp(0, x) - t * x).mean(-1)
    found = losses.binary_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), threshold=threshold)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(
    ("cls_target", "ratio"),
    [
        ("annotator", [1, 1, 1, 1]),
        ("published", [0.5, 0.9, 0.5, 0.9]),
        ("documented", [0.9, 0.5, 0.9, 0.5]),
        ("label", [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_token_label_loss(cls_target, ratio, mixed):
    output, targets = draw()
    ratio = np.array(ratio)[:, None]
    cls = ratio * targets.cls + (1 - ratio) * targets.label
    mix = None
    if mixed:  # two shards of two images
        mix = MixTokenMask(mask=np.zeros((2, 2, 3), bool), lam=np.array([0.7, 0.2], np.float32))
        lam = np.array([0.7, 0.7, 0.2, 0.2])[:, None]
        cls = lam * cls + (1 - lam) * cls[[1, 0, 3, 2]]
    expected = 0.8 * cross_entropy(output.cls, cls).mean()
    expected += 0.3 * cross_entropy(output.tokens, targets.tokens).mean()
    loss = losses.token_label_loss(
        output, targets, mix, dense_weight=0.3, cls_weight=0.8, cls_target=cls_target
    )
    assert loss.shape == ()
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_both_weights_are_one_by_default():
    output, targets = draw(1)
    expected = (
        cross_entropy(output.cls, targets.cls).mean() + cross_entropy(output.tokens, targets.tokens).mean()
    )
    np.testing.assert_allclose(losses.token_label_loss(output, targets), expected, atol=1e-5)


def test_token_label_loss_errors():
    output, targets = draw()
    with pytest.raises(ValueError, match="annotator, published, documented, label, not 'on'"):
        losses.token_label_loss(output, targets, cls_target="on")
    with pytest.raises(ValueError, match="token head"):
        losses.token_label_loss(ModelOutput(logits=output.cls, cls=output.cls), targets)


@pytest.mark.parametrize(("alpha", "tau"), [(0.3, 3.0), (0.5, 1.0), (0.0, 2.0), (1.0, 2.0)])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_loss(kind, alpha, tau):
    output, targets = draw(2)
    teacher = 3 * randn(B, L, seed=3)
    if kind == "hard":
        distilled = cross_entropy(output.dist, np.eye(L)[teacher.argmax(-1)]).mean()
    else:
        p, q = log_softmax(teacher / tau), log_softmax(output.dist / tau)
        distilled = (np.exp(p) * (p - q)).sum() * tau**2 / (B * L)
    expected = (1 - alpha) * cross_entropy(output.cls, targets.label).mean() + alpha * distilled
    loss = losses.distillation_loss(output, targets.label, teacher, kind=kind, alpha=alpha, tau=tau)
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_distillation_errors():
    output, targets = draw()
    with pytest.raises(ValueError, match="not 'warm'"):
        losses.distillation_loss(output, targets.label, output.cls, kind="warm", alpha=0.5, tau=1.0)
    with pytest.raises(ValueError, match="distillation token"):
        losses.distillation_loss(
            ModelOutput(logits=output.cls, cls=output.cls),
            targets.label,
            output.cls,
            kind="hard",
            alpha=0.5,
            tau=1.0,
        )


def test_shapes_are_not_broadcast(unchecked_shapes):
    """A batch of 1 against one of 4, in every term."""
    output, targets = draw()
    one = TokenTargets(cls=targets.cls[:1], tokens=targets.tokens, label=targets.label[:1])
    for cls_target in ("annotator", "label"):
        with pytest.raises(ValueError, match=r"Logits are \[4, 5\] but targets \[1, 5\]"):
            losses.token_label_loss(output, one, cls_target=cls_target)
    weighted = TokenTargets(targets.cls, targets.tokens, targets.label, weight=np.ones((1, N), np.float32))
    with pytest.raises(ValueError, match=r"Weights of tokens are \[1, 6\] but tokens \[4, 6\]"):
        losses.token_label_loss(output, weighted)
    for kind in losses.DISTILLATION:
        distil = lambda labels, teacher, kind=kind: losses.distillation_loss(
            output, labels, teacher, kind=kind, alpha=0.5, tau=1.0
        )
        with pytest.raises(ValueError, match=r"Teacher logits are \[1, 5\] but the student's \[4, 5\]"):
            distil(targets.label, output.cls[:1])
        with pytest.raises(ValueError, match=r"Logits are \[4, 5\] but targets \[1, 5\]"):
            distil(targets.label[:1], output.cls)


@pytest.mark.parametrize(("alpha", "tau"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, float("nan"))])
def test_alpha_and_tau_out_of_range(alpha, tau):
    output, targets = draw()
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\] and tau above 0"):
        losses.distillation_loss(output, targets.label, output.cls, kind="soft", alpha=alpha, tau=tau)
