"""Convolution of images. On a CPU it is computed in the form that XLA's library for CPUs is fastest at."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from einops import rearrange

from tlvit.shapes import Float
from tlvit.types import Array

PARTS = 8  # of a batch, for the gradient of a kernel on a CPU
Function = Callable[..., Any]


def convolve(
    images: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw c O"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "B h w O"]:
    """`jax.lax.conv_general_dilated` of images, which it is on all platforms but CPUs.

    On a CPU a convolution whose windows do not overlap is one matrix product, and other convolutions compute
    the gradient of their kernel in parts of the batch. Both equal the convolution up to rounding and take
    about half of the time (docs/performance.md).

    Args:
      images: [B, H, W, C].
      kernel: [kh, kw, C / groups, O].
      strides: of the rows and columns, pixels.
      padding: pixels of zeros (before, after) the rows and the columns.
      **options: further arguments of `conv_general_dilated`: its `dimension_numbers` for these layouts, and
        others such as `feature_group_count`. Grouped and dilated convolutions are the same on all platforms.

    Returns:
      [B, h, w, O].

    Example:
      >>> layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
      >>> images, kernel = jnp.ones((1, 4, 4, 3)), jnp.ones((2, 2, 3, 5))
      >>> convolve(images, kernel, (2, 2), ((0, 0), (0, 0)), **layout).shape
      (1, 2, 2, 5)
    """
    plain = functools.partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options
    )
    is_dilated = any(max(options.get(name) or (1,)) > 1 for name in ("lhs_dilation", "rhs_dilation"))
    # Devices that share the batch would exchange images to make its parts.
    is_shared = jax.sharding.get_abstract_mesh().size > 1
    if options.get("feature_group_count", 1) > 1 or is_dilated or is_shared:
        return plain(images, kernel)
    height, width = kernel.shape[:2]
    is_patches = tuple(strides) == (height, width) and not any(map(any, padding))
    if is_patches and images.shape[1] % height == 0 and images.shape[2] % width == 0:
        return _convolve(plain, _project_patches, _gradients_of_patches, images, kernel)
    return _convolve(plain, plain, functools.partial(_gradients_in_parts, plain), images, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolve(plain: Function, on_cpu: Function, gradients_on_cpu: Function, *arrays: Array) -> Array:
    """The convolution of (images, kernel). The backward pass keeps these two on all platforms."""
    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=plain)


def _forward(
    plain: Function, on_cpu: Function, gradients_on_cpu: Function, *arrays: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _convolve(plain, on_cpu, gradients_on_cpu, *arrays), arrays


def _backward(
    plain: Function, on_cpu: Function, gradients_on_cpu: Function, arrays: tuple[Array, ...], grad: Array
) -> tuple[Array, Array]:
    gradients = lambda images, kernel, grad: jax.vjp(plain, images, kernel)[1](grad)
    return jax.lax.platform_dependent(*arrays, grad, cpu=gradients_on_cpu, default=gradients)


_convolve.defvjp(_forward, _backward)


def _project_patches(images: Array, kernel: Array) -> Array:
    """The convolution whose windows do not overlap."""
    height, width = kernel.shape[:2]
    patches = rearrange(images, "b (h p) (w q) c -> b h w (p q c)", p=height, q=width)
    return patches @ rearrange(kernel, "p q c o -> (p q c) o")


def _gradients_of_patches(images: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
    return jax.vjp(_project_patches, images, kernel)[1](grad)


def _gradients_in_parts(plain: Function, images: Array, kernel: Array, grad: Array) -> tuple[Array, Array]:
    """The gradient of the kernel is the sum over PARTS parts of the batch."""
    (grad_images,) = jax.vjp(lambda x: plain(x, kernel), images)[1](grad)
    size = -(-images.shape[0] // PARTS)
    parts = [slice(start, start + size) for start in range(0, images.shape[0], size)]
    of_part = lambda part: jax.vjp(lambda k: plain(images[part], k), kernel)[1](grad[part])[0]
    return grad_images, sum(map(of_part, parts[1:]), of_part(parts[0]))
