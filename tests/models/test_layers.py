"""Layers against plain numpy and torch's conventions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tlvit.models import functional, layers
from tlvit.ops.resize import resize_pos_embed


def randn(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def numpy_attention(x, qkv, bias, proj, proj_bias, heads):
    """One image [N, D] at a time, one head at a time, in float64."""
    dim = x.shape[-1]
    width = dim // heads
    out, maps = np.zeros(x.shape), np.zeros((x.shape[0], heads, x.shape[1], x.shape[1]))
    for b, tokens in enumerate(x.astype(np.float64)):
        q, k, v = np.split(tokens @ qkv + bias, 3, axis=-1)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            maps[b, head] = softmax(q[:, part] @ k[:, part].T / math.sqrt(width))
            out[b, :, part] = maps[b, head] @ v[:, part]
    return out @ proj + proj_bias, maps


@pytest.mark.parametrize("bias", [False, True])
def test_attention_equals_numpy(bias):
    attention = layers.Attention(12, 3, qkv_bias=bias, rngs=nnx.Rngs(0))
    attention.qkv.kernel[...] = randn(12, 36, seed=1)
    attention.proj.kernel[...] = randn(12, 12, seed=2) / 3
    attention.proj.bias[...] = randn(12, seed=3)
    if bias:
        attention.qkv.bias[...] = randn(36, seed=4)
    qkv_bias = randn(36, seed=4) if bias else 0.0
    x = randn(2, 5, 12) / 2
    expected, maps = numpy_attention(
        x, randn(12, 36, seed=1), qkv_bias, randn(12, 12, seed=2) / 3, randn(12, seed=3), 3
    )
    np.testing.assert_allclose(attention(x), expected, atol=1e-5)
    weights = attention.weights(x)
    np.testing.assert_allclose(weights, maps, atol=1e-5)
    assert weights.dtype == jnp.float32


def test_attention_drops_weights_only_with_a_key():
    attention = layers.Attention(8, 2, qkv_bias=False, attn_drop=0.5, rngs=nnx.Rngs(0))
    x = randn(2, 6, 8)
    np.testing.assert_array_equal(attention(x), attention(x))
    assert np.abs(attention(x, jax.random.key(0)) - attention(x)).max() > 1e-6
    with pytest.raises(ValueError, match=r"10.*4 heads"):
        layers.Attention(10, 4, qkv_bias=False, rngs=nnx.Rngs(0))


def test_softmax_is_float32_in_bfloat16_attention():
    q, k = jnp.asarray(randn(1, 1, 4, 8), jnp.bfloat16), jnp.asarray(randn(1, 1, 4, 8, seed=1), jnp.bfloat16)
    weights = layers.attention_weights(q, k, scale=0.3)
    assert weights.dtype == jnp.float32
    exact = softmax(0.3 * np.asarray(q, np.float64)[0, 0] @ np.asarray(k, np.float64)[0, 0].T)
    np.testing.assert_allclose(weights[0, 0], exact, atol=1e-5)  # bfloat16 logits would be 1e-2 off
    assert layers.attend(q, k, k, scale=0.3).dtype == jnp.bfloat16


def test_batch_norm_has_torchs_conventions():
    """Means 2 and 5; biased variances 1 and 4 in the output, unbiased 2 and 8 in the average."""
    norm = layers.BatchNorm(2)
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
    net = nnx.view(layers.BatchNorm(3, momentum=1.0, dtype=jnp.bfloat16), use_running_average=False)
    y = net(jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    assert net.var[...].dtype == jnp.float32
    np.testing.assert_allclose(net.mean[...], x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(net.var[...], x.reshape(-1, 3).var(0, ddof=1), rtol=1e-5)


def test_batch_norm_is_synchronized_over_devices():
    """Statistics of the global batch, whatever lies on which device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = randn(16, 3, 3, 4) + np.arange(16, dtype=np.float32).reshape(16, 1, 1, 1)
    net, params, stats = functional.functionalize(layers.BatchNorm(4))

    @jax.jit
    def run(x):
        module = net.bind(params, stats, train=True)
        return module(x), module.var[...]

    for got, expected in zip(run(jax.device_put(x, split)), run(x), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_layer_norm_and_gelu():
    x = randn(3, 7)
    for epsilon in (1e-5, 1e-1):
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        np.testing.assert_allclose(
            layers.layer_norm(7, epsilon=epsilon, rngs=nnx.Rngs(0))(x), expected, atol=1e-5
        )
    exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.ravel()]
    np.testing.assert_allclose(layers.gelu(x).ravel(), exact, atol=1e-6)  # the tanh form is 5e-4 off


def test_block_divides_both_branches_by_skip_lam():
    block = layers.Block(8, 2, mlp_ratio=3, qkv_bias=False, epsilon=1e-5, skip_lam=2.0, rngs=nnx.Rngs(0))
    assert block.mlp.fc1.kernel.shape == (8, 24)
    x = randn(2, 5, 8)
    middle = x + np.asarray(block.attn(block.norm1(x))) / 2
    np.testing.assert_allclose(block(x), middle + np.asarray(block.mlp(block.norm2(middle))) / 2, atol=1e-6)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    x = np.ones((20000, 3, 2), np.float32)
    y = np.asarray(layers.drop_path(x, 0.3, jax.random.key(0)))
    kept = y[:, 0, 0] > 0
    np.testing.assert_array_equal(y, np.where(kept[:, None, None], np.float32(1 / 0.7), 0) * x)
    assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.21 / 20000)
    assert layers.drop_path(x, 0.3, None) is x
    assert layers.drop_path(x, 0.0, jax.random.key(0)) is x
    assert layers.drop_path(jnp.asarray(x, jnp.bfloat16), 0.3, jax.random.key(0)).dtype == jnp.bfloat16


def test_dropout_drops_elements_and_keeps_the_mean():
    x = np.ones((200, 100), np.float32)
    y = np.asarray(layers.dropout(x, 0.2, jax.random.key(1)))
    np.testing.assert_allclose(np.unique(y), [0, 1.25], atol=1e-6)
    assert abs((y == 0).mean() - 0.2) < 4 * math.sqrt(0.16 / 20000)
    assert 0 < (y == 0).mean(0).min() < (y == 0).mean(0).max() < 1
    assert layers.dropout(x, 0.2, None) is x
    assert layers.dropout(x, 0.0, jax.random.key(1)) is x


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
    conv = layers.conv(16, 64, 5, rngs=nnx.Rngs(0))
    bound = 1 / math.sqrt(16 * 25)  # torch: uniform in +- 1 / sqrt(fan in) for kernel and bias
    for values in (conv.kernel[...], conv.bias[...]):
        assert 0.95 * bound < float(jnp.abs(values).max()) <= bound
    assert abs(float(conv.kernel[...].std()) - bound / math.sqrt(3)) < 0.02 * bound


def test_conv_pads_like_torch():
    """A 7x7 kernel of ones, stride 2, padding 3, counts the pixels under it."""
    conv = layers.conv(1, 1, 7, stride=2, padding=3, bias=False, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.ones((7, 7, 1, 1))
    y = conv(jnp.ones((1, 8, 8, 1)))[0, :, :, 0]
    line = np.array([4, 6, 7, 5])  # pixels 0-3, 0-5, 1-7, 3-7
    np.testing.assert_allclose(y, line[:, None] * line[None, :])


def test_token_grid():
    assert layers.token_grid(224, 16) == (14, 14)
    assert layers.token_grid((32, 48), 8) == (4, 6)
    for size, text in ((225, "225x225"), ((32, 40), "32x40"), (0, "0x0")):
        with pytest.raises(ValueError, match=f"{text}.*16"):
            layers.token_grid(size, 16)


@pytest.mark.parametrize("case", ["14to24", "14to28", "24to14", "14to32"])
@pytest.mark.parametrize("prefix", [1, 2])
def test_resize_pos_embed_equals_torch(golden, case, prefix):
    z = golden("target_visible.npz")
    table, expected = z[f"pos/{case}/in"], z[f"pos/{case}/out"]
    extra = randn(1, prefix - 1, table.shape[-1])
    side = int(case.split("to")[1])
    resized = resize_pos_embed(np.concatenate([extra, table], 1), (side, side), num_prefix=prefix)
    np.testing.assert_allclose(resized[:, prefix - 1 :], expected, atol=1e-5)
    np.testing.assert_array_equal(resized[:, : prefix - 1], extra)
    np.testing.assert_array_equal(resized[:, prefix - 1], table[:, 0])


def test_resize_pos_embed_between_oblong_grids():
    table = randn(1, 1 + 12, 3)
    wide = resize_pos_embed(table, (3, 8), num_prefix=1, old_grid=(3, 4))
    tall = table[:, 1:].reshape(1, 3, 4, 3).swapaxes(1, 2).reshape(1, 12, 3)
    tall = resize_pos_embed(np.concatenate([table[:, :1], tall], 1), (8, 3), num_prefix=1, old_grid=(4, 3))
    np.testing.assert_allclose(
        wide[:, 1:].reshape(3, 8, 3), tall[:, 1:].reshape(8, 3, 3).swapaxes(0, 1), atol=1e-5
    )
    assert resize_pos_embed(table, (3, 4), num_prefix=1, old_grid=(3, 4)) is table
    # The rows of an unchanged side stay as they are in the mean of a constant column.
    flat = np.broadcast_to(table[:, :1], (1, 10, 3))
    np.testing.assert_allclose(
        resize_pos_embed(flat, (5, 7), num_prefix=1),
        np.broadcast_to(flat[:, :1], (1, 36, 3)),
        atol=1e-5,
    )


def test_resize_pos_embed_errors_name_the_numbers():
    with pytest.raises(ValueError, match=r"14 tokens, 1 of them.*13 are no 3x3.*old_grid"):
        resize_pos_embed(randn(1, 14, 2), (4, 4), num_prefix=1)
    with pytest.raises(ValueError, match="12 are no 4x4"):
        resize_pos_embed(randn(1, 13, 2), (4, 4), num_prefix=1, old_grid=(4, 4))
    with pytest.raises(ValueError, match="0 are no"):
        resize_pos_embed(randn(1, 1, 2), (4, 4), num_prefix=1)


def test_buffers_are_stats_not_parameters():
    class WithTable(nnx.Module):
        def __init__(self):
            self.table = layers.Buffer(jnp.ones((2, 2)))
            self.gain = nnx.Param(jnp.ones((2,)))

    _, params, stats = functional.functionalize(WithTable())
    assert (set(params), set(stats)) == ({"gain"}, {"table"})
