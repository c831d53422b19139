"""T2T-ViT against the published numbers and its options."""

import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from conftest import golden_images, images, randn
from flax import nnx
from model_goldens import filled, relative, run, token_label_gradients, worst_norm

import tlvit
from tlvit.models import functional, t2t_vit
from tlvit.ops import losses, mixing


def small(name="t2t_vit_7", **options):
    return model_goldens.small(name, **options)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("t2t_vit_7", 4.310), ("t2t_vit_14_se", 21.804), ("t2t_vit_dense", 23.647),
        ("t2t_vit_16_ghost", 16.253),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("t2t_vit_10", 5.889), ("t2t_vit_14", 21.546), ("t2t_vit_19", 39.177), ("t2t_vit_24", 64.106),
                ("t2t_vit_t_14", 21.541), ("t2t_vit_t_24", 64.101), ("t2t_vit_14_resnext", 21.546),
                ("t2t_vit_14_wide", 25.156),
            ]
        ),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, millions):
    """They include the fixed position table and random features, which are not parameters in tlvit."""
    _, params, stats = functional.functionalize(nnx.eval_shape(lambda: tlvit.create_model(name)))
    count = functional.count_parameters(params) + functional.count_parameters(stats)
    assert round(count / 1e6, 3) == millions
    assert set(stats) == ({"pos_embed"} if "_t_" in name else {"pos_embed", "tokens_to_token"})


@pytest.mark.parametrize(
    "name",
    [
        "t2t_vit_14",
        *(pytest.param(f"t2t_vit_14_{kind}", marks=pytest.mark.slow) for kind in ("resnext", "wide")),
    ],
)
def test_evaluation_logits_equal_the_published_ones(golden, name):
    expected = golden("t2t_visible.npz")[f"{name}_224_1000/eval_logits"]
    net, params, stats = functional.functionalize(filled(name))
    output, _ = jax.jit(net.apply)(params, stats, golden_images(0, 2, 224))
    assert relative(output.logits, expected) < 1e-4


@pytest.mark.parametrize("name", ["t2t_vit_7", pytest.param("t2t_vit_t_14", marks=pytest.mark.slow)])
def test_loss_and_gradients_equal_the_published_ones(golden, name):
    case = lambda key: golden("t2t_visible.npz")[f"{name}_224_1000/{key}"]
    net, params, stats = functional.functionalize(filled(name))
    labels = jax.nn.one_hot(jnp.array([1, 999]), 1000)

    def loss(params):
        output, _ = net.apply(params, stats, golden_images(0, 2, 224))
        return losses.soft_cross_entropy(output.logits, labels).mean(), output.logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert relative(logits, case("eval_logits")) < 1e-4
    assert abs(float(value) - case("eval_mode_ce")) < 1e-5
    error, worst = worst_norm(grads, case("grad_names"), case("grad_norms"))
    assert error < 1e-3, worst


@pytest.mark.parametrize(("size", "stride"), [(7, 4), (3, 2)])
def test_soft_split_equals_pytorch_unfold(size, stride):
    """Patch by patch, in torch's order: channel, then row, then column of the neighborhood."""
    x = randn(2, 16, 24, 3)
    padding = {7: 2, 3: 1}[size]
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    h, w = 16 // stride, 24 // stride
    expected = np.stack(
        [
            padded[:, i * stride :, j * stride :][:, :size, :size].transpose(0, 3, 1, 2).reshape(2, -1)
            for i in range(h)
            for j in range(w)
        ],
        axis=1,
    )
    np.testing.assert_array_equal(t2t_vit.soft_split(x, size, stride), expected.reshape(2, h, w, -1))


def test_positions_are_a_sinusoid_that_starts_at_the_class_token():
    table = t2t_vit.sinusoid_table(5, 6)
    assert (table.shape, table.dtype) == ((1, 5, 6), np.float32)
    np.testing.assert_array_equal(table[0, 0], [0, 1, 0, 1, 0, 1])
    for position in range(5):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(
                table[0, position, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], rtol=1e-6
            )
    _, params, stats = functional.functionalize(small())
    assert "pos_embed" not in params
    np.testing.assert_array_equal(stats["pos_embed"], t2t_vit.sinusoid_table(5, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [("t2t_vit_7", "bfloat16"), pytest.param("t2t_vit_t_14", None, marks=pytest.mark.slow)]
)
def test_the_network_is_finite_for_activations_scaled_by_100(name, dtype):
    model = small(name, dtype=dtype, depth=0)
    for layer in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
        layer.norm1.scale[...] = 100 * layer.norm1.scale[...]
    net, params, stats = functional.functionalize(model)
    score = lambda p: jnp.sum(net.bind(p, stats).features(100 * images()).astype(jnp.float32) ** 2)
    value, grads = jax.jit(jax.value_and_grad(score))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_images_need_not_be_square():
    """A 32x64 image has 2x4 tokens in row-major order: painting the last patch moves the last token most."""
    x = images(1, 32, 64)
    painted = x.copy()
    painted[:, 16:, 48:] += 3.0
    for name in ("t2t_vit_7", "t2t_vit_t_14"):
        model = small(name, image_size=(32, 64), depth=0)
        features = jax.jit(lambda x, model=model: model.features(x))(np.concatenate([x, painted]))
        assert model.grid == (2, 4)
        change = np.abs(features[1] - features[0]).max(-1)
        assert np.unravel_index(change.argmax(), (2, 4)) == (1, 3)
    upright = small(image_size=(64, 32))
    assert jax.eval_shape(upright.features, images(1, 64, 32)).shape == (1, 4, 2, 32)
    assert jax.eval_shape(upright, images(1, 64, 32)).logits.shape == (1, 7)


def test_random_features_are_orthogonal_fixed_and_of_the_published_length():
    performer = t2t_vit.TokenPerformer(27, 64, drop_rate=0.1, rngs=nnx.Rngs(0))
    _, params, stats = functional.functionalize(performer)
    assert stats["w"].shape == (32, 64)
    np.testing.assert_allclose(stats["w"] @ stats["w"].T, 32 * np.eye(32), atol=1e-3)
    assert "w" not in params


@pytest.mark.slow
def test_performer_dropout_is_an_option():
    """Dropout 0.1 after the projection and after the MLP: each of 2 * 64 * 50 values is dropped or scaled."""
    assert small().tokens_to_token.attention2.drop_rate == 0.1
    assert small(token_drop=0.2).tokens_to_token.attention1.drop_rate == 0.2
    performer = t2t_vit.TokenPerformer(27, 64, drop_rate=0.1, rngs=nnx.Rngs(0))
    x, key = randn(2, 50, 27), jax.random.key(0)
    assert np.abs(performer(x, key) - performer(x)).max() > 1e-2
    performer.drop_rate = 0.0
    np.testing.assert_array_equal(performer(x, key), performer(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2t_vit_7", pytest.param("t2t_vit_t_14", marks=pytest.mark.slow)])
def test_token_labels_train_it(name):
    """Token head, MixToken and the token-label loss: the gradient reaches every trained tensor."""
    norms = token_label_gradients(small(name, token_head=True))
    assert all(norm > 0 for norm in norms.values()), norms


@pytest.mark.slow
def test_the_token_head_follows_lvvits_rule():
    model = small(token_head=True)
    output = run(model, images())
    np.testing.assert_allclose(output.logits, output.cls + 0.5 * output.tokens.max(1), atol=1e-5)
    dense = jax.jit(lambda x: model.dense_logits(x))(images())
    np.testing.assert_allclose(dense.reshape(2, 4, 7), output.tokens, atol=1e-5)
    plain = run(small(), images())
    np.testing.assert_allclose(plain.logits, output.cls, atol=1e-5)
    assert plain.tokens is None


def test_tokens_of_a_mixed_batch_return_to_their_own_images():
    model = small(depth=0, token_head=True, image_size=(32, 64))
    x, mix = images(4, 32, 64), mixing.mixtoken_mask_from_box((0, 1, 2, 3), model.grid)
    np.testing.assert_allclose(run(model, x, mix=mix).tokens, run(model, x).tokens, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_low_and_keeps_high():
    model = small(dtype="bfloat16", token_head=True)
    output = run(model, images())
    assert {str(x.dtype) for x in jax.tree.leaves(output)} == {"float32"}
    assert jax.eval_shape(model.features, images()).dtype == jnp.bfloat16
    assert 1e-5 < relative(output.logits, np.asarray(run(small(token_head=True), images()).logits)) < 0.05


def test_errors_name_the_numbers():
    for options, text in [
        ({"image_size": (32, 40)}, "32x40.*16"),
        ({"rule": "most"}, "max, mean, class, not 'most'"),
        ({"tokens": "convolution"}, "performer or transformer, not 'convolution'"),
        ({"block": "wide"}, "plain, se, ghost, dense, not 'wide'"),
    ]:
        with pytest.raises(ValueError, match=text):
            small(**options)
