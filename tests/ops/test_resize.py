"""Position embeddings for another grid against PyTorch's bicubic interpolation."""

import numpy as np
import pytest
from model_goldens import randn

from tlvit.ops.resize import resize_pos_embed


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


def test_resize_pos_embed_between_oblong_grids():
    table = randn(1, 1 + 12, 3)
    wide = resize_pos_embed(table, (3, 8), num_prefix=1, old_grid=(3, 4))
    tall = table[:, 1:].reshape(1, 3, 4, 3).swapaxes(1, 2).reshape(1, 12, 3)
    tall = resize_pos_embed(np.concatenate([table[:, :1], tall], 1), (8, 3), num_prefix=1, old_grid=(4, 3))
    np.testing.assert_allclose(
        wide[:, 1:].reshape(3, 8, 3), tall[:, 1:].reshape(8, 3, 3).swapaxes(0, 1), atol=1e-5
    )
    assert resize_pos_embed(table, (3, 4), num_prefix=1, old_grid=(3, 4)) is table
    # The rows of an unchanged side stay as they are in the mean of a constant column.
    flat = np.broadcast_to(table[:, :1], (1, 10, 3))
    np.testing.assert_allclose(
        resize_pos_embed(flat, (5, 7), num_prefix=1),
        np.broadcast_to(flat[:, :1], (1, 36, 3)),
        atol=1e-5,
    )


def test_resize_pos_embed_errors_name_the_numbers():
    with pytest.raises(ValueError, match=r"14 tokens, 1 of them.*13 are no 3x3.*old_grid"):
        resize_pos_embed(randn(1, 14, 2), (4, 4), num_prefix=1)
    with pytest.raises(ValueError, match="12 are no 4x4"):
        resize_pos_embed(randn(1, 13, 2), (4, 4), num_prefix=1, old_grid=(4, 4))
    with pytest.raises(ValueError, match="0 are no"):
        resize_pos_embed(randn(1, 1, 2), (4, 4), num_prefix=1)
