"""tlvit.ops.convolution: equal to XLA's convolution, and the convolution itself on other platforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlvit.ops.convolution import convolve

LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
CASES = {  # size of the kernel, stride, padding, groups
    "overlapping windows": (3, 1, 1, 1),
    "stride 2": (7, 2, 3, 1),
    "patches": (4, 4, 0, 1),
    "a border that no patch covers": (5, 5, 0, 1),
    "patches with padding": (4, 4, 2, 1),
    "groups": (3, 1, 1, 2),
}


def arrays(size, groups, batch=11):
    """Images, of which the last part has fewer than the others, and a kernel."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return normal(batch, 8, 12, 4), normal(size, size, 4 // groups, 6) / size


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_convolution(case):
    size, stride, padding, groups = CASES[case]
    images, kernel = arrays(size, groups)
    options = {"feature_group_count": groups, **LAYOUT}
    window = ((stride, stride), ((padding, padding), (padding, padding)))
    results = []
    for function in (convolve, jax.lax.conv_general_dilated):
        output, gradients = jax.vjp(lambda x, k, f=function: f(x, k, *window, **options), images, kernel)
        results.append((output, *gradients(jnp.sin(output))))
    for found, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("name", ["lhs_dilation", "rhs_dilation"])
def test_dilated_convolutions_are_not_products_of_patches(name):
    images, kernel = arrays(2, 1)
    options = {name: (2, 2), **LAYOUT}
    found, wanted = (
        function(images, kernel, (2, 2), ((0, 0), (0, 0)), **options)
        for function in (convolve, jax.lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("platform", "overlapping", "patches"), [("cpu", 2 + 8, 0), ("tpu", 3, 3), ("cuda", 3, 3)]
)
def test_only_programs_for_cpus_differ(platform, overlapping, patches):
    """The convolutions of a program: of the output, the gradient of the images and that of the kernel."""
    images, kernel = arrays(4, 1, batch=16)

    def count(stride, padding):
        window = ((stride, stride), ((padding, padding), (padding, padding)))
        loss = lambda x, k: jnp.sum(convolve(x, k, *window, **LAYOUT) ** 2)
        program = jax.jit(jax.grad(loss, (0, 1))).trace(images, kernel)
        return program.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")

    assert (count(1, 2), count(4, 0)) == (overlapping, patches)


def test_devices_that_share_a_batch_do_not_divide_it_into_parts():
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    images, kernel = arrays(3, 1)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(functools.partial(convolve, strides=(1, 1), padding=((1, 1),) * 2, **LAYOUT))
        names = [equation.primitive.name for equation in program(images, kernel).eqns]
    assert names == ["conv_general_dilated"]
