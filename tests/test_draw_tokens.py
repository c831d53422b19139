"""tlvit.draw_tokens: colors at the positions of the tokens."""

import numpy as np
import pytest
from PIL import Image

from tlvit import draw_tokens as module
from tlvit.draw_tokens import class_color, draw_tokens


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


def test_a_class_has_one_color_in_all_images():
    """Whichever class is the most frequent one."""
    image, drawn = Image.new("RGB", (40, 40)), []
    for frequent in (3, 1):
        tokens = np.zeros((2, 2, 4), np.float32)
        tokens[..., frequent] = 1.0
        tokens[0, 0] = [0, 0, 1, 0]
        drawn.append(np.asarray(draw_tokens(image, tokens)))
    zoom = round(384 / 40)
    np.testing.assert_array_equal(drawn[0][5, 40 * zoom + 20], drawn[1][5, 40 * zoom + 20])
    assert (drawn[0][30 * zoom, 70 * zoom] != drawn[1][30 * zoom, 70 * zoom]).any()


def test_the_first_colors_are_those_of_report_png():
    from matplotlib import colormaps

    for k in range(10):
        np.testing.assert_array_equal(np.array(class_color(k)) / 255, colormaps["tab10"](k)[:3])


def test_the_colors_of_the_first_classes_differ():
    colors = np.array([class_color(i) for i in range(21)])
    distance = np.abs(colors[:, None] - colors[None]).max(-1)
    assert distance[~np.eye(21, dtype=bool)].min() > 25


@pytest.mark.parametrize("fonts", [module.FONTS, ()])
def test_the_legend_writes_umlauts(fonts, monkeypatch):
    """With and without an installed font; letters that the font has not are marked."""
    monkeypatch.setattr(module, "FONTS", fonts)
    tokens = np.ones((1, 1, 1), np.float32)
    draw = lambda name: np.asarray(draw_tokens(Image.new("RGB", (8, 8)), tokens, [name]))[-16:]
    legends = [draw(name) for name in ("Bär", "Bör", "Bar", "B?r", "Bßr")]
    for i, one in enumerate(legends):
        assert all((one != other).any() for other in legends[i + 1 :])
    assert draw("東京").shape == legends[0].shape
