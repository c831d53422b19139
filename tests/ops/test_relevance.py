"""Attention rollout and gradient-weighted relevance against their equations, in float64."""

import numpy as np
import pytest
from conftest import randn, softmax

from tlvit.ops.relevance import attention_rollout, gradient_relevance

MAPS = [softmax(2 * randn(2, 3, 5, 5, seed=i)).astype(np.float32) for i in range(4)]
GRADIENTS = [randn(2, 3, 5, 5, seed=10 + i) for i in range(4)]


def test_rollout_is_the_product_of_the_mean_attention_and_the_identity():
    expected = np.eye(5)[None].repeat(2, 0)
    for attention in MAPS:
        expected = (0.5 * attention.astype(np.float64).mean(1) + 0.5 * np.eye(5)) @ expected
    found = attention_rollout(MAPS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.sum(found, -1), 1, atol=1e-6)


def test_rollout_of_one_block_by_hand():
    """Token 0 attends to token 1 only, token 1 to itself."""
    attention = np.array([[0, 1], [0, 1]], np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(attention_rollout([attention])[0], [[0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(attention_rollout([attention] * 2)[0], [[0.25, 0.75], [0, 1]])


def test_relevance_follows_the_rule_of_self_attention():
    expected = np.eye(5)[None].repeat(2, 0)
    for attention, gradient in zip(MAPS, GRADIENTS, strict=True):
        product = attention.astype(np.float64) * gradient.astype(np.float64)
        expected = expected + np.where(product > 0, product, 0).mean(1) @ expected
    found = gradient_relevance(MAPS, GRADIENTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_relevance_leaves_out_what_speaks_against_the_class():
    """Per head, before the mean: one head's positive part is not canceled by another's negative one."""
    attention = np.full((1, 2, 2, 2), 0.5, np.float32)
    gradient = np.zeros((1, 2, 2, 2), np.float32)
    gradient[0, 0, 0, 1], gradient[0, 1, 0, 1], gradient[0, 1, 1, 0] = 2, -6, -1
    np.testing.assert_allclose(gradient_relevance([attention], [gradient])[0], [[1, 0.5], [0, 1]])


def test_maps_and_gradients_must_be_given():
    with pytest.raises(ValueError, match="There is no attention map"):
        attention_rollout([])
    with pytest.raises(ValueError, match="4 attention maps need as many gradients, not 3"):
        gradient_relevance(MAPS, GRADIENTS[:3])
