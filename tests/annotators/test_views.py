"""Tests of views: crops cover the image, have whole cells in common, and their logits are averaged."""

import jax.numpy as jnp
import numpy as np
import pytest

from tlvit.annotators.views import Views


def position(height, width):
    """[1, H, W, 3]: every pixel has its row, its column and 0."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([rows, columns, np.zeros_like(rows)], -1)[None].astype(np.float32)


def cell_means(images, cells):
    """[B, h, w, 2]: the mean row and column of the pixels of each cell."""
    batch, height, width, _ = images.shape
    blocks = images.reshape(batch, cells[0], height // cells[0], cells[1], width // cells[1], 3)
    return blocks.mean((2, 4))[..., :2]


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("crop_grid", "grid"), [((1, 1), (4, 8)), ((2, 3), (7, 20)), ((1, 2), (4, 14))])
def test_every_cell_gets_the_logits_of_its_own_pixels(crop_grid, grid, flip, xp):
    """Rows and columns come back at their place, whichever crop or mirror image they are from."""
    views = Views((32, 64), (4, 8), crop_grid, flip)
    assert views.grid == grid
    assert views.image_size == (grid[0] * 8, grid[1] * 8)
    image = xp.asarray(position(*views.image_size))
    cut = views.cut(image)
    assert len(cut) == views.count == crop_grid[0] * crop_grid[1] * (1 + flip)
    assert all(crop.shape == (1, 32, 64, 3) for crop in cut)
    merged = views.merge(xp.asarray(cell_means(crop, (4, 8))) for crop in cut)
    assert isinstance(merged, type(image))
    np.testing.assert_allclose(merged, cell_means(image, grid), atol=1e-4)


def test_the_logits_of_overlapping_crops_are_averaged():
    views = Views((8, 8), (4, 4), (1, 2))
    assert views.grid == (4, 7)
    left, right = np.full((1, 4, 4, 2), 1.0, np.float32), np.full((1, 4, 4, 2), 4.0, np.float32)
    np.testing.assert_array_equal(views.merge([left, right])[0, 0, :, 0], [1, 1, 1, 2.5, 4, 4, 4])


def test_the_average_is_the_geometric_mean_of_the_probabilities():
    views = Views((4, 4), (1, 1), (1, 1), flip=True)
    probabilities = np.array([[[[[0.8, 0.2]]]], [[[[0.4, 0.6]]]]])
    merged = np.exp(views.merge(np.log(probabilities))[0, 0, 0])
    expected = np.sqrt(probabilities[0] * probabilities[1]).ravel()
    np.testing.assert_allclose(merged / merged.sum(), expected / expected.sum(), rtol=1e-6)


def test_crops_of_sizes_that_cells_do_not_divide_cover_the_image():
    views = Views((29, 31), (3, 2), (3, 2))
    cut = views.cut(position(*views.image_size))
    assert all(crop.shape == (1, 29, 31, 3) for crop in cut)
    assert tuple(cut[-1][0, -1, -1, :2] + 1) == views.image_size


def test_views_need_logits():
    with pytest.raises(ValueError, match="2 views need the logits of as many views"):
        Views((4, 4), (1, 1), (1, 2)).merge([])
