"""RoIAlign against a plain loop, and affine geometries."""

import math

import jax
import numpy as np
import pytest

from tlvit.ops.roi_align import roi_weights


def roi_align(image, box, grid):
    """RoIAlign as torchvision's `aligned=False` defines it: image [h, w], box (x1, y1, x2, y2) in cells."""
    rows, columns = image.shape
    x1, y1, x2, y2 = box
    bin_w, bin_h = max(x2 - x1, 1.0) / grid[1], max(y2 - y1, 1.0) / grid[0]
    many_x, many_y = math.ceil(bin_w), math.ceil(bin_h)
    out = np.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            for a in range(many_y):
                for b in range(many_x):
                    y = y1 + i * bin_h + (a + 0.5) * bin_h / many_y
                    x = x1 + j * bin_w + (b + 0.5) * bin_w / many_x
                    out[i, j] += bilinear(image, y, x, rows, columns) / (many_y * many_x)
    return out


def bilinear(image, y, x, rows, columns):
    if y < -1 or y > rows or x < -1 or x > columns:
        return 0.0
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
    y0, x0 = min(int(y), max(rows - 2, 0)), min(int(x), max(columns - 2, 0))
    y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
    fy, fx = y - y0, x - x0
    top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
    bottom = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def crop_geometry(left, top, width, height):
    return np.array([[width, 0, left], [0, height, top]], np.float32)


@pytest.mark.parametrize(
    ("map_grid", "grid", "box"),
    [
        ((18, 18), (14, 14), (0.0, 0.0, 1.0, 1.0)),
        ((18, 18), (14, 14), (0.13, 0.21, 0.61, 0.55)),
        ((18, 18), (4, 4), (0.05, 0.1, 0.83, 0.7)),  # several samples a token
        ((7, 12), (4, 9), (0.11, 0.3, 0.77, 0.59)),  # neither map nor grid is square
        ((12, 7), (9, 2), (0.07, 0.02, 0.81, 0.93)),
        ((5, 5), (8, 8), (0.52, 0.44, 0.1, 0.07)),  # smaller than a cell: counts as one cell
        ((6, 6), (3, 3), (-0.4, -0.3, 0.9, 0.95)),  # hangs over the border
        ((6, 6), (3, 3), (0.62, 0.71, 0.93, 0.88)),
        ((1, 1), (3, 3), (0.1, 0.2, 0.5, 0.5)),
    ],
)
def test_roi_weights_are_roi_align_for_plain_crops(map_grid, grid, box):
    image = np.random.RandomState(0).standard_normal(map_grid)
    left, top, width, height = box
    weights = jax.jit(roi_weights, static_argnums=(1, 2))(crop_geometry(*box)[None], map_grid, grid)
    assert weights.shape == (1, grid[0] * grid[1], map_grid[0] * map_grid[1])
    cells = np.array([left * map_grid[1], top * map_grid[0]] * 2) - 0.5
    cells[2:] += [width * map_grid[1], height * map_grid[0]]
    expected = roi_align(image, cells, grid)
    np.testing.assert_allclose(weights[0] @ image.ravel(), expected.ravel(), atol=1e-5)


@pytest.mark.slow
def test_weights_inside_the_map_sum_to_one_and_far_outside_to_zero():
    inside = roi_weights(crop_geometry(0.1, 0.2, 0.7, 0.6)[None], (9, 9), (5, 5))
    np.testing.assert_allclose(inside.sum(-1), 1, atol=1e-6)
    outside = roi_weights(crop_geometry(1.3, 0.2, 0.7, 0.6)[None], (9, 9), (5, 5))
    np.testing.assert_array_equal(outside, 0)
    # Up to a cell outside of the outermost cell centers the border counts, and no further.
    edge = roi_weights(crop_geometry(-0.5, 0.0, 1.0, 1.0)[None], (8, 8), (8, 8)).reshape(8, 8, 8, 8)
    np.testing.assert_allclose(edge.sum((2, 3))[0], [0, 0, 0, 1, 1, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(edge[3, 3, :, 0].sum(), 1, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), pytest.param((3, 7), marks=pytest.mark.slow), (10, 6)])
@pytest.mark.parametrize("map_grid", [pytest.param((12, 12), marks=pytest.mark.slow), (9, 16)])
def test_an_affine_map_keeps_its_value_at_the_mapped_points(map_grid, grid):
    """Rotation, shear, a flip, a shift: bilinear sampling is exact for maps linear in position."""
    c, s = 0.5 * math.cos(0.44), 0.5 * math.sin(0.44)
    geometry = np.array([[[-c, s + 0.1, 0.6], [s, c, 0.2]], [[0.4, 0.2, 0.15], [0.0, 0.5, 0.3]]], np.float32)
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n for n in map_grid), indexing="ij")
    weights = roi_weights(geometry, map_grid, grid)
    ty, tx = np.meshgrid(*((np.arange(n) + 0.5) / n for n in grid), indexing="ij")
    points = np.einsum("bij,jn->bin", geometry, np.stack([tx.ravel(), ty.ravel(), np.ones(tx.size)]))
    assert points.min() > 0.06  # the samples lie between cell centers
    assert points.max() < 0.94
    for a, b, constant in ((3.0, 0.0, -1.0), (0.0, 2.0, 0.5), (1.0, -4.0, 2.0)):
        sampled = weights @ (a * x + b * y + constant).ravel()
        np.testing.assert_allclose(sampled, a * points[:, 0] + b * points[:, 1] + constant, atol=2e-5)
