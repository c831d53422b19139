"""NFNet against the published numbers, its signal propagation, and the largest one within 8 GB."""

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import model_goldens
import numpy as np
import pytest
from conftest import golden_images, images
from flax import nnx
from model_goldens import check_score_maps, filled, official_names, relative, run

import tlvit
from tlvit.models import functional, nfnet
from tlvit.ops.losses import soft_cross_entropy

small = functools.partial(model_goldens.small, "dm_nfnet_f0")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dm_nfnet_f0", 71.489), pytest.param("dm_nfnet_f6", 438.359, marks=pytest.mark.slow)],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    """With abstract arrays: no memory for the 438 million parameters is allocated."""
    _, params, _ = functional.functionalize(nnx.eval_shape(lambda: tlvit.create_model(name)))
    assert round(functional.count_parameters(params) / 1e6, 3) == millions


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [
        pytest.param("dm_nfnet_f0", 192, 1000, marks=pytest.mark.slow),
        pytest.param("dm_nfnet_f1", 160, 10, marks=pytest.mark.slow),
    ],
)
def test_logits_features_and_score_maps_equal_the_published_ones(golden, name, size, classes):
    z = golden("teacher_visible.npz")
    case = lambda key: z[f"{name}_{size}_{classes}/{key}"]
    check_score_maps(filled(name, num_classes=classes), golden_images(0, 1, size), case)


def test_standardized_weights_have_mean_zero_and_the_gains_scale():
    layer = nfnet.ScaledConv(8, 6, 3, groups=2, rngs=nnx.Rngs(0))
    layer.kernel[...] = 5 * jax.random.normal(jax.random.key(0), (3, 3, 4, 6)) + 2
    layer.gain[...] = jnp.arange(6.0).reshape(6, 1, 1, 1)
    weights = np.asarray(layer.standardized())
    np.testing.assert_allclose(weights.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(weights.std((0, 1, 2)), np.arange(6) / 6, rtol=1e-3)  # gain / sqrt(3 * 3 * 4)


def test_epsilon_is_added_to_the_deviation():
    """The published epsilon is 1e-4. It halves the standardized value of weights of that size."""
    layer = nfnet.ScaledConv(4, 1, 1, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.array([1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 4, 1) * 1e-4
    np.testing.assert_allclose(layer.standardized().ravel(), [0.25, -0.25, 0.25, -0.25], rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 8), (7, 3)])
def test_strided_layers_pad_as_tensorflow_and_pool_what_is_inside(height, width):
    x = images(2, height, width)
    layer = nfnet.ScaledConv(3, 4, 3, stride=2, rngs=nnx.Rngs(0))
    out = np.asarray(layer(x))
    assert out.shape == (2, -(-height // 2), -(-width // 2), 4)
    # "SAME": an even side is padded at its end only, an odd one at both.
    first = 0 if height % 2 == 0 else 1, 0 if width % 2 == 0 else 1
    padded = np.pad(x, ((0, 0), (first[0], 2), (first[1], 2), (0, 0)))
    weights = np.asarray(layer.standardized())
    for i, j in [(0, 0), (out.shape[1] - 1, out.shape[2] - 1)]:
        patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        np.testing.assert_allclose(out[:, i, j], np.einsum("bhwc,hwco->bo", patch, weights), atol=1e-5)
    pool = nfnet.Downsample(3, 3, stride=2, rngs=nnx.Rngs(0))
    means = np.stack(
        [
            np.stack([x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in range(0, width, 2)], 1)
            for i in range(0, height, 2)
        ],
        axis=1,
    )
    np.testing.assert_allclose(pool(x), pool.conv(means), atol=1e-5)


def test_the_gelus_gain_keeps_the_variance():
    x = jax.random.normal(jax.random.key(0), (1_000_000,))
    assert float(jnp.std(nfnet.scaled_gelu(x))) == pytest.approx(1.0, abs=5e-3)


def test_expected_variances_follow_the_paper():
    """beta is 1 / sqrt(variance of the input): 1 + alpha^2 after each stage's first block, and so on."""
    model = nnx.eval_shape(lambda: tlvit.create_model("dm_nfnet_f0", num_classes=7))
    betas = [[block.beta for block in stage] for stage in model.stages]
    grown = [(1 + 0.04 * n) ** -0.5 for n in range(8)]
    expected = [[1.0], [grown[1], grown[1]], [grown[2], *grown[1:6]], [grown[6], *grown[1:3]]]
    for got, wanted in zip(betas, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.slow
def test_blocks_start_as_their_shortcut():
    block = nfnet.Bottleneck(
        16, 16, stride=1, group_width=8, alpha=0.2, beta=1.0, drop_path=0.0, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 16))
    np.testing.assert_array_equal(block(x), x)
    block.skipinit_gain[...] = jnp.ones(())
    assert float(jnp.abs(block(x) - x).max()) > 0.05


def test_dense_logits_are_the_classifier_on_every_cell():
    model, x = small(), images(2, 64, 48)
    output, dense = run(model, x), jax.jit(lambda x: model.dense_logits(x))(x)
    assert dense.shape == (2, 8, 6, 7)  # two stages of the four: a stride of 8
    np.testing.assert_allclose(dense.mean((1, 2)), output.logits, atol=1e-5)
    np.testing.assert_array_equal(output.logits, output.cls)


@pytest.mark.slow
def test_drop_path_and_dropout_act_with_a_key_only():
    for options in ({"drop_path": 0.9}, {"drop_rate": 0.5}):
        model = small(**options)
        assert (
            np.abs(run(model, images(), key=jax.random.key(0)).logits - run(model, images()).logits).max()
            > 1e-4
        )


@pytest.mark.slow
def test_every_parameter_gets_a_gradient_and_remat_changes_none():
    grads = []
    for remat in (False, True):
        net, params, stats = functional.functionalize(small(remat=remat, depths=(1, 1)))
        assert stats == {}
        score = lambda p, net=net: soft_cross_entropy(
            net.apply(p, {}, images(), train=True)[0].logits, jax.nn.one_hot(jnp.arange(2), 7)
        ).mean()
        grads.append(official_names(jax.jit(jax.grad(score))(params)))
    assert all(float(jnp.abs(g).max()) > 0 for g in grads[0].values())
    for name, grad in grads[0].items():
        np.testing.assert_allclose(grad, grads[1][name], atol=1e-5, err_msg=name)


def test_bfloat16_computes_low_and_keeps_high():
    model = small(dtype="bfloat16")
    output = run(model, images())
    assert output.logits.dtype == jnp.float32
    assert jax.eval_shape(model.features, images()).dtype == jnp.bfloat16
    assert {str(x.dtype) for x in jax.tree.leaves(functional.functionalize(model)[1])} == {"float32"}
    assert relative(output.logits, np.asarray(run(small(), images()).logits)) < 0.05


def test_stages_without_depth_or_width_are_refused():
    with pytest.raises(ValueError, match=r"a depth and a width, not \(1, 2, 3\) and \(16, 32\)"):
        small(depths=(1, 2, 3))


@pytest.mark.slow
def test_the_largest_loads_and_runs_within_8_gb():
    """438 M parameters: filled and run on one image of 448 pixels, in a process of its own."""
    program = """
        import jax, numpy as np
        from model_goldens import filled
        from tlvit.models.functional import functionalize
        net, params, stats = functionalize(filled("dm_nfnet_f6"))
        x = np.random.RandomState(0).standard_normal((1, 448, 448, 3)).astype(np.float32)
        dense = jax.jit(lambda p, x: net.bind(p, stats).dense_logits(x))(params, x)
        assert dense.shape == (1, 14, 14, 1000) and np.isfinite(dense).all()
        # Not ru_maxrss, which begins with the peak of the process that started this one.
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(int(status["VmHWM"].split()[0]) / 2**20)
    """
    paths = [path for path in sys.path if path.endswith("tests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n" + textwrap.dedent(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 8
