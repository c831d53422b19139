"""The common forward pass of the transformers against NumPy."""

import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from conftest import images, randn
from flax import nnx
from model_goldens import run

from tlvit.models import functional, layers, vit
from tlvit.models.transformer import Block
from tlvit.ops import mixing

FAMILIES = [
    ("lvvit_s", {}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("t2t_vit_7", {}),
    ("t2t_vit_dense", {"depth": (1, 1), "growth": 8}),
]


class Linear(vit.TokenModel):
    """A model without stem and blocks. The pixels are the tokens."""

    def __init__(self, grid, *, token_head, distilled=False, rule="max", token_weight=0.5):
        rngs = nnx.Rngs(0)
        self.grid, self.rule, self.token_weight, self.drop_rate, self.remat = (
            grid,
            rule,
            token_weight,
            0.0,
            False,
        )
        self.cls_token = nnx.Param(randn(1, 1, 3, seed=1))
        self.dist_token = nnx.Param(randn(1, 1, 3, seed=2)) if distilled else None
        self.pos_embed = nnx.Param(randn(1, 1 + distilled + grid[0] * grid[1], 3, seed=3))
        self.blocks = nnx.List([])
        self.head = nnx.Linear(3, 5, rngs=rngs)
        self.head_dist = nnx.Linear(3, 5, rngs=rngs) if distilled else None
        self.aux_head = nnx.Linear(3, 5, rngs=rngs) if token_head else None

    def embed_patches(self, images, key=None):
        return images

    def norm(self, x):
        return x


def test_embedding_puts_prefix_tokens_first_and_adds_positions():
    x, positions = randn(2, 2, 3, 4), randn(1, 8, 4, seed=3)
    cls, dist = randn(1, 1, 4, seed=1), randn(1, 1, 4, seed=2)
    got = vit.embed_tokens(x, [cls, dist], positions, grid=(2, 3))
    prefix = [np.tile(cls, (2, 1, 1)), np.tile(dist, (2, 1, 1))]
    expected = np.concatenate([*prefix, x.reshape(2, 6, 4)], 1) + positions
    np.testing.assert_allclose(got, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"3x2 tokens, the images give 2x3"):
        vit.embed_tokens(x, [cls], randn(1, 7, 4), grid=(3, 2))


def test_the_sequence_has_the_images_type():
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    got = vit.embed_tokens(x, [randn(1, 1, 2)], randn(1, 2, 2), grid=(1, 1))
    assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize("remat", [False, True])
def test_blocks_run_in_order_with_keys_of_their_own(remat):
    options = {"mlp_ratio": 1.0, "qkv_bias": True, "epsilon": 1e-6, "drop_path": 0.5, "rngs": nnx.Rngs(0)}
    blocks = nnx.List(Block(4, 2, **options) for _ in range(2))
    x, key = randn(2, 3, 4), jax.random.key(1)
    np.testing.assert_allclose(
        layers.run_blocks(blocks, x, None, remat=remat), blocks[1](blocks[0](x)), atol=1e-6
    )
    first, second = jax.random.split(key)
    expected = blocks[1](blocks[0](x, first), second)
    np.testing.assert_allclose(layers.run_blocks(blocks, x, key, remat=remat), expected, atol=1e-6)


def test_classification_without_a_token_head():
    x = randn(2, 1, 3, 3)
    output = run(Linear((1, 3), token_head=False), x)
    assert (output.tokens, output.dist) == (None, None)
    np.testing.assert_array_equal(output.logits, output.cls)
    model = Linear((1, 3), token_head=False, distilled=True)
    output = run(model, x)
    positions = np.asarray(model.pos_embed[...])
    cls = model.head(model.cls_token[...][:, 0] + positions[:, 0])
    dist = model.head_dist(model.dist_token[...][:, 0] + positions[:, 1])
    for got, expected in [(output.cls, cls), (output.dist, dist), (output.logits, (cls + dist) / 2)]:
        np.testing.assert_allclose(got, np.tile(expected, (2, 1)), atol=1e-6)


def test_token_logits_of_a_mixed_batch_are_put_back():
    """Without blocks tokens do not interact, so the logits are those of the images before mixing."""
    model = Linear((2, 3), token_head=True, rule="mean", token_weight=0.3)
    x = randn(2, 2, 3, 3, seed=1)
    output = run(model, x, mix=mixing.mixtoken_mask_from_box((0, 1, 2, 3), (2, 3)))  # columns 1 and 2
    expected = np.asarray(model.aux_head(x.reshape(2, 6, 3) + model.pos_embed[...][:, 1:]))
    np.testing.assert_allclose(output.tokens, expected, atol=1e-6)
    np.testing.assert_allclose(output.logits, output.cls + 0.3 * expected.mean(1), atol=1e-6)


def test_rules_of_inference():
    cls, logits = randn(2, 5), randn(2, 6, 5, seed=1)
    for rule, pooled in {"max": logits.max(1), "mean": logits.mean(1), "class": 0.0}.items():
        got = vit.infer(cls, logits, rule=rule, token_weight=0.5)
        np.testing.assert_allclose(got, cls + 0.5 * pooled, atol=1e-6)
        assert vit.check_rule(rule) == rule
    with pytest.raises(ValueError, match="max, mean, class, not 'median'"):
        vit.check_rule("median")


def test_attention_maps_skip_blocks_without_attention():
    block = Block(4, 2, mlp_ratio=1.0, qkv_bias=True, epsilon=1e-6, rngs=nnx.Rngs(0))
    double = lambda x: 2 * x
    x = randn(2, 3, 4)
    (got,) = vit.attention_maps([double, block], x)
    np.testing.assert_allclose(got, block.attn.weights(block.norm1(2 * x)), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"), [*FAMILIES[:3], pytest.param(*FAMILIES[3], marks=pytest.mark.slow)]
)
def test_the_norm_of_the_last_intermediate_is_the_features(name, options):
    model = model_goldens.small(name, image_size=(32, 64), **options)
    last, x = len(model.blocks) - 1, images(2, 32, 64)
    (first, final), features = jax.jit(lambda x: (model.intermediates(x, [0, last]), model.features(x)))(x)
    np.testing.assert_allclose(model.norm(final), features, atol=1e-5)
    assert final.shape == features.shape
    assert first.shape[:3] == (2, 2, 4)


def test_intermediates_equal_the_blocks_by_hand():
    """In the order of the indices; the prefix tokens are removed."""
    model, x = model_goldens.small("deit_tiny_distilled_patch16_224", depth=3), images()
    tokens = model.patch_embed(x).reshape(2, 4, 32)
    prefix = [jnp.broadcast_to(t[...], (2, 1, 32)) for t in (model.cls_token, model.dist_token)]
    tokens, expected = jnp.concatenate([*prefix, tokens], 1) + model.pos_embed[...], []
    for block in model.blocks:
        tokens = block(tokens)
        expected.append(tokens[:, 2:].reshape(2, 2, 2, 32))
    got = model.intermediates(x, [2, 0, 2])
    for value, index in zip(got, [2, 0, 2], strict=True):
        np.testing.assert_allclose(value, expected[index], atol=1e-5)
    assert model.intermediates(x, []) == []


@pytest.mark.parametrize("blocks", [[2], [0, -1], [0, 5, 1]])
def test_wrong_block_indices_are_refused(blocks):
    wrong = next(i for i in blocks if not 0 <= i < 2)
    with pytest.raises(ValueError, match=rf"Indices must be in 0\.\.1, not {wrong}"):
        model_goldens.small("lvvit_s").intermediates(images(), blocks)


@pytest.mark.parametrize("name", ["lvvit_s", "t2t_vit_7", "regnety_002", "dm_nfnet_f0"])
def test_pixels_are_not_taken_for_normalized_images(name, unchecked_shapes):
    """At trace time, by every method and by the functional form."""
    net, params, stats = functional.functionalize(nnx.eval_shape(lambda: model_goldens.fresh(name)))
    pixels = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
    for apply in (
        lambda p, s, x: net.apply(p, s, x),
        lambda p, s, x: net.bind(p, s).features(x),
        lambda p, s, x: net.bind(p, s).intermediates(x, [0]),
    ):
        with pytest.raises(ValueError, match=r"normalized floats \[B, H, W, 3\], not uint8 \[2, 32, 32, 3\]"):
            jax.eval_shape(apply, params, stats, pixels)
    with pytest.raises(ValueError, match=r"not float32 \[2, 3, 32, 32\]"):
        jax.eval_shape(net.apply, params, stats, jax.ShapeDtypeStruct((2, 3, 32, 32), jnp.float32))
