"""Dropout by its probability and its mean."""

import math

import jax
import numpy as np

from tlvit.ops.dropout import dropout


def test_dropout_drops_elements_and_keeps_the_mean():
    x = np.ones((200, 100), np.float32)
    y = np.asarray(dropout(x, 0.2, jax.random.key(1)))
    np.testing.assert_allclose(np.unique(y), [0, 1.25], atol=1e-6)
    assert abs((y == 0).mean() - 0.2) < 4 * math.sqrt(0.16 / 20000)
    assert 0 < (y == 0).mean(0).min() < (y == 0).mean(0).max() < 1
    assert dropout(x, 0.2, None) is x
    assert dropout(x, 0.0, jax.random.key(1)) is x
