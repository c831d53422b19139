"""Relevance of patches: gradients of attention weights against finite differences, for every kind of
block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import images, randn
from flax import nnx

import tlvit
from tlvit.models.relevance import class_logits, relevance_map, rollout_map
from tlvit.ops.relevance import attention_rollout, gradient_relevance

SIZE = {"dim": 16, "num_heads": 2, "image_size": 32, "num_classes": 7}
MODELS = {
    "lvvit_s": {"depth": 2, "stem_width": 8, "patch_size": 8},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "patch_size": 8},
    "t2t_vit_7": {"depth": 2},
    "t2t_vit_14_se": {"depth": 2},
    "t2t_vit_16_ghost": {"depth": 2},
    "t2t_vit_dense": {"depth": (1, 1), "growth": 8},
}
QUICK = "deit_tiny_distilled_patch16_224"
NAMES = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in MODELS]
IMAGES = images(2, 32)
CLASSES = np.array([[3, 0], [5, 3]])
STEPS = np.array([0, -0.04, -0.02, 0.02, 0.04], np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_relevance_of_a_model(name):
    """The logits without offsets, the gradients, and which row of which matrix is returned."""
    model = tlvit.create_model(name, **SIZE, **MODELS[name])

    @jax.jit
    def run(images):
        maps = model.attention_maps(images)
        offsets = [2 * attention * randn(*attention.shape, seed=i) for i, attention in enumerate(maps)]
        logits = lambda step: class_logits(model, images, [step * offset for offset in offsets])
        chosen = lambda given: class_logits(model, images, given)[np.arange(2), CLASSES[:, 0]].sum()
        gradients = jax.grad(chosen)([jnp.zeros_like(attention) for attention in maps])
        slope = sum(jnp.sum(g * o, (1, 2, 3)) for g, o in zip(gradients, offsets, strict=True))
        results = {"logits": jax.lax.map(logits, STEPS), "maps": maps, "gradients": gradients, "slope": slope}
        found = {"map": relevance_map(model, images, CLASSES), "rollout": rollout_map(model, images)}
        return results | found | {"output": model(images)}

    found = run(IMAGES)
    output = found["output"]
    logits = output.cls if output.dist is None else (output.cls + output.dist) / 2
    zero, *steps = np.asarray(found["logits"], np.float64)
    np.testing.assert_allclose(zero, logits, atol=1e-5)

    a, b, c, d = (x[np.arange(2), CLASSES[:, 0]] for x in steps)
    difference = (a - 8 * b + 8 * c - d) / (12 * 0.02)  # of fourth order
    assert np.abs(found["slope"]).max() > 1e-4
    np.testing.assert_allclose(found["slope"], difference, rtol=1e-3, atol=1e-5)

    prefix = 1 if output.dist is None else 2
    h, w = model.grid
    rows = lambda matrix: np.asarray(matrix)[:, :prefix, prefix:].mean(1).reshape(2, h, w)
    np.testing.assert_allclose(found["rollout"], rows(attention_rollout(found["maps"])), atol=1e-6)
    expected = rows(gradient_relevance(found["maps"], found["gradients"]))
    np.testing.assert_allclose(found["map"][:, 0], expected, rtol=1e-4, atol=1e-8)
    assert np.abs(found["map"][:, 1] - expected).max() > 1e-3 * expected.max()  # of another class


def test_convolutional_models_have_no_attention():
    sizes = {"widths": (8,), "depths": (1,), "strides": (2,), "group_width": 8}
    model = nnx.eval_shape(lambda: tlvit.create_model("regnety_002", num_classes=3, **sizes))
    with pytest.raises(ValueError, match="RegNetY has no attention: attention and relevance are drawn of"):
        relevance_map(model, IMAGES, CLASSES)
    with pytest.raises(ValueError, match="RegNetY has no attention"):
        rollout_map(model, IMAGES)
