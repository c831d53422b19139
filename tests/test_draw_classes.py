"""Class maps, overlays and legends of segmentation."""

import numpy as np
from PIL import Image

from tlvit.draw_classes import class_map_image, legend, overlay, percent
from tlvit.draw_tokens import class_color


def test_a_class_map_keeps_the_indices_and_shows_the_colors(tmp_path):
    classes = np.arange(256, dtype=np.int32).reshape(16, 16)
    class_map_image(classes).save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), classes)
        colors = np.asarray(image.convert("RGB"))
    for index in (0, 1, 10, 255):
        assert tuple(colors[index // 16, index % 16]) == tuple(class_color(index))


def test_more_than_256_classes_are_written_as_16_bits(tmp_path):
    classes = np.array([[0, 300], [65535, 2]], np.int32)
    class_map_image(classes).save(tmp_path / "map.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "map.png")), classes)


def test_an_overlay_mixes_the_colors_with_the_gray_image():
    image, classes = np.full((2, 4, 3), 100, np.uint8), np.array([[0, 0, 1, 1]] * 2)
    found = np.asarray(overlay(image, classes)).astype(float)
    assert found.shape == (2, 4, 3)
    for column, index in ((0, 0), (3, 1)):
        expected = 0.6 * np.array(class_color(index)) + 0.4 * 100
        np.testing.assert_allclose(found[0, column], expected, atol=1.01)


def test_a_legend_has_the_colors_of_its_classes():
    canvas = np.asarray(legend({4: 0.7, 1: 0.3}, ("a", "b", "c", "d", "e")))
    colors = {tuple(color) for color in canvas.reshape(-1, 3)}
    assert {tuple(class_color(4)), tuple(class_color(1))} <= colors
    assert tuple(class_color(2)) not in colors


def test_small_fractions_are_not_written_as_zero():
    assert [percent(x) for x in (0.0, 0.0004, 0.0005, 0.123, 1.0)] == [
        "0.0 %", "<0.1 %", "0.1 %", "12.3 %", "100.0 %",
    ]  # fmt: skip
