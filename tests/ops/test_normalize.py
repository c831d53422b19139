"""Normalization by hand."""

import jax.numpy as jnp
import numpy as np

from tlvit.ops.normalize import normalize


def test_normalize():
    image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 1, 3)
    got = normalize(image)
    expected = (np.array([0, 128 / 255, 1]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(got.ravel(), expected, atol=1e-6)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        normalize(image, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5)).ravel(),
        [-1, (128 / 255 - 0.5) * 4, 1],
        atol=1e-6,
    )
