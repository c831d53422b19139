"""DeiT against the published implementation's numbers: both heads, distillation, and the token head."""

import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from conftest import golden_images, images
from flax import nnx
from model_goldens import filled, relative, run, token_label_gradients, worst_norm

import tlvit
from tlvit.models import deit, functional
from tlvit.ops import losses, mixing

DISTILLED = "deit_tiny_distilled_patch16_224"


def small(distilled=True, **options):
    return model_goldens.small(DISTILLED if distilled else "deit_tiny_patch16_224", **options)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("deit_tiny_patch16_224", 5.717), ("deit_small_patch16_224", 22.051),
        ("deit_base_patch16_224", 86.568),
        ("deit_tiny_distilled_patch16_224", 5.911), ("deit_base_distilled_patch16_384", 87.630),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, millions):
    _, params, _ = functional.functionalize(nnx.eval_shape(lambda: tlvit.create_model(name)))
    assert round(functional.count_parameters(params) / 1e6, 3) == millions


@pytest.mark.parametrize(
    "name",
    [DISTILLED, *(pytest.param(f"deit_{n}_patch16_224", marks=pytest.mark.slow) for n in ("tiny", "small"))],
)
def test_evaluation_logits_equal_the_published_ones(golden, name):
    expected = golden("deit_visible.npz")[f"{name}_224_1000/eval_logits"]
    net, params, stats = functional.functionalize(filled(name))
    output, _ = jax.jit(net.apply)(params, stats, golden_images(0, 2, 224))
    assert relative(output.logits, expected) < 1e-4


def test_distillation_equals_the_published_one(golden):
    """Both heads, both losses, and the gradient of every tensor of the soft one."""
    case = lambda key: golden("deit_visible.npz")[f"{DISTILLED}_224_1000/{key}"]
    net, params, stats = functional.functionalize(filled(DISTILLED))
    teacher = (3 * np.random.RandomState(3).standard_normal((2, 1000))).astype(np.float32)
    labels = 0.9 * np.eye(1000, dtype=np.float32)[[1, 999]] + 0.1 / 1000

    def loss(params):
        output, _ = net.apply(params, stats, golden_images(0, 2, 224), train=True)
        distil = lambda kind: losses.distillation_loss(output, labels, teacher, kind=kind, alpha=0.3, tau=3.0)
        return distil("soft"), (distil("hard"), output)

    (soft, (hard, output)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert relative(output.cls, case("train_cls")) < 1e-4
    assert relative(output.dist, case("train_dist")) < 1e-4
    assert abs(float(soft) - case("distill_soft")) < 1e-5
    assert abs(float(hard) - case("distill_hard")) < 1e-5
    error, name = worst_norm(grads, case("grad_names"), case("grad_norms_soft"))
    assert error < 1e-3, name


@pytest.mark.slow
def test_names_carry_size_and_distillation():
    for name, options in deit.VARIANTS.items():
        model = nnx.eval_shape(lambda name=name: tlvit.create_model(name))
        side = int(name[-3:]) // 16
        assert model.grid == (side, side)
        assert options["distilled"] == ("_distilled_" in name) == (model.head_dist is not None)
    assert len(deit.VARIANTS) == 8
    assert nnx.eval_shape(lambda: tlvit.create_model("deit_base_patch16_384", image_size=224)).grid == (
        14,
        14,
    )


def test_inference_averages_the_heads():
    model = small()
    output = run(model, images())
    np.testing.assert_allclose(output.logits, (output.cls + output.dist) / 2, atol=1e-6)
    assert np.abs(output.cls - output.dist).max() > 1e-2
    assert output.tokens is None
    plain = run(small(distilled=False), images())
    np.testing.assert_array_equal(plain.logits, plain.cls)
    assert plain.dist is None


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    ("options", "pooled"),
    [
        ({}, lambda t: 0.5 * t.max(1)),
        ({"token_weight": 0.2, "rule": "mean"}, lambda t: 0.2 * t.mean(1)),
        ({"rule": "class"}, lambda t: 0 * t[:, 0]),
    ],
)
def test_the_token_head_follows_lvvits_rules(distilled, options, pooled):
    model = small(distilled, token_head=True, **options)
    output = run(model, images())
    base = (output.cls + output.dist) / 2 if distilled else output.cls
    np.testing.assert_allclose(output.logits, base + pooled(np.asarray(output.tokens)), atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(lambda x: model.dense_logits(x))(images()).reshape(2, 4, 7), output.tokens, atol=1e-5
    )
    plain = run(small(distilled, **options), images())
    np.testing.assert_array_equal(output.cls, plain.cls)
    assert jax.eval_shape(model.features, images()).shape == (2, 2, 2, 32)


def test_tokens_of_a_mixed_batch_return_to_their_own_images():
    """Without blocks a token's logits depend on its patch alone: un-mixing must give the plain ones back."""
    model = small(depth=0, token_head=True, image_size=(32, 64))
    mix = mixing.mixtoken_mask_from_box((0, 1, 2, 3), model.grid)
    x = images(4, 32, 64)
    np.testing.assert_allclose(run(model, x, mix=mix).tokens, run(model, x).tokens, atol=1e-5)
    # In between they were mixed: with blocks the class token sees the other image.
    model = small(token_head=True, image_size=(32, 64))
    assert np.abs(run(model, x, mix=mix).cls - run(model, x).cls).max() > 1e-3


def test_token_labels_train_it():
    """The gradient of the token-label loss reaches every tensor but the distillation head."""
    norms = token_label_gradients(small(token_head=True))
    assert {k for k, norm in norms.items() if norm == 0} == {"head_dist.weight", "head_dist.bias"}


def test_attention_maps_count_both_prefix_tokens():
    maps = jax.jit(lambda x: small().attention_maps(x))(images())
    assert [m.shape for m in maps] == [(2, 2, 6, 6)] * 2
    np.testing.assert_allclose(np.stack(maps).sum(-1), 1, atol=1e-5)


@pytest.mark.slow
def test_drop_rates_reach_the_layers():
    model = small(depth=3, drop_path=0.4, drop_rate=0.1, attn_drop=0.2)
    np.testing.assert_allclose([b.drop_path for b in model.blocks], [0, 0.2, 0.4], atol=1e-9)
    assert {(b.attn.drop_rate, b.attn.attn_drop, b.mlp.drop_rate) for b in model.blocks} == {(0.1, 0.2, 0.1)}
    assert np.abs(run(model, images(), key=jax.random.key(0)).cls - run(model, images()).cls).max() > 1e-4


def test_bfloat16_computes_low_and_keeps_high():
    model = small(dtype="bfloat16", token_head=True)
    output = run(model, images())
    assert {str(x.dtype) for x in jax.tree.leaves(output)} == {"float32"}
    assert jax.eval_shape(model.features, images()).dtype == jnp.bfloat16
    assert 1e-5 < relative(output.logits, np.asarray(run(small(token_head=True), images()).logits)) < 0.05


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match=r"32x40.*16"):
        small(image_size=(32, 40))
    with pytest.raises(ValueError, match="max, mean, class, not 'most'"):
        small(rule="most")
    with pytest.raises(ValueError, match=r"2x2 tokens.*4x2"):
        small()(images(1, 64, 32))
