"""BatchNorm against PyTorch's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import randn
from flax import nnx

from tlvit.models import functional
from tlvit.models.batch_norm import BatchNorm


def test_batch_norm_has_pytorch_conventions():
    """Means 2 and 5; biased variances 1 and 4 in the output, unbiased 2 and 8 in the average."""
    norm = BatchNorm(2)
    norm.scale[...] = jnp.array([1.0, 3.0])
    norm.bias[...] = jnp.array([0.5, -1.0])
    x = np.array([[1.0, 3.0], [3.0, 7.0]], np.float32)
    net = nnx.view(norm, use_running_average=False)
    y = net(x)
    unit = np.array([-1.0, 1.0])[:, None] / np.sqrt(1 + np.array([1e-5, 1e-5 / 4]))
    np.testing.assert_allclose(y, unit * [1.0, 3.0] + [0.5, -1.0], atol=1e-5)
    np.testing.assert_allclose(net.mean[...], [0.2, 0.5], atol=1e-6)
    np.testing.assert_allclose(net.var[...], [0.9 + 0.1 * 2, 0.9 + 0.1 * 8], atol=1e-6)
    # Evaluation uses the running ones.
    norm.mean[...], norm.var[...] = jnp.array([1.0, 1.0]), jnp.array([4.0, 0.25])
    expected = (x - 1) / np.sqrt(np.array([4.0, 0.25]) + 1e-5) * [1.0, 3.0] + [0.5, -1.0]
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)


def test_batch_norm_counts_pixels_and_keeps_float32_statistics():
    x = (3 + 2 * randn(4, 5, 6, 3)).astype(np.float32)
    net = nnx.view(BatchNorm(3, momentum=1.0, dtype=jnp.bfloat16), use_running_average=False)
    y = net(jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    assert net.var[...].dtype == jnp.float32
    np.testing.assert_allclose(net.mean[...], x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(net.var[...], x.reshape(-1, 3).var(0, ddof=1), rtol=1e-5)


def test_statistics_far_from_zero_are_exact_once_the_running_mean_is_near():
    """The variance is a mean of squared distances to the running mean, minus a square."""
    x = (1000 + randn(64, 5, 3)).astype(np.float32)
    norm = BatchNorm(3, momentum=1.0)
    norm.mean[...] = jnp.full(3, 999.0)
    net = nnx.view(norm, use_running_average=False)
    net(jnp.asarray(x))
    np.testing.assert_allclose(net.mean[...], x.mean((0, 1), np.float64), rtol=1e-6)
    np.testing.assert_allclose(net.var[...], x.reshape(-1, 3).var(0, np.float64, ddof=1), rtol=1e-4)


def test_the_gradient_is_that_of_the_formula_for_any_running_mean():
    x, weights = randn(8, 4, 3), randn(8, 4, 3, seed=1)

    def plain(x):
        centered = x - x.mean((0, 1), keepdims=True)
        return jnp.sum(weights * centered / jnp.sqrt((centered**2).mean((0, 1), keepdims=True) + 1e-5))

    for running in (0.0, 2.0):
        norm = BatchNorm(3)
        norm.mean[...] = jnp.full(3, running)
        net, params, stats = functional.functionalize(norm)
        ours = lambda x, net=net, p=params, s=stats: jnp.sum(weights * net.bind(p, s, train=True)(x))
        np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), atol=1e-5)


def test_batch_norm_is_synchronized_over_devices():
    """Eight devices compute the statistics of the global batch."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = randn(16, 3, 3, 4) + np.arange(16, dtype=np.float32).reshape(16, 1, 1, 1)
    net, params, stats = functional.functionalize(BatchNorm(4))

    @jax.jit
    def run(x):
        module = net.bind(params, stats, train=True)
        return module(x), module.var[...]

    for got, expected in zip(run(jax.device_put(x, split)), run(x), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
