"""Pictures of score maps: where a view is outlined, the classes of the panels, the images of the list."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from tlvit import config
from tlvit.data.score_maps.statistics import MapStatistics, ScoredImage
from tlvit.data.views import View
from tlvit.drawing import score_maps
from tlvit.drawing.score_maps import dense_logits, draw_score_maps, outline_of, token_grid_of
from tlvit.types import Batch, ScoreMaps


def test_logits_of_a_map_are_those_of_training():
    value = np.array([[[2.0, 1.0]], [[-1.0, 0.5]]], np.float16)
    index = np.array([[[3, 0]], [[1, 2]]], np.uint16)
    np.testing.assert_array_equal(dense_logits(value, index, 4), [[[0, -1, 0, 2], [1, 0, 0.5, 0]]])


def test_the_outline_of_a_view():
    """A flipped crop of the left half, of a photograph whose middle half in x is the map."""
    view_to_map = np.array([[-0.5, 0, 0.5], [0, 1, 0]])
    photo_to_map = np.array([[2, 0, -0.5], [0, 1, 0]])
    corners = outline_of(view_to_map, photo_to_map)
    np.testing.assert_allclose(corners, [[0.5, 0], [0.25, 0], [0.25, 1], [0.5, 1]])


def test_the_token_grid_is_that_of_the_recipe():
    settings = config.default()
    settings.image_size = (64, 96)
    settings.model.options = {"dim": 16, "depth": 1, "num_heads": 2}
    assert token_grid_of(config.resolve(settings)) == (4, 6)
    settings.model.name = "regnety_002"
    settings.model.options = {"widths": (8,), "depths": (1,), "strides": (2,), "group_width": 8}
    with pytest.raises(ValueError, match="regnety_002 has no tokens, so there are no token targets to draw"):
        token_grid_of(config.resolve(settings))


class Source:
    class_names = ("cat", "dog", "bird")
    num_classes = 3


class Reader:
    class info:
        annotator = "net"


@pytest.mark.slow
def test_a_row_shows_photograph_map_view_and_targets(monkeypatch):
    """The map knows a cat on the left, a dog on the right; the view is its right half and what is beyond."""
    value = np.full((1, 1, 2, 2), 9, np.float16)
    maps = ScoreMaps(value=value, index=np.array([[[[0, 1], [0, 1]]]], np.uint16))
    geometry = np.array([[[1, 0, 0.5], [0, 1, 0]]], np.float32)  # its right half is outside of the map
    batch = Batch(
        np.full((1, 8, 8, 3), 9, np.uint8), np.array([1], np.int32), np.ones(1, bool), maps, geometry
    )
    photo = np.full((20, 30, 3), 7, np.uint8)
    view = View("folder/one", photo, np.eye(2, 3, dtype=np.float32), batch)
    monkeypatch.setattr("tlvit.data.views.training_views", lambda *a, count: [view] * count)
    monkeypatch.setattr(score_maps, "token_grid_of", lambda settings: (4, 4))
    figure = draw_score_maps(Source, Reader, config.Config(), count=2, recipe="mine")
    assert figure.get_suptitle() == "score maps of net; views of the recipe mine"
    axes = figure.axes
    assert [axis.get_title() for axis in axes[:4]] == [
        "folder/one", "score map", "view in training", "token targets"
    ]  # fmt: skip
    assert axes[0].get_xlabel() == "label dog"
    assert axes[3].get_xlabel().startswith("class target: dog")
    np.testing.assert_allclose(axes[1].patches[0].get_xy()[:4] + 0.5, [[15, 0], [45, 0], [45, 20], [15, 20]])
    paint = axes[3].images[1].get_array()
    assert (paint[:, :3, 3] > 0.5).all()
    assert (paint[:, 3, 3] == 0).all()  # more than a cell outside: not covered, no color, crossed out
    assert set(axes[3].lines[0].get_xdata()) == {6.5}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "dog"]


def test_the_least_plausible_images(monkeypatch):
    image = ScoredImage("cat/a_very_long_name_of_an_image", 0, 1, 0, 0.01, 2, 0.9)
    counts = np.zeros(10, int)
    statistics = MapStatistics(7, 1.0, counts, counts, (), (), 0.5, (image,) * 7)
    asked = []
    photos = lambda source, places: asked.append(places) or [np.zeros((8, 8, 3), np.uint8)] * len(places)
    monkeypatch.setattr("tlvit.data.views.photographs", photos)
    figure = score_maps.draw_least_plausible(Source, statistics)
    assert asked == [[(0, 1)] * 7]
    assert figure.axes[0].get_title() == "label cat (1 %)"
    assert figure.axes[6].get_xlabel() == "map: bird (90 %)\n…ery_long_name_of_an_image"
    lines = score_maps.describe_images(statistics.least_plausible[:1], Source.class_names)
    assert lines == ["cat/a_very_long_name_of_an_image: label cat (1 %), map bird (90 %)"]
    with pytest.raises(ValueError, match="images of these statistics are unknown"):
        score_maps.draw_least_plausible(Source, MapStatistics(1, 1.0, counts, counts, (), ()))
