"""T2T-ViT's block variants: goldens of squeeze-and-excitation and dense, ghost against numpy."""

import math

import jax
import numpy as np
import pytest
from conftest import golden_images, randn, softmax
from flax import nnx
from model_goldens import filled, relative

from tlvit.models import functional, layers, t2t_blocks
from tlvit.models import vit as tokens


def numpy_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2t_vit_14_se", "t2t_vit_dense"])
def test_evaluation_logits_equal_the_published_ones(golden, name):
    expected = golden("t2t_visible.npz")[f"{name}_224_1000/eval_logits"]
    net, params, stats = functional.functionalize(filled(name))
    output, _ = jax.jit(net.apply)(params, stats, golden_images(0, 2, 224))
    assert relative(output.logits, expected) < 1e-4


def test_ghost_attention_equals_numpy():
    """Half of each of q, k, v is projected, the other half a scaled copy, before the heads are split."""
    attention = t2t_blocks.GhostAttention(8, 2, qkv_bias=False, rngs=nnx.Rngs(0))
    weights = {n: randn(8, 4, seed=i) / 2 for i, n in enumerate("qkv")}
    scales = {n: randn(4, seed=5 + i) for i, n in enumerate("qkv")}
    for n in "qkv":
        getattr(attention, n).kernel[...] = weights[n]
        getattr(attention, f"cheap_operation_{n}").scale[...] = scales[n].reshape(4, 1, 1)
    x = randn(2, 5, 8)
    parts = {n: np.concatenate([x @ weights[n], (x @ weights[n]) * scales[n]], -1) for n in "qkv"}
    out = np.zeros((2, 5, 8))
    for head in range(2):
        q, k, v = (parts[n][..., 4 * head : 4 * head + 4] for n in "qkv")
        maps = softmax(q @ k.swapaxes(1, 2) / 2)
        np.testing.assert_allclose(attention.weights(x)[:, head], maps, atol=1e-5)
        out[..., 4 * head : 4 * head + 4] = maps @ v
    expected = out @ np.asarray(attention.proj.kernel[...]) + np.asarray(attention.proj.bias[...])
    np.testing.assert_allclose(attention(x), expected, atol=1e-5)


def test_ghost_mlp_equals_numpy():
    mlp = t2t_blocks.GhostMlp(4, 12, rngs=nnx.Rngs(0))
    mlp.fc1.kernel[...], mlp.fc2.kernel[...] = randn(4, 4), randn(12, 4, seed=1)
    second, third = randn(4, seed=2), randn(4, seed=3)
    mlp.cheap_operation2.scale[...] = second.reshape(4, 1, 1)
    mlp.cheap_operation3.scale[...] = third.reshape(4, 1, 1)
    x = randn(2, 5, 4, seed=4)
    first = numpy_gelu(x @ randn(4, 4))
    hidden = np.concatenate([first, numpy_gelu(first * second), numpy_gelu(first * third)], -1)
    np.testing.assert_allclose(mlp(x), hidden @ randn(12, 4, seed=1), atol=1e-5)


def test_token_gate_is_driven_by_the_mean_over_tokens():
    gate = t2t_blocks.TokenGate(8, 2, rngs=nnx.Rngs(0))
    squeeze, excite = randn(8, 2), randn(2, 8, seed=1)
    gate.fc[0].kernel[...], gate.fc[2].kernel[...] = squeeze, excite
    x = randn(2, 5, 8, seed=2)
    expected = x / (1 + np.exp(-np.maximum(x.mean(1) @ squeeze, 0) @ excite))[:, None]
    np.testing.assert_allclose(gate(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "depth", "width"),
    [
        ("plain", 2, 32),
        pytest.param("se", 2, 32, marks=pytest.mark.slow),
        pytest.param("ghost", 2, 32, marks=pytest.mark.slow),
        pytest.param("dense", (2, 1), 24, marks=pytest.mark.slow),
    ],
)
def test_every_kind_drops_and_shows_its_attention(kind, depth, width):
    blocks, got = t2t_blocks.make_blocks(
        kind, 32, 2, depth=depth, growth=4, drop_path=0.5, mlp_ratio=3.0, qkv_bias=False, epsilon=1e-5,
        drop_rate=0.2, attn_drop=0.2, dtype=None, rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert got == width
    x = randn(2, 5, 32)
    plain, dropped, maps = jax.jit(
        lambda x, key: (
            layers.run_blocks(blocks, x, None),
            layers.run_blocks(blocks, x, key),
            tokens.attention_maps(blocks, x),
        )
    )(x, jax.random.key(0))  # fmt: skip
    assert plain.shape == (2, 5, width)
    assert np.abs(dropped - plain).max() > 1e-4
    assert [m.shape for m in maps] == [(2, 2, 5, 5)] * (3 if kind == "dense" else 2)
    np.testing.assert_allclose(np.stack(maps).sum(-1), 1, atol=1e-5)


def test_dense_stages_grow_halve_and_have_one_drop_path_rate():
    options = {"mlp_ratio": 2.0, "qkv_bias": False, "epsilon": 1e-5, "dtype": None}
    build = lambda: nnx.List(
        t2t_blocks.make_blocks(
            "dense", 32, 2, depth=(2, 1, 1), growth=8, drop_path=0.11, rngs=nnx.Rngs(0), **options
        )[0]
    )
    blocks = nnx.eval_shape(build)
    kinds = [type(b).__name__ for b in blocks]
    assert kinds == ["DenseBlock", "DenseBlock", "Transition", "DenseBlock", "Transition", "DenseBlock"]
    dense = [b for b in blocks if isinstance(b, t2t_blocks.DenseBlock)]
    assert [b.norm1.scale.shape[0] for b in dense] == [32, 40, 24, 16]
    # As published: all blocks of stage i have the rate of the i-th of twelve blocks.
    np.testing.assert_allclose([b.drop_path for b in dense], [0, 0, 0.01, 0.02], atol=1e-9)


def test_errors_name_the_numbers():
    options = {"mlp_ratio": 3.0, "qkv_bias": False, "epsilon": 1e-5, "growth": 4, "drop_path": 0.0}
    for kind, dim, depth, text in [
        ("dense", 32, 3, "depth must be a tuple, not 3"),
        ("se", 32, (3, 3), r"depth must be a number, not \(3, 3\)"),
        ("ghost", 9, 1, "Width 9 cannot be halved"),
    ]:
        with pytest.raises(ValueError, match=text):
            t2t_blocks.make_blocks(kind, dim, 2, depth=depth, dtype=None, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match="hidden width of 96, not 64"):
        t2t_blocks.GhostMlp(32, 64, rngs=nnx.Rngs(0))
