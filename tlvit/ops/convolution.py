"""Convolution of images. On a CPU it is computed in the form that XLA's library for CPUs is fastest at."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from einops import rearrange

from tlvit.shapes import Float
from tlvit.types import Array

PARTS = 8  # of a batch, for the gradient of a kernel on a CPU


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
      **options: further arguments of `conv_general_dilated`, such as `feature_group_count`.

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
    # Devices that share the batch would exchange images to make its parts.
    if options.get("feature_group_count", 1) > 1 or jax.sharding.get_abstract_mesh().size > 1:
        return plain(images, kernel)
    height, width = kernel.shape[:2]
    is_patches = tuple(strides) == (height, width) and not any(map(any, padding))
    if is_patches and images.shape[1] % height == 0 and images.shape[2] % width == 0:
        on_cpu = _project_patches
    else:
        on_cpu = functools.partial(_convolve_in_parts, plain)
    return jax.lax.platform_dependent(images, kernel, cpu=on_cpu, default=plain)


def _project_patches(images: Array, kernel: Array) -> Array:
    """The convolution whose windows do not overlap."""
    height, width = kernel.shape[:2]
    patches = rearrange(images, "b (h p) (w q) c -> b h w (p q c)", p=height, q=width)
    return patches @ rearrange(kernel, "p q c o -> (p q c) o")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_in_parts(convolution: Callable[..., Array], images: Array, kernel: Array) -> Array:
    """The convolution. The gradient of its kernel is the sum over PARTS parts of the batch."""
    return convolution(images, kernel)


def _forward(
    convolution: Callable[..., Array], images: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return convolution(images, kernel), (images, kernel)


def _backward(
    convolution: Callable[..., Array], arrays: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    images, kernel = arrays
    (grad_images,) = jax.vjp(lambda x: convolution(x, kernel), images)[1](grad)
    size = -(-images.shape[0] // PARTS)
    parts = [slice(start, start + size) for start in range(0, images.shape[0], size)]
    of_part = lambda part: jax.vjp(lambda k: convolution(images[part], k), kernel)[1](grad[part])[0]
    return grad_images, sum(map(of_part, parts[1:]), of_part(parts[0]))


_convolve_in_parts.defvjp(_forward, _backward)
