"""Draws report.png of a segmentation run: its curves, and a few evaluation images with their classes."""

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tlvit.checkpoints.load import Opened
from tlvit.config import resolve
from tlvit.draw_classes import overlay
from tlvit.drawing.curves import draw_curves
from tlvit.drawing.panels import color_of, draw_legend, namer
from tlvit.segment import segment_pixels
from tlvit.training.tasks import TASKS
from tlvit.types import IGNORE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SIDE = 400  # pixels of a drawn image


def draw_scenes(
    config: dict[str, Any], opened: Opened, curves: dict[str, list[dict[str, float]]], count: int
) -> "Figure":
    """Draws the curves and, below them, one column for each image: the image, its annotation, the prediction.

    Args:
      config: settings of the run, as in its config.json.
      opened: the checkpoint.
      curves: name of a run -> its lines of metrics.
      count: number of evaluation images.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    images, annotations = _first_images(config, count)
    predictions = [classes for classes, _ in segment_pixels(opened.model, opened.info, images)]
    name = namer(opened.info.class_names)
    shown = np.concatenate([classes.ravel() for classes in (*annotations, *predictions)]).astype(int)
    shown = shown[shown != IGNORE]
    colors = {int(k): color_of(int(k)) for k in np.unique(shown)}
    figure = Figure(figsize=(12.5, 4.1 + 2.45 * 3 + 1), layout="constrained")
    figure.suptitle(f"{opened.info.model} trained on the classes of pixels", fontsize=13, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.4, 2.45 * 3 + 1])[:, 0]
    title = "mIoU on the evaluation images, %"
    draw_curves(top, curves, unit="step" if config.get("steps") else "epoch", metric="miou", title=title)
    axes = bottom.subplots(3, len(images), squeeze=False)
    for j, (image, annotation, prediction) in enumerate(zip(images, annotations, predictions, strict=True)):
        axes[0, j].imshow(_small(image))
        axes[1, j].imshow(_small(np.asarray(overlay(image, annotation))))
        axes[2, j].imshow(_small(np.asarray(overlay(image, prediction))))
        known = annotation != IGNORE
        right = 100 * np.mean(prediction[known] == annotation[known]) if known.any() else float("nan")
        axes[2, j].set_xlabel(f"{right:.1f} % of the pixels are right", fontsize=9)
    for i, text in enumerate(["evaluation images", "annotation", f"prediction:\n{opened.section}"]):
        axes[i, 0].set_ylabel(text, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    draw_legend(bottom, shown, colors, name, title="class of a pixel")
    return figure


def _first_images(config: dict[str, Any], count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first images of the evaluation split, uint8 [H, W, 3], and their classes, uint8 [H, W]."""
    from tlvit.data.annotated_images import annotated_eval_batches

    settings = resolve(config)
    source = TASKS["segmentation"].open_source(settings, settings.data.eval_split)
    batches = annotated_eval_batches(source, settings, batch_size=1, threads=1)
    chosen = [batch for batch, _ in zip(batches, range(count), strict=False)]
    return [batch.image[0] for batch in chosen], [batch.segmentation[0] for batch in chosen]


def _small(image: np.ndarray) -> np.ndarray:
    """An image of at most MAX_SIDE pixels a side."""
    picture = Image.fromarray(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return np.asarray(picture)
