"""Softmax attention and the attention of the Performer against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randn, softmax

from tlvit.ops import attention


def test_heads_are_consecutive_channels():
    x = randn(2, 5, 12)
    heads = attention.split_heads(x, 3)
    np.testing.assert_array_equal(heads[:, 1], x[:, :, 4:8])
    np.testing.assert_array_equal(attention.merge_heads(heads), x)


def test_softmax_is_float32_in_bfloat16_attention():
    q, k = jnp.asarray(randn(1, 1, 4, 8), jnp.bfloat16), jnp.asarray(randn(1, 1, 4, 8, seed=1), jnp.bfloat16)
    weights = attention.attention_weights(q, k, scale=0.3)
    assert weights.dtype == jnp.float32
    exact = softmax(0.3 * np.asarray(q, np.float64)[0, 0] @ np.asarray(k, np.float64)[0, 0].T)
    np.testing.assert_allclose(weights[0, 0], exact, atol=1e-5)  # bfloat16 logits would be 1e-2 off
    assert attention.attend(q, k, k, scale=0.3).dtype == jnp.bfloat16


def plain_performer(query, key, value, w, epsilon=1e-8):
    """The published formula, one image, in float64."""
    phi = lambda x: np.exp(x @ w.T - (x * x).sum(-1, keepdims=True) / 2) / np.sqrt(len(w))
    products = phi(query.astype(np.float64)) @ phi(key.astype(np.float64)).T
    return products @ value / (products.sum(-1, keepdims=True) + epsilon)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_performer_equals_the_published_formula(scale):
    query, key, value = (scale * randn(2, 9, 16, seed=i) for i in range(3))
    w = randn(8, 16, seed=3)
    got = attention.performer_attention(query, key, value, w)
    expected = np.stack([plain_performer(*parts, w) for parts in zip(query, key, value, strict=True)])
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e19, 1e38])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_performer_is_finite_for_any_finite_input(scale, dtype):
    """Values and gradients. All features of such inputs are 0, and the published quotient is 0 / 1e-8."""
    query, key = (jnp.asarray(scale * np.clip(randn(2, 9, 16, seed=i), -2, 2), dtype) for i in range(2))
    value, w = jnp.asarray(randn(2, 9, 16, seed=2), dtype), randn(8, 16, seed=3)
    out = attention.performer_attention(query, key, value, w)
    np.testing.assert_array_equal(out, 0.0)
    grads = jax.grad(lambda *x: attention.performer_attention(*x, w).sum(), argnums=(0, 1, 2))(
        query, key, value
    )
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)


def test_performer_equals_the_formula_where_epsilon_and_underflow_begin():
    """Queries and keys longer than the features: products from e^-10 to e^-100, around epsilon = e^-18."""
    w = np.sqrt(8) * np.linalg.qr(randn(16, 8))[0].T
    along = lambda length, rows: np.asarray(length, np.float32)[:, None] * w[list(rows)]
    query, key = (
        along([2, 2.5, 2.8, 3, 3.3, 4], [0, 1, 2, 3, 4, 5]),
        along([2.5, 2.6, 2.9, 3, 3.2, 3], [0, 1, 2, 3, 4, 5]),
    )
    value = randn(6, 16, seed=2)
    expected = plain_performer(query, key, value, w.astype(np.float64))
    fraction = np.abs(expected).max(1) / np.abs(value).max(1)
    assert fraction.max() > 0.9
    assert fraction.min() < 1e-6
    got = attention.performer_attention(query[None], key[None], value[None], w.astype(np.float32))[0]
    np.testing.assert_allclose(got, expected, rtol=5e-4, atol=1e-12)


def test_performer_gradient_equals_that_of_the_formula():
    query, key, value = (0.5 * randn(1, 5, 8, seed=i) for i in range(3))
    w, weight = randn(4, 8, seed=3), randn(1, 5, 8, seed=4)

    def score(q, k, v):
        return jnp.sum(weight * attention.performer_attention(q, k, v, w))

    grads = jax.grad(score, argnums=(0, 1, 2))(query, key, value)
    inputs = [x.astype(np.float64) for x in (query, key, value)]
    for i, grad in enumerate(grads):
        for index in [(0, 0, 0), (0, 3, 5), (0, 4, 7)]:
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in inputs]
                moved[i][index] += step
                sides.append(np.sum(weight[0] * plain_performer(*(x[0] for x in moved), w)))
            assert abs(grad[index] - (sides[0] - sides[1]) / 2e-5) < 1e-4
