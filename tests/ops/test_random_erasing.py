"""Random erasing: number, size, shape and values of the erased boxes."""

import jax
import numpy as np
import pytest

from tlvit.ops.random_erasing import random_erasing


@pytest.mark.slow
def test_random_erasing_fills_one_box_with_noise():
    images = np.full((400, 32, 24, 3), 7.0, np.float32)
    erased = np.asarray(random_erasing(jax.random.key(0), images, probability=0.25))
    changed = (erased != 7).any(-1)
    hit = changed.any((1, 2))
    assert 0.25 - 4 * 0.0217 < hit.mean() < 0.25 + 4 * 0.0217
    area, aspects = changed[hit].mean((1, 2)), []
    for mask in changed[hit]:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns[None, :])
        aspects.append(rows.sum() / columns.sum())
    # Sides are whole pixels, the smallest 2: a little slack beyond 0.02 to 1/3 and 0.3 to 3.3.
    assert area.min() > 0.01
    assert area.max() < 0.36
    assert 0.1 < area.mean() < 0.25
    assert min(aspects) > 0.2
    assert max(aspects) < 4.5
    noise = erased[erased != 7]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    np.testing.assert_array_equal(random_erasing(jax.random.key(0), images, probability=0.0), images)
    assert (random_erasing(jax.random.key(1), images, probability=1.0) != 7).any((1, 2, 3)).mean() > 0.99
