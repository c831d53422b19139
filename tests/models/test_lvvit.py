"""LV-ViT against the published implementation's numbers, and its options."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from conftest import GOLDEN, fill_model, golden_images, golden_target, images
from flax import nnx
from model_goldens import filled, official_names, relative, worst_norm

import tlvit
from tlvit.checkpoints.torch_names import from_torch, to_torch
from tlvit.models import functional, lvvit
from tlvit.ops import losses, mixing
from tlvit.types import TokenTargets

SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [(name, 224, 1000) for name in ("lvvit_t", "lvvit_s", "lvvit_m", "vit", "lvvit")]
]


def torch_shape(shape):
    """[in, out] -> [out, in]; [kh, kw, in, out] -> [out, in, kh, kw]."""
    return (
        [shape[1], shape[0]]
        if len(shape) == 2
        else [shape[3], shape[2], *shape[:2]]
        if len(shape) == 4
        else [*shape]
    )


def published_tensors():
    with gzip.open(GOLDEN / "state_dicts.jsonl.gz", "rt") as lines:
        return {line["model"]: line["tensors"] for line in map(json.loads, lines)}


small = functools.partial(model_goldens.fresh, "lvvit_s")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("lvvit_m", "lvvit_l") else ())
        for n in sorted(lvvit.VARIANTS)
    ],
)
def test_tensors_have_the_published_names_and_shapes(name):
    _, params, stats = functional.functionalize(nnx.eval_shape(lambda: tlvit.create_model(name)))
    ours = {k: torch_shape(v.shape) for k, v in official_names({**params}).items()}
    ours |= {k: torch_shape(v.shape) for k, v in official_names(stats).items()}
    theirs = {k: shape for k, shape, _ in published_tensors()[name] if not k.endswith("num_batches_tracked")}
    assert ours == theirs
    assert {str(x.dtype) for x in jax.tree.leaves((params, stats))} == {"float32"}


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        ("lvvit_t", 224, 8.535), ("lvvit_s", 384, 26.298), ("vit", 224, 24.405), ("lvvit", 224, 25.767),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("lvvit_s", 224, 26.152), ("lvvit_m", 224, 55.831), ("lvvit_m", 448, 56.132),
                ("lvvit_l", 448, 150.474),
            ]
        ),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, size, millions):
    _, params, _ = functional.functionalize(nnx.eval_shape(lambda: tlvit.create_model(name, image_size=size)))
    assert round(functional.count_parameters(params) / 1e6, 3) == millions


@pytest.mark.parametrize(("name", "size", "classes"), [("lvvit_s", 64, 10), *SLOW])
def test_evaluation_logits_equal_the_published_ones(golden, name, size, classes):
    expected = golden("lvvit_visible.npz")[f"{name}_{size}_{classes}/eval_logits"]
    net, params, stats = functional.functionalize(filled(name, image_size=size, num_classes=classes))
    output, _ = jax.jit(net.apply)(params, stats, golden_images(0, 2, size))
    assert relative(output.logits, expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [
        ("lvvit_s", 64, 10),
        *(pytest.param(n, 224, 1000, marks=pytest.mark.slow) for n in ("lvvit_t", "lvvit_s")),
    ],
)
def test_a_training_step_equals_the_published_one(golden, name, size, classes):
    """Outputs, both losses, the gradient of every tensor and the running statistics of a MixToken batch."""
    z = golden("lvvit_visible.npz")
    case = lambda key: z[f"{name}_{size}_{classes}/{key}"]
    net, params, stats = functional.functionalize(filled(name, image_size=size, num_classes=classes))
    tokens = net.grid[0] * net.grid[1]
    mix = mixing.mixtoken_mask_from_box(case("bbox"), net.grid)
    t = golden_target(7, 4, classes, tokens)
    targets = TokenTargets(cls=t[:, :, 1], tokens=t[:, :, 2:].swapaxes(1, 2), label=t[:, :, 0])

    def loss(params):
        output, new = net.apply(params, stats, golden_images(1, 4, size), mix=mix, train=True)
        loss_of = lambda cls_target: losses.token_label_loss(
            output, targets, mix, dense_weight=0.5, cls_target=cls_target
        )
        return loss_of("annotator"), (loss_of("published"), output, new)

    (plain, (refined, output, new)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert abs(float(plain) - case("train_loss_gt0")) < 1e-5
    assert abs(float(refined) - case("train_loss_gt1")) < 1e-5
    assert relative(output.cls, case("train_cls")) < 1e-4
    assert relative(output.tokens[:, case("train_aux_tokens")], case("train_aux")) < 1e-4
    error, worst = worst_norm(grads, case("grad_names"), case("grad_norms"))
    assert error < 1e-3, worst
    statistics = official_names(new)
    assert len(statistics) == 6
    for key, value in statistics.items():
        assert relative(value, case(f"after/{key}")) < 1e-5, key


def test_conversion_gives_back_what_was_filled_in():
    first, second = small(seed=0), small(seed=1)
    fill_model(first)
    report = from_torch(second, to_torch(first))
    assert (report.reinitialized, report.unexpected) == ((), ())
    jax.tree.map(np.testing.assert_array_equal, *(functional.functionalize(m)[1:] for m in (first, second)))
    np.testing.assert_array_equal(first(images()).logits, second(images()).logits)


def test_tokens_of_a_mixed_batch_return_to_their_own_images():
    """Without blocks logits depend on the patch alone, so un-mixing gives the plain ones back."""
    model = small(depth=0, image_size=64)
    boxes = [mixing.mixtoken_mask_from_box(box, (4, 4)) for box in ((0, 1, 3, 3), (2, 0, 4, 4))]
    mix = jax.tree.map(lambda *x: jnp.concatenate(x), *boxes)  # two shards
    x = images(8, 64)
    plain, mixed = model(x), model(x, mix=mix)
    np.testing.assert_allclose(mixed.tokens, plain.tokens, atol=1e-5)


def test_mixed_tokens_are_encoded_with_the_other_image():
    """With blocks a mixed token sees the other image. The expected values mix embedded tokens in NumPy."""
    model = small(image_size=64)
    x, mix = images(4, 64), mixing.mixtoken_mask_from_box((1, 0, 3, 3), (4, 4))
    embedded = np.array(model.patch_embed(x))
    own = embedded.copy()
    embedded[:, 1:3, 0:3] = own[::-1, 1:3, 0:3]
    tokens = np.concatenate(
        [np.broadcast_to(model.cls_token[...], (4, 1, 32)), embedded.reshape(4, 16, 32)], 1
    )
    tokens = tokens + np.asarray(model.pos_embed[...])
    for block in model.blocks:
        tokens = block(tokens)
    tokens = model.norm(tokens)
    dense = np.array(model.aux_head(tokens[:, 1:])).reshape(4, 4, 4, 7)
    pasted = dense.copy()
    pasted[:, 1:3, 0:3] = dense[::-1, 1:3, 0:3]
    output = model(x, mix=mix)
    np.testing.assert_allclose(output.tokens, pasted.reshape(4, 16, 7), atol=1e-5)
    np.testing.assert_allclose(output.cls, model.head(tokens[:, 0]), atol=1e-5)
    np.testing.assert_allclose(output.logits, output.cls + 0.5 * output.tokens.max(1), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "pooled"),
    [
        ({}, lambda t: 0.5 * t.max(1)),
        ({"token_weight": 0.2}, lambda t: 0.2 * t.max(1)),
        ({"rule": "mean"}, lambda t: 0.5 * t.mean(1)),
        ({"rule": "class"}, lambda t: 0 * t[:, 0]),
    ],
)
def test_rules_of_inference(options, pooled):
    output = small(**options)(images())
    np.testing.assert_allclose(output.logits, output.cls + pooled(np.asarray(output.tokens)), atol=1e-6)


def test_models_without_token_head():
    model = tlvit.create_model("vit", dim=16, depth=1, num_heads=2, image_size=32, num_classes=3)
    output = model(images())
    assert output.tokens is None
    np.testing.assert_array_equal(output.logits, output.cls)
    with pytest.raises(ValueError, match="no token head"):
        model.dense_logits(images())
    assert model.features(images()).shape == (2, 2, 2, 16)


@pytest.mark.parametrize(
    ("options", "size", "grid"),
    [
        ({"patch_size": 8}, (32, 32), (4, 4)),
        ({"image_size": (32, 64)}, (32, 64), (2, 4)),
        ({"image_size": [64, 32], "patch_size": 8}, (64, 32), (8, 4)),
        (
            {"dim": 24, "num_heads": 3, "depth": 3, "stem_width": 6, "skip_lam": 1.5, "mlp_ratio": 2.0},
            (32, 32),
            (2, 2),
        ),
        ({"stem_width": None}, (32, 32), (2, 2)),
        ({"remat": True}, (32, 32), (2, 2)),
    ],
)
def test_overrides_and_shapes(options, size, grid):
    model = small(**options)
    dim = options.get("dim", 32)
    x = images(2, *size)
    output, features, dense, maps = jax.jit(
        lambda x: (model(x), model.features(x), model.dense_logits(x), model.attention_maps(x))
    )(x)
    count = grid[0] * grid[1]
    assert model.grid == grid
    assert (output.logits.shape, output.cls.shape, output.tokens.shape) == ((2, 7), (2, 7), (2, count, 7))
    assert len(model.blocks) == options.get("depth", 2)
    assert features.shape == (2, *grid, dim)
    np.testing.assert_allclose(dense.reshape(2, count, 7), output.tokens, atol=1e-5)
    np.testing.assert_allclose(model.aux_head(features), dense, atol=1e-5)
    assert [m.shape for m in maps] == [(2, options.get("num_heads", 2), 1 + count, 1 + count)] * len(
        model.blocks
    )
    np.testing.assert_allclose(np.stack(maps).sum(-1), 1, atol=1e-5)
    assert np.stack(maps).min() >= 0


def test_attention_maps_are_those_of_the_forward_pass():
    """Applied to the values, the last block's maps give the last block's attention output."""
    model = small()
    fill_model(model)
    x = images()
    tokens = model.patch_embed(x).reshape(2, 4, 32)
    tokens = (
        jnp.concatenate([jnp.broadcast_to(model.cls_token[...], (2, 1, 32)), tokens], 1)
        + model.pos_embed[...]
    )
    last = model.blocks[1]
    entering = last.norm1(model.blocks[0](tokens))
    value = last.attn.qkv(entering).reshape(2, 5, 3, 2, 16)[:, :, 2]
    mixed = jnp.einsum("bhnm,bmhd->bnhd", model.attention_maps(x)[1], value).reshape(2, 5, 32)
    np.testing.assert_allclose(last.attn.proj(mixed), last.attn(entering), atol=1e-5)


def test_token_order_is_row_major():
    """A patch painted into row 1, column 3 changes the token that reads it and, without blocks, no other."""
    model = small(depth=0, stem_width=None, image_size=(32, 64))
    x, painted = images(1, 32, 64), images(1, 32, 64)
    painted[:, 16:, 48:] += 1.0
    changed = np.abs(np.asarray(model(painted).tokens - model(x).tokens)).max((0, 2))
    assert (changed > 1e-4).tolist() == [False] * 7 + [True]


def test_drop_rates_reach_the_layers():
    model = small(depth=3, drop_path=0.4, drop_rate=0.1, attn_drop=0.2)
    np.testing.assert_allclose([b.drop_path for b in model.blocks], [0, 0.2, 0.4], atol=1e-9)
    assert {(b.attn.drop_rate, b.attn.attn_drop, b.mlp.drop_rate) for b in model.blocks} == {(0.1, 0.2, 0.1)}
    x = images()
    plain, dropped = model(x).cls, model(x, key=jax.random.key(0)).cls
    assert np.abs(dropped - plain).max() > 1e-4
    for option in ({"drop_path": 0.9}, {"drop_rate": 0.3}, {"attn_drop": 0.3}):
        model = small(**option)
        assert np.abs(model(x, key=jax.random.key(1)).cls - model(x).cls).max() > 1e-6, option


@pytest.mark.slow
def test_remat_changes_no_number():
    plain, remat = small(drop_path=0.3), small(drop_path=0.3, remat=True)
    grads = []
    for model in (plain, remat):
        net, params, stats = functional.functionalize(model)
        score = lambda p, net=net, stats=stats: jnp.sum(
            net.apply(p, stats, images(), train=True, key=jax.random.key(3))[0].logits ** 2
        )
        grads.append(jax.jit(jax.grad(score))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16"])
def test_bfloat16_computes_low_and_keeps_high(dtype):
    model = small(dtype=dtype)
    output = model(images())
    assert {str(x.dtype) for x in jax.tree.leaves(output)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(functional.functionalize(model)[1:])} == {"float32"}
    assert model.features(images()).dtype == jnp.bfloat16
    exact = small()(images()).logits
    error = relative(output.logits, np.asarray(exact))
    assert 1e-5 < error < 0.05


def test_errors_name_the_numbers():
    for options, text in [
        ({"image_size": 40}, "40x40.*16"),
        ({"image_size": (32, 40)}, "32x40.*16"),
        ({"patch_size": 1}, "patch size must be even, not 1"),
        ({"patch_size": 7, "image_size": 28}, "patch size must be even, not 7"),
        ({"num_heads": 5}, "32.*5 heads"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"rule": "most"}, "max, mean, class, not 'most'"),
    ]:
        with pytest.raises(ValueError, match=text):
            small(**options)
    with pytest.raises(TypeError, match="depht"):
        small(depht=3)
    with pytest.raises(ValueError, match=r"2x2 tokens.*4x2"):
        small()(images(1, 64, 32))
    with pytest.raises(ValueError, match=r"lvvit_x.*lvvit"):
        tlvit.create_model("lvvit_x")
    with pytest.raises(ValueError, match=r"3x3.*2x2"):
        small()(images(), mix=mixing.mixtoken_mask_from_box((0, 0, 1, 1), (3, 3)))
