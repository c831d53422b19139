"""Draws score maps: over their images, as training samples them for an augmented view, and those that
contradict their labels."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from PIL import Image

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import Config
from tlvit.drawing.panels import Panel, draw_panels, namer
from tlvit.ops.targets import make_targets

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow; Matplotlib is optional
    from matplotlib.figure import Figure

    from tlvit.data.score_maps.reader import ScoreMapReader
    from tlvit.data.score_maps.statistics import MapStatistics, ScoredImage
    from tlvit.data.sources.source import Source
    from tlvit.data.views import View

LARGEST = 360  # pixels of a photograph's longer side in a picture


def draw_score_maps(
    source: "Source", reader: "ScoreMapReader", config: Config, *, count: int, recipe: str = ""
) -> "Figure":
    """Draws one row for each image: the photograph; the classes of its map, with the part that the view shows
    outlined; a view as the input pipeline makes it for training; the view's token targets.

    Colors that move with the objects from the photograph to the view mean that map and view are aligned.

    Args:
      source: the images.
      reader: their score maps.
      config: settings of the training; the token grid is that of its model.
      count: number of images, spread evenly over the source.
      recipe: its name, for the title.

    Raises:
      ValueError: the model has no tokens, or the maps do not belong to the images.
    """
    from tlvit.data.views import training_views

    grid = token_grid_of(config)
    views = training_views(source, reader, config, count=count)
    rows = [_row(view, reader, config, source, grid) for view in views]
    title = f"score maps of {reader.info.annotator}; views" + (f" of the recipe {recipe}" if recipe else "")
    return draw_panels(rows, class_names=source.class_names, title=title)


def draw_least_plausible(source: "Source", statistics: "MapStatistics", *, columns: int = 5) -> "Figure":
    """Draws the images whose label is least probable in their map, with label and best class.

    Raises:
      ValueError: the statistics have no such images, because they were made without labels.
    """
    from tlvit.data.views import photographs

    images = statistics.least_plausible
    if not images:
        raise ValueError("The images of these statistics are unknown.")
    pixels = photographs(source, [(image.shard, image.offset) for image in images])
    named = namer(source.class_names)
    panels = [
        Panel(small(photo), title=f"label {_words(named, image.label, image.label_probability)}",
              caption=f"map: {_words(named, image.best, image.best_probability)}\n{short(image.key)}")
        for photo, image in zip(pixels, images, strict=True)
    ]  # fmt: skip
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return draw_panels(rows, title="the images whose label is least probable in their score map", side=1.9)


def token_grid_of(config: Config) -> tuple[int, int]:
    """The token grid (h, w) of the model of a run.

    Raises:
      ValueError: its model has no tokens.
    """
    info = ModelInfo(config.model.name, 10, config.image_size, dict(config.model.options))
    grid = nnx.eval_shape(info.build).grid
    if grid is None:
        raise ValueError(
            f"{config.model.name} has no tokens, so there are no token targets to draw: choose the recipe of "
            "a student with --config."
        )
    return grid


def describe_images(images: "Sequence[ScoredImage]", class_names: Sequence[str] | None) -> list[str]:
    """One line for each of the least plausible images."""
    named = namer(class_names)
    return [
        f"{image.key}: label {_words(named, image.label, image.label_probability)}, "
        f"map {_words(named, image.best, image.best_probability)}"
        for image in images
    ]


def dense_logits(value: np.ndarray, index: np.ndarray, num_classes: int) -> np.ndarray:
    """The logits of all classes in a map's cells, as training has them: 0 for a class that is not kept.

    Args:
      value: logits [K, h, w].
      index: their classes.
      num_classes: L.

    Returns:
      float32 [h, w, L].
    """
    logits = np.zeros((num_classes, *value.shape[1:]), np.float32)
    np.put_along_axis(logits, index.astype(np.int64), value.astype(np.float32), axis=0)
    return np.moveaxis(logits, 0, -1)


def outline_of(geometry: np.ndarray, to_map: np.ndarray) -> np.ndarray:
    """The corners of a view in its photograph, [4, 2] as fractions.

    Args:
      geometry: [2, 3], view -> score map.
      to_map: [2, 3], photograph -> score map.
    """
    corners = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]]) @ geometry.T
    return (corners - to_map[:, 2]) @ np.linalg.inv(to_map[:, :2]).T


def small(image: np.ndarray) -> np.ndarray:
    """The image with at most LARGEST pixels a side."""
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def short(text: str, length: int = 26) -> str:
    """The end of a text."""
    return text if len(text) <= length else "…" + text[1 - length :]


def _row(
    view: "View", reader: "ScoreMapReader", config: Config, source: "Source", grid: tuple[int, int]
) -> list[Panel]:
    """The four panels of an image."""
    batch, named, num_classes = view.batch, namer(source.class_names), source.num_classes
    label, photo = int(batch.label[0]), small(view.photograph)
    logits = dense_logits(batch.maps.value[0], batch.maps.index[0], num_classes)
    softmax = lambda x: np.asarray(jax.nn.softmax(x, axis=-1))
    targets = make_targets(
        batch.maps,
        batch.label,
        batch.geometry,
        grid=grid,
        num_classes=num_classes,
        smoothing=config.loss.label_smoothing,
    )
    tokens = np.asarray(targets.tokens[0]).reshape(*grid, num_classes)
    weight = np.asarray(targets.weight[0]).reshape(grid)
    linear, shift = view.to_map[:, :2], view.to_map[:, 2]
    left, top = np.linalg.solve(linear, -shift).tolist()  # corners of the map in the photograph
    right, bottom = np.linalg.solve(linear, 1 - shift).tolist()
    return [
        Panel(photo, short(view.key), f"label {named(label)[:24]}"),
        Panel(
            photo,
            "score map",
            f"mean map: {_best(softmax(logits.mean((0, 1))), named)}",
            probability=softmax(logits),
            extent=(left, top, right, bottom),
            outline=outline_of(batch.geometry[0], view.to_map),
        ),
        Panel(batch.image[0], "view in training"),
        Panel(
            batch.image[0],
            "token targets",
            f"class target: {_best(np.asarray(targets.cls[0]), named)}",
            probability=tokens * (weight > 0)[..., None] + (weight == 0)[..., None] / num_classes,
            weight=weight,
        ),
    ]


def _best(probability: np.ndarray, named: Callable[[int], str]) -> str:
    best = int(probability.argmax())
    return _words(named, best, float(probability[best]))


def _words(named: Callable[[int], str], index: int, probability: float) -> str:
    return f"{named(index)[:20]} ({100 * probability:.0f} %)"
