"""Multiply-adds of products, convolutions and loops, and of a published model."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tlvit
from tlvit.models.functional import functionalize
from tlvit.models.macs import count_macs, model_macs
from tlvit.ops.fused_attention import fused_attention, short_attention
from tlvit.training.mesh import make_mesh, mesh_context


def macs(f, *shapes):
    return count_macs(jax.make_jaxpr(f)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


def test_products_and_convolutions():
    assert macs(lambda a, b: a @ b, (3, 4), (4, 5)) == 3 * 4 * 5
    assert macs(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 4), (2, 4, 5)) == 2 * 3 * 4 * 5
    convolution = lambda x, w, groups: jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    assert macs(lambda x, w: convolution(x, w, 1), (1, 8, 6, 4), (3, 3, 4, 10)) == 4 * 3 * 10 * 3 * 3 * 4
    assert macs(lambda x, w: convolution(x, w, 2), (1, 8, 6, 4), (3, 3, 2, 10)) == 4 * 3 * 10 * 3 * 3 * 2
    assert macs(lambda a, b: a + b, (3, 4), (3, 4)) == 0


def test_inner_programs():
    """Calls count once, scans as often as they run, a conditional its most expensive branch."""
    square = lambda x: x @ x
    assert macs(jax.jit(square), (3, 3)) == 27
    assert macs(jax.checkpoint(square), (3, 3)) == 27
    assert macs(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0], (3, 3)) == 5 * 27
    twice = lambda x: square(square(x))
    assert macs(lambda x: jax.lax.cond(x[0, 0] > 0, square, twice, x), (3, 3)) == 2 * 27


def test_kernels_count_for_every_image_on_every_device():
    mesh = make_mesh()
    attention = lambda x: fused_attention(x, 4, scale=1.0)  # with 256 channels in two groups of heads
    with mesh_context(mesh):
        assert macs(attention, (2 * mesh.size, 5, 3 * 256)) == 2 * mesh.size * 2 * 5 * 5 * 256
    forward = lambda x: short_attention(x, 4, 1.0, True)
    assert macs(forward, (3, 5, 3 * 256)) == 3 * 2 * 5 * 5 * 256
    backward = lambda x: jax.vjp(forward, x)[1](x[..., :256])[0]
    assert macs(backward, (3, 5, 3 * 256)) == 3 * 7 * 5 * 5 * 256


def test_the_published_macs_of_deit_tiny():
    """1.26e9 at 224 pixels: 12 blocks of 197 tokens, the patches and the head."""
    model = nnx.eval_shape(lambda: tlvit.create_model("deit_tiny_patch16_224"))
    block = 197 * 192 * 192 * 12 + 2 * 197 * 197 * 192
    expected = 12 * block + 196 * 192 * 768 + 192 * 1000
    assert model_macs(*functionalize(model), (224, 224)) == expected
    assert expected == pytest.approx(1.26e9, rel=0.01)
