"""tlvit.draw_tokens: colors at the positions of the tokens."""

import numpy as np
from PIL import Image

from tlvit.draw_tokens import draw_tokens


def test_token_colors_are_at_the_positions_of_the_tokens():
    image = Image.new("RGB", (60, 40), (128, 128, 128))
    tokens = np.zeros((2, 3, 4), np.float32)
    tokens[..., 3] = 1.0  # one certain class, except for one certain and one uncertain cell
    tokens[0, 2] = [0, 1, 0, 0]
    tokens[1, 0] = [0.4, 0.3, 0.2, 0.1]
    drawn = np.asarray(draw_tokens(image, tokens, ["a", "b", "c", "d"]), int)
    zoom = round(384 / 60)
    np.testing.assert_array_equal(drawn[: 40 * zoom, : 60 * zoom], 128)  # left: the image
    right = drawn[: 40 * zoom, 60 * zoom + 8 :]
    cell = lambda y, x: right[(20 * y + 10) * zoom, (20 * x + 10) * zoom]
    np.testing.assert_array_equal(cell(0, 0), cell(1, 2))
    assert np.abs(cell(0, 0) - cell(0, 2)).max() > 60
    assert np.abs(cell(0, 0) - 128).max() > np.abs(cell(1, 0) - 128).max() > 0  # an uncertain token is paler
