"""Attention, block and token grid against NumPy."""

import math

import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from conftest import images, randn, softmax
from flax import nnx

from tlvit.models import transformer


def numpy_attention(x, qkv, bias, proj, proj_bias, heads):
    """Output and maps of multi-head attention, computed for one image and one head at a time in float64."""
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


@pytest.mark.parametrize(
    "name", ["lvvit_s", "t2t_vit_16_ghost", pytest.param("deit_tiny_patch16_224", marks=pytest.mark.slow)]
)
def test_fused_attention_changes_no_number(name):
    x = images()
    plain, fused = (model_goldens.small(name, depth=1, attention=kind) for kind in ("xla", "fused"))
    assert fused.blocks[0].attn.fused
    assert not plain.blocks[0].attn.fused
    np.testing.assert_allclose(
        model_goldens.run(fused, x).logits, model_goldens.run(plain, x).logits, rtol=1e-5, atol=1e-6
    )


def test_which_attention_is_used(monkeypatch):
    fuses = transformer.fuses_attention
    assert [fuses(kind, attn_drop=0.0) for kind in ("xla", "fused", "auto")] == [False, True, False]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert fuses("auto", attn_drop=0.0)
    assert not fuses("auto", attn_drop=0.1)
    with pytest.raises(ValueError, match=r"no dropout of the weights, but attn_drop is 0\.1"):
        fuses("fused", attn_drop=0.1)
    with pytest.raises(ValueError, match="must be one of xla, fused, auto, not 'flash'"):
        fuses("flash", attn_drop=0.0)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_equals_numpy(bias):
    attention = transformer.Attention(12, 3, qkv_bias=bias, rngs=nnx.Rngs(0))
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
    attention = transformer.Attention(8, 2, qkv_bias=False, attn_drop=0.5, rngs=nnx.Rngs(0))
    x = randn(2, 6, 8)
    np.testing.assert_array_equal(attention(x), attention(x))
    assert np.abs(attention(x, jax.random.key(0)) - attention(x)).max() > 1e-6
    with pytest.raises(ValueError, match=r"10.*4 heads"):
        transformer.Attention(10, 4, qkv_bias=False, rngs=nnx.Rngs(0))


def test_block_divides_both_branches_by_skip_lam():
    block = transformer.Block(
        8, 2, mlp_ratio=3.0, qkv_bias=False, epsilon=1e-5, skip_lam=2.0, rngs=nnx.Rngs(0)
    )
    assert block.mlp.fc1.kernel.shape == (8, 24)
    x = randn(2, 5, 8)
    middle = x + np.asarray(block.attn(block.norm1(x))) / 2
    np.testing.assert_allclose(block(x), middle + np.asarray(block.mlp(block.norm2(middle))) / 2, atol=1e-6)


def test_token_grid():
    assert transformer.token_grid(224, 16) == (14, 14)
    assert transformer.token_grid((32, 48), 8) == (4, 6)
    for size, text in ((225, "225x225"), ((32, 40), "32x40"), (0, "0x0")):
        with pytest.raises(ValueError, match=f"{text}.*16"):
            transformer.token_grid(size, 16)
