"""RegNetY against the published numbers, its sizes against the paper's rule, and small ones in training."""

import functools

import conftest
import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from conftest import golden_images
from flax import nnx
from model_goldens import check_score_maps, filled, relative, run

import tlvit
from tlvit.models import functional, regnety
from tlvit.ops.losses import soft_cross_entropy

# w_0, w_a, w_m, group width and depth of the paper's linear rule (Radosavovic et al. 2020).
RULE = {
    "regnety_002": (24, 36.44, 2.49, 8, 13), "regnety_004": (48, 27.89, 2.09, 8, 16),
    "regnety_006": (48, 32.54, 2.32, 16, 15), "regnety_008": (56, 38.84, 2.4, 16, 14),
    "regnety_016": (48, 20.71, 2.65, 24, 27), "regnety_032": (80, 42.63, 2.66, 24, 21),
    "regnety_040": (96, 31.41, 2.24, 64, 22), "regnety_064": (112, 33.22, 2.27, 72, 25),
    "regnety_080": (192, 76.82, 2.19, 56, 17), "regnety_120": (168, 73.36, 2.37, 112, 19),
    "regnety_160": (200, 106.23, 2.48, 112, 18), "regnety_320": (232, 115.89, 2.53, 232, 20),
}  # fmt: skip
small = functools.partial(model_goldens.small, "regnety_002")
fresh = functools.partial(model_goldens.fresh, "regnety_002")
images = functools.partial(conftest.images, height=48)


@pytest.mark.parametrize("name", sorted(regnety.VARIANTS))
def test_widths_and_depths_follow_the_papers_rule(name):
    w_0, w_a, w_m, group, depth = RULE[name]
    exponents = np.round(np.log((w_0 + w_a * np.arange(depth)) / w_0) / np.log(w_m))
    widths, depths = np.unique(np.round(w_0 * w_m**exponents / 8) * 8, return_counts=True)
    widths = [int(round(w / min(group, w)) * min(group, w)) for w in widths]
    assert regnety.VARIANTS[name] == {
        "widths": tuple(widths), "depths": tuple(depths.tolist()), "group_width": group
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions"), [("regnety_160", 83.590), ("regnety_002", 3.163), ("regnety_320", 145.047)]
)
def test_parameter_counts_are_the_published_ones(name, millions):
    _, params, _ = functional.functionalize(nnx.eval_shape(lambda: tlvit.create_model(name)))
    assert round(functional.count_parameters(params) / 1e6, 3) == millions


@pytest.mark.parametrize(
    ("name", "classes"), [pytest.param("regnety_160", 1000, marks=pytest.mark.slow), ("regnety_002", 10)]
)
def test_logits_features_and_score_maps_equal_the_published_ones(golden, name, classes):
    z = golden("teacher_visible.npz")
    case = lambda key: z[f"{name}_224_{classes}/{key}"]
    check_score_maps(filled(name, num_classes=classes), golden_images(0, 1, 224), case)


def test_dense_logits_are_the_classifier_on_every_cell():
    """So their mean over the map is the image's logits."""
    model = small()
    x = images()
    output, dense = run(model, x), jax.jit(lambda x: model.dense_logits(x))(x)
    assert dense.shape == (2, 6, 6, 10)
    assert jax.eval_shape(model.features, x).shape == (2, 6, 6, 128)
    np.testing.assert_allclose(dense.mean((1, 2)), output.logits, atol=1e-5)
    np.testing.assert_array_equal(output.logits, output.cls)
    assert (output.tokens, output.dist) == (None, None)


@pytest.mark.parametrize(
    ("options", "size", "shape"),
    [
        ({"strides": (1, 2)}, (48, 48), (12, 12, 128)),
        ({"strides": None, "stem_stride": 1}, (48, 32), (12, 8, 128)),
        (
            {"widths": (16, 24, 32), "depths": (1, 2, 1), "group_width": 8, "strides": (2, 1, 2)},
            (48, 48),
            (6, 6, 32),
        ),
        ({"se_ratio": 0.0}, (50, 41), (7, 6, 128)),
    ],
)
def test_overrides_and_shapes(options, size, shape):
    model = small(**options)
    assert jax.eval_shape(model.features, conftest.images(1, *size)).shape == (1, *shape)


def test_one_group_is_an_ordinary_convolution():
    """XLA's grouped convolutions are slow on a CPU."""
    blocks = [small().s1.b1, small(group_width=32).s1.b1]
    assert [b.conv2.conv.feature_group_count for b in blocks] == [1, 2]
    assert blocks[1].conv2.conv.kernel.shape == (3, 3, 32, 64)


@pytest.mark.slow
def test_residual_branches_start_at_zero():
    model = fresh(widths=(64,), depths=(2,), strides=(1,))
    x = jax.nn.relu(model.s1.b1(jax.nn.relu(model.stem(images()))))
    np.testing.assert_allclose(model.s1.b2(x), x, atol=1e-6)


def test_squeezed_width_follows_the_blocks_input():
    model = small(widths=(16, 64), group_width=16)
    assert model.s2.b1.se.fc1.kernel.shape == (1, 1, 64, 4)


@pytest.mark.slow
def test_drop_path_and_dropout_act_with_a_key_only():
    x = images()
    for options in ({"drop_path": 0.9}, {"drop_rate": 0.5}):
        model = small(depths=(1, 3), **options)
        np.testing.assert_array_equal(run(model, x).logits, run(model, x).logits)
        assert np.abs(run(model, x, key=jax.random.key(0)).logits - run(model, x).logits).max() > 1e-4
    model = small(depths=(1, 3), drop_path=0.3)
    rates = [model.s1.b1.drop_path, *(getattr(model.s2, f"b{i}").drop_path for i in range(1, 4))]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3])


@pytest.mark.slow
def test_it_learns():
    """Twenty steps on ten noisy patterns: the loss falls from log 10 and the running statistics move."""
    net, params, stats = functional.functionalize(fresh())
    x = np.tile(images(10, seed=3), (2, 1, 1, 1)) + 0.3 * images(20, seed=4)
    label = jax.nn.one_hot(jnp.arange(20) % 10, 10)

    @jax.jit
    def step(params, stats):
        def loss(params):
            output, new = net.apply(params, stats, x, train=True, key=jax.random.key(0))
            return soft_cross_entropy(output.logits, label).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), new, value

    values, before = [], stats
    for _ in range(20):
        params, stats, value = step(params, stats)
        values.append(float(value))
    assert values[0] == pytest.approx(np.log(10), abs=0.2)
    assert values[-1] < 0.5 * values[0], values
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()) > 1e-3, before, stats)
    assert all(jax.tree.leaves(moved))


def test_bfloat16_computes_low_and_keeps_high():
    model = small(dtype="bfloat16")
    output = run(model, images())
    assert output.logits.dtype == jnp.float32
    assert jax.eval_shape(model.features, images()).dtype == jnp.bfloat16
    assert {str(x.dtype) for x in jax.tree.leaves(functional.functionalize(model)[1:])} == {"float32"}
    assert relative(output.logits, np.asarray(run(small(), images()).logits)) < 0.05


def test_errors_name_the_numbers():
    for options, text in [
        ({"group_width": 48}, "64 is not a multiple of the group width 48"),
        ({"depths": (1, 1, 1)}, r"widths=\(64, 128\), depths=\(1, 1, 1\)"),
        ({"strides": (2,)}, r"strides=\(2,\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            fresh(**options)
