"""Attention without weights in memory: the kernel in the interpreter, the other paths, several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randn, softmax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from tlvit.models.layers import KERNELS
from tlvit.ops import fused_attention
from tlvit.training.mesh import batch_sharding, make_mesh, mesh_context

SIZES = [  # tokens, width, heads; the last heads have 60 channels
    (21, 256, 4),
    pytest.param(197, 384, 6, marks=pytest.mark.slow),
    pytest.param(785, 128, 2, marks=pytest.mark.slow),
    pytest.param(197, 240, 4, marks=pytest.mark.slow),
]


def exact(qkv, grad, num_heads, scale):
    """The attention and its gradient of one image, from the formulas in float64: [N, 3 D] -> (out, grad)."""
    width = grad.shape[-1]
    out, grad_qkv = np.empty_like(grad), np.empty_like(qkv)
    for head in range(num_heads):
        own = np.arange(width // num_heads) + head * (width // num_heads)
        q, k, v = (qkv[:, own + part * width] for part in range(3))
        p = softmax(scale * q @ k.T)
        out[:, own] = p @ v
        dp = grad[:, own] @ v.T
        ds = scale * p * (dp - (dp * p).sum(-1, keepdims=True))
        for part, x in enumerate((ds @ k, ds.T @ q, p.T @ grad[:, own])):
            grad_qkv[:, own + part * width] = x
    return out, grad_qkv


def with_gradient(function, qkv, grad):
    out, vjp = jax.vjp(function, qkv)
    return out, vjp(grad)[0]


PATHS = {
    "kernel": lambda x, heads: fused_attention.short_attention(x, heads, 0.3, True),
    "other platforms": lambda x, heads: fused_attention.fused_attention(x, heads, scale=0.3),
    "layout of cuDNN": lambda x, heads: fused_attention._with_cudnn(x, heads, 0.3, "xla"),
}


@pytest.mark.parametrize(("tokens", "width", "heads"), SIZES)
@pytest.mark.parametrize("path", PATHS)
def test_values_and_gradients_are_those_of_the_formula(path, tokens, width, heads):
    qkv, grad = randn(2, tokens, 3 * width), randn(2, tokens, width, seed=1)
    expected = [np.stack(x) for x in zip(*(exact(*pair, heads, 0.3) for pair in zip(
        np.float64(qkv), np.float64(grad), strict=True)), strict=True)]  # fmt: skip
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        run = jax.jit(lambda x, g: with_gradient(lambda y: PATHS[path](y, heads), x, g))
        for found, wanted in zip(run(qkv.astype(dtype), grad.astype(dtype)), expected, strict=True):
            assert found.dtype == dtype
            np.testing.assert_allclose(np.float64(found), wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("tokens", [197, 198])
def test_cudnn_takes_odd_and_even_numbers_of_tokens(tokens, monkeypatch):
    """JAX checks the shapes, as on a GPU, and writes the calls of cuDNN."""
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    run = jax.jit(lambda x, g: with_gradient(lambda y: fused_attention._with_cudnn(y, 6, 0.3), x, g))
    shapes = (jax.ShapeDtypeStruct((2, tokens, parts * 360), jnp.bfloat16) for parts in (3, 1))
    text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert (text.count("cudnn$fmhaSoftmax("), text.count("cudnn$fmhaSoftmaxBackward(")) == (1, 1)


def test_a_loop_of_blocks_keeps_the_result_of_cudnn():
    """Otherwise it would compute the attention again for the backward pass."""
    assert cudnn._dot_product_attention_fwd_p_wrapper.name in KERNELS


def test_devices_attend_to_their_own_images():
    mesh = make_mesh()
    assert mesh.size == 8
    qkv = randn(16, 5, 24)
    with mesh_context(mesh):
        run = jax.jit(lambda x: fused_attention.fused_attention(x, 2, scale=0.3))
        compiled = run.lower(jax.device_put(qkv, batch_sharding(mesh))).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    np.testing.assert_allclose(compiled(jax.device_put(qkv, batch_sharding(mesh))), run(qkv), atol=1e-6)


def test_only_the_input_is_saved_for_the_backward_pass():
    saved = lambda x: jax.vjp(lambda y: fused_attention.fused_attention(y, 2, scale=0.3), x)[1]
    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(saved, jnp.zeros((1, 50, 12))))]
    assert shapes == [(1, 50, 12)]


def test_inside_of_a_program_for_each_device():
    mesh = make_mesh()
    attention = lambda x: fused_attention.fused_attention(x, 2, scale=0.3)
    spec = jax.sharding.PartitionSpec("data")
    qkv = randn(8, 5, 24)
    with mesh_context(mesh):
        run = jax.jit(jax.shard_map(attention, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        found = run(qkv)
    np.testing.assert_allclose(found, attention(qkv), atol=1e-6)
