"""Resizing of images and position embeddings against torch's results and the kernel written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fill, randn

from tlvit.ops.resize import resize_bicubic, resize_bilinear, resize_pos_embed


@pytest.mark.parametrize("case", ["14to24", "14to28", "24to14", "14to32"])
def test_bicubic_resize_equals_torch(golden, case):
    z = golden("target_visible.npz")
    old, new = (int(n) for n in case.split("to"))
    table, expected = z[f"pos/{case}/in"][:, 1:], z[f"pos/{case}/out"][:, 1:]
    resized = resize_bicubic(table.reshape(1, old, old, -1), (new, new))
    np.testing.assert_allclose(resized.reshape(expected.shape), expected, atol=1e-5)


def test_bicubic_resize_by_hand():
    """From 2 to 4 samples: the outputs lie at -0.25, 0.25, 0.75, 1.25; the cubic kernel has a = -0.75."""

    def kernel(d, a=-0.75):
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    line = [3.0, 7.0]
    value = lambda i: line[min(max(i, 0), 1)]
    expected = [sum(kernel(c - i) * value(i) for i in range(-3, 5)) for c in (-0.25, 0.25, 0.75, 1.25)]
    image = jnp.array(line).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(resize_bicubic(image, (1, 4)).ravel(), expected, atol=1e-5)
    np.testing.assert_allclose(resize_bicubic(image, (3, 4))[0, 2, :, 0], expected, atol=1e-5)
    np.testing.assert_allclose(resize_bicubic(image.swapaxes(1, 2), (4, 1)).ravel(), expected, atol=1e-5)
    np.testing.assert_array_equal(resize_bicubic(image, (1, 2)), image)


@pytest.mark.parametrize("case", ["14to24", "14to28", "24to14", "14to32"])
@pytest.mark.parametrize("prefix", [1, 2])
def test_resize_pos_embed_equals_torch(golden, case, prefix):
    z = golden("target_visible.npz")
    table, expected = z[f"pos/{case}/in"], z[f"pos/{case}/out"]
    extra = randn(1, prefix - 1, table.shape[-1])
    side = int(case.split("to")[1])
    resized = resize_pos_embed(np.concatenate([extra, table], 1), (side, side), num_prefix=prefix)
    np.testing.assert_allclose(resized[:, prefix - 1 :], expected, atol=1e-5)
    np.testing.assert_array_equal(resized[:, : prefix - 1], extra)
    np.testing.assert_array_equal(resized[:, prefix - 1], table[:, 0])


@pytest.mark.parametrize(
    ("old", "new"), [(14, (32, 32)), (28, (32, 32)), (8, (8, 10)), (4, (3, 4)), (14, (8, 8))]
)
def test_resize_pos_embed_of_the_segmentation_models_equals_torch(golden, old, new):
    name = f"{old}to{new[0]}x{new[1]}"
    table = fill("backbone.pos_embed", (1, 1 + old * old, 4))
    expected = golden("seg_visible.npz")[f"ops/pos/{name}"]
    np.testing.assert_allclose(resize_pos_embed(table, new, num_prefix=1), expected, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["8x8to16x16", "6x6to4x4", "3x3to8x10", "1x1to5x7", "32x33to20x18", "9x7to23x31"]
)
def test_bilinear_resize_equals_torch(golden, case):
    """Without antialiasing, also when the image shrinks."""
    old, new = (tuple(map(int, size.split("x"))) for size in case.split("to"))
    image = np.random.RandomState(5).standard_normal((1, 2, *old)).astype(np.float32)
    expected = golden("seg_visible.npz")[f"ops/resize/{case}"]
    resized = resize_bilinear(image.transpose(0, 2, 3, 1), new)
    np.testing.assert_allclose(np.moveaxis(resized, -1, 1), expected, atol=1e-6)


def test_resize_pos_embed_between_grids_that_are_not_square():
    table = randn(1, 1 + 12, 3)
    wide = resize_pos_embed(table, (3, 8), num_prefix=1, old_grid=(3, 4))
    tall = table[:, 1:].reshape(1, 3, 4, 3).swapaxes(1, 2).reshape(1, 12, 3)
    tall = resize_pos_embed(np.concatenate([table[:, :1], tall], 1), (8, 3), num_prefix=1, old_grid=(4, 3))
    np.testing.assert_allclose(
        wide[:, 1:].reshape(3, 8, 3), tall[:, 1:].reshape(8, 3, 3).swapaxes(0, 1), atol=1e-5
    )
    assert resize_pos_embed(table, (3, 4), num_prefix=1, old_grid=(3, 4)) is table
    # A constant table stays constant.
    flat = np.broadcast_to(table[:, :1], (1, 10, 3))
    np.testing.assert_allclose(
        resize_pos_embed(flat, (5, 7), num_prefix=1),
        np.broadcast_to(flat[:, :1], (1, 36, 3)),
        atol=1e-5,
    )


def test_resize_pos_embed_errors_name_the_numbers():
    with pytest.raises(ValueError, match=r"14 tokens, 1 of them.*13 are not a 3x3.*old_grid"):
        resize_pos_embed(randn(1, 14, 2), (4, 4), num_prefix=1)
    with pytest.raises(ValueError, match="12 are not a 4x4"):
        resize_pos_embed(randn(1, 13, 2), (4, 4), num_prefix=1, old_grid=(4, 4))
    with pytest.raises(ValueError, match="0 are not a"):
        resize_pos_embed(randn(1, 1, 2), (4, 4), num_prefix=1)
