"""The transformers' common steps against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tlvit.models import layers
from tlvit.models import vit as tokens
from tlvit.ops import mixing


def randn(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def test_embedding_puts_prefix_tokens_first_and_adds_positions():
    x, cls, dist, positions = (
        randn(2, 2, 3, 4),
        randn(1, 1, 4, seed=1),
        randn(1, 1, 4, seed=2),
        randn(1, 8, 4, seed=3),
    )
    got = tokens.embed_tokens(x, [cls, dist], positions, grid=(2, 3))
    expected = (
        np.concatenate([np.tile(cls, (2, 1, 1)), np.tile(dist, (2, 1, 1)), x.reshape(2, 6, 4)], 1) + positions
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"3x2 tokens, the images give 2x3"):
        tokens.embed_tokens(x, [cls], positions, grid=(3, 2))


def test_the_sequence_has_the_images_type():
    got = tokens.embed_tokens(
        jnp.ones((1, 1, 1, 2), jnp.bfloat16), [randn(1, 1, 2)], randn(1, 2, 2), grid=(1, 1)
    )
    assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize("remat", [False, True])
def test_blocks_run_in_order_with_keys_of_their_own(remat):
    options = {"mlp_ratio": 1.0, "qkv_bias": True, "epsilon": 1e-6, "drop_path": 0.5, "rngs": nnx.Rngs(0)}
    blocks = nnx.List(layers.Block(4, 2, **options) for _ in range(2))
    x, key = randn(2, 3, 4), jax.random.key(1)
    np.testing.assert_allclose(
        layers.run_blocks(blocks, x, None, remat=remat), blocks[1](blocks[0](x)), atol=1e-6
    )
    first, second = jax.random.split(key)
    expected = blocks[1](blocks[0](x, first), second)
    np.testing.assert_allclose(layers.run_blocks(blocks, x, key, remat=remat), expected, atol=1e-6)


def test_classification_without_a_token_head():
    cls, dist = randn(2, 5), randn(2, 5, seed=1)
    common = {"grid": (1, 3), "mix": None, "rule": "max", "token_weight": 0.5}
    output = tokens.classify(cls, randn(2, 3, 4), None, **common)
    assert (output.tokens, output.dist) == (None, None)
    np.testing.assert_array_equal(output.logits, cls)
    output = tokens.classify(cls, randn(2, 3, 4), None, dist=dist, **common)
    np.testing.assert_allclose(output.logits, (cls + dist) / 2, atol=1e-6)
    np.testing.assert_array_equal(output.dist, dist)


def test_token_logits_of_a_mixed_batch_are_pasted_back():
    head = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    cls, patches = randn(2, 5), randn(2, 6, 4, seed=1)
    mix = mixing.mixtoken_mask_from_box((0, 1, 2, 3), (2, 3))  # columns 1 and 2
    output = tokens.classify(cls, patches, head, grid=(2, 3), mix=mix, rule="mean", token_weight=0.3)
    plain = np.asarray(head(patches)).reshape(2, 2, 3, 5)
    expected = plain.copy()
    expected[:, :, 1:] = plain[::-1, :, 1:]
    np.testing.assert_allclose(output.tokens, expected.reshape(2, 6, 5), atol=1e-6)
    np.testing.assert_allclose(output.logits, cls + 0.3 * expected.mean((1, 2)), atol=1e-6)


def test_rules_of_inference():
    cls, logits = randn(2, 5), randn(2, 6, 5, seed=1)
    for rule, pooled in {"max": logits.max(1), "mean": logits.mean(1), "class": 0.0}.items():
        got = tokens.infer(cls, logits, rule=rule, token_weight=0.5)
        np.testing.assert_allclose(got, cls + 0.5 * pooled, atol=1e-6)
        assert tokens.check_rule(rule) == rule
    with pytest.raises(ValueError, match="max, mean, class, not 'median'"):
        tokens.check_rule("median")


def test_attention_maps_pass_over_blocks_without_attention():
    block = layers.Block(4, 2, mlp_ratio=1.0, qkv_bias=True, epsilon=1e-6, rngs=nnx.Rngs(0))
    double = lambda x: 2 * x
    x = randn(2, 3, 4)
    (got,) = tokens.attention_maps([double, block], x)
    np.testing.assert_allclose(got, block.attn.weights(block.norm1(2 * x)), atol=1e-6)
