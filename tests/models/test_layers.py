"""Layers against NumPy and PyTorch's conventions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randn
from flax import nnx

from tlvit.models import functional, layers
from tlvit.models.segmentation_heads import drop_channels
from tlvit.ops.dropout import dropout


def test_layer_norm_and_gelu():
    x = randn(3, 7)
    for epsilon in (1e-5, 1e-1):
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        np.testing.assert_allclose(
            layers.layer_norm(7, epsilon=epsilon, rngs=nnx.Rngs(0))(x), expected, atol=1e-5
        )
    exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.ravel()]
    np.testing.assert_allclose(layers.gelu(x).ravel(), exact, atol=1e-6)  # the tanh form is 5e-4 off


def test_drop_path_drops_the_branches_of_images_and_keeps_the_mean():
    x = np.ones((20000, 3, 2), np.float32)
    y = np.asarray(layers.drop_path(x, 0.3, jax.random.key(0)))
    kept = y[:, 0, 0] > 0
    np.testing.assert_array_equal(y, np.where(kept[:, None, None], np.float32(1 / 0.7), 0) * x)
    assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.21 / 20000)
    assert layers.drop_path(x, 0.3, None) is x
    assert layers.drop_path(x, 0.0, jax.random.key(0)) is x
    assert layers.drop_path(jnp.asarray(x, jnp.bfloat16), 0.3, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "drop",
    [layers.drop_path, dropout, lambda x, rate, key: drop_channels(x[:, None, None], rate, key)],
)
def test_branches_in_bfloat16_are_divided_by_the_exact_rate(drop):
    """1 - 0.1 is 0.8984 in bfloat16. Values of all sizes average the rounding of the results away."""
    x = jnp.asarray(np.random.RandomState(0).uniform(1, 2, (2000, 16)), jnp.bfloat16)
    y = np.asarray(drop(x, 0.1, jax.random.key(0)), np.float64).reshape(x.shape)
    kept = y > 0
    assert y.sum() / np.asarray(x, np.float64)[kept].sum() == pytest.approx(1 / 0.9, rel=3e-4)


def test_drop_path_rates():
    np.testing.assert_allclose(layers.drop_path_rates(0.3, 4), [0, 0.1, 0.2, 0.3], atol=1e-9)
    assert layers.drop_path_rates(0.3, 1) == [0.0]
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=str(rate)):
            layers.drop_path_rates(rate, 4)


def test_initialization_is_the_published_one():
    linear = layers.linear(400, 500, rngs=nnx.Rngs(0))
    assert abs(float(linear.kernel[...].std()) - 0.02) < 2e-4
    assert float(jnp.abs(linear.bias[...]).max()) == 0
    conv = layers.Conv(16, 64, 5, rngs=nnx.Rngs(0))
    bound = 1 / math.sqrt(16 * 25)  # torch: uniform in +- 1 / sqrt(fan in) for kernel and bias
    for values in (conv.kernel[...], conv.bias[...]):
        assert 0.95 * bound < float(jnp.abs(values).max()) <= bound
    assert abs(float(conv.kernel[...].std()) - bound / math.sqrt(3)) < 0.02 * bound


def test_logits_of_bfloat16_inputs_are_sums_in_float32():
    """Products of bfloat16 numbers are exact in float32; a sum that is rounded to bfloat16 is 2e-3 off."""
    layer = layers.classifier(64, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in (randn(3, 64), layer.kernel[...]))
    found, expected = layer(x), np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (
        np.abs(
            np.asarray(layers.linear(64, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x), float) - expected
        ).max()
        > 1e-4
    )


def test_convolution_pads_like_torch():
    """A 7x7 kernel of ones, stride 2, padding 3, counts the pixels under it."""
    conv = layers.Conv(1, 1, 7, stride=2, padding=3, bias=False, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.ones((7, 7, 1, 1))
    y = conv(jnp.ones((1, 8, 8, 1)))[0, :, :, 0]
    line = np.array([4, 6, 7, 5])  # pixels 0-3, 0-5, 1-7, 3-7
    np.testing.assert_allclose(y, line[:, None] * line[None, :])


def test_buffers_are_stats_not_parameters():
    class WithTable(nnx.Module):
        def __init__(self):
            self.table = layers.Buffer(jnp.ones((2, 2)))
            self.gain = nnx.Param(jnp.ones((2,)))

    _, params, stats = functional.functionalize(WithTable())
    assert (set(params), set(stats)) == ({"gain"}, {"table"})
