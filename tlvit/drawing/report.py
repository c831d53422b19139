"""Draws report.png of a run: its curves, and the classes that the annotator and the student predict for every
cell of a few evaluation images."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from flax import nnx

from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.drawing.curves import draw_curves
from tlvit.drawing.panels import color_of, draw_cells, draw_legend, namer, save
from tlvit.drawing.scenes import draw_scenes
from tlvit.files import as_path
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.records import read_json
from tlvit.training.run_log import read_metrics
from tlvit.types import Array, PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """The classes that a model predicts for the cells of images.

    Attributes:
      title: label of the row.
      probability: float [B, h, w, L], class probabilities of every cell.
      prediction: int [B], class of the image.
    """

    title: str
    probability: np.ndarray
    prediction: np.ndarray


def report(
    workdir: str | pathlib.Path,
    *,
    weights: str = "auto",
    annotator: str | pathlib.Path | None = None,
    baseline: str | pathlib.Path | None = None,
    baseline_name: str = "without token labels",
    count: int = 5,
) -> pathlib.Path:
    """Writes report.png into a workdir.

    Args:
      workdir: folder of a run with at least one checkpoint.
      weights: "ema", "raw" or "auto", as in `tlvit.load`.
      annotator: checkpoint of the annotator, to show its maps above the student's.
      baseline: another workdir, whose accuracy is drawn for comparison.
      baseline_name: what the legend calls it.
      count: number of evaluation images, at least 1.

    Returns:
      The path of report.png.

    Raises:
      ValueError: there is no checkpoint, the data set is missing, or `count` is below 1.
      FileNotFoundError: `workdir` has no config.json, or `baseline` no metrics.jsonl.
      ImportError: matplotlib is missing.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}.")
    if baseline and not (as_path(baseline) / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{baseline} has no metrics.jsonl: it is not the workdir of a run.")
    workdir = as_path(workdir)
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(
            f"{workdir / 'config.json'} does not exist. {workdir} is not the workdir of a run; tlvit predict "
            "--tokens draws the tokens of other checkpoints."
        )
    config = read_json(workdir / "config.json")
    paths = {"annotator": annotator, "student": workdir} if annotator else {"model": workdir}
    loaded = {name: open_checkpoint(path, weights=weights) for name, path in paths.items()}
    info = loaded[list(paths)[-1]].info
    curves = {"this run": read_metrics(workdir)}
    path = workdir / "report.png"
    if config.get("task") == "segmentation":
        if baseline:
            curves["baseline"] = read_metrics(baseline)
        save(draw_scenes(config, loaded[list(paths)[-1]], curves, count), path, dpi=110)
        return path
    images, labels = _test_images(config, info, count)
    views = []
    for name, opened in loaded.items():
        if not opened.model.has_token_head and opened.model.grid is not None:  # tokens without classes
            continue
        if opened.info.image_size != info.image_size:
            opened = open_checkpoint(paths[name], weights=weights, image_size=info.image_size)
        label = f"class of each cell, {name}:\n{opened.section}"
        views.append(class_map(label, opened.model, opened.info, images))
    names = info.class_names
    if baseline:
        curves[baseline_name] = read_metrics(baseline)
    unit = "step" if config.get("steps") else "epoch"
    figure = draw(images, labels, views, curves, unit=unit, class_names=names, title=_title(config, info))
    save(figure, path, dpi=110)
    return path


def class_map(title: str, model: nnx.Module, info: ModelInfo, images: np.ndarray) -> ClassMap:
    """Runs a model with `dense_logits` on uint8 images [B, H, W, 3]."""
    net, params, stats = functionalize(model)

    @jax.jit
    def run(params: PyTree, stats: PyTree, images: Array) -> tuple[Array, Array]:
        images = normalize(images, info.preprocessing.mean, info.preprocessing.std)
        dense = net.bind(params, stats).dense_logits(images)
        return jax.nn.softmax(dense, axis=-1), net.apply(params, stats, images)[0].logits.argmax(-1)

    probability, prediction = run(params, stats, images)
    return ClassMap(title, np.asarray(probability), np.asarray(prediction))


def draw(
    images: np.ndarray,
    labels: np.ndarray,
    views: Sequence[ClassMap],
    curves: dict[str, list[dict[str, float]]],
    *,
    unit: Literal["epoch", "step"] = "epoch",
    class_names: Sequence[str] | None = None,
    title: str = "",
) -> "Figure":
    """Draws the curves and, below them, one column for each image with one row for each ClassMap.

    The legend names the color of each class. A class has the same color in every report.

    Args:
      images: uint8 [B, H, W, 3].
      labels: int [B], class indices.
      views: class maps to draw over the images.
      curves: name of a run -> its lines of metrics, as returned by `read_metrics`.
      unit: of the horizontal axes of the curves.
      class_names: name of each class; None: class indices are shown.
      title: title of the figure.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    name = namer(class_names)
    shown = np.concatenate([labels, *(view.probability.argmax(-1).ravel() for view in views)]).astype(int)
    colors = {int(k): color_of(int(k)) for k in np.unique(shown)}
    rows = 1 + len(views) if views else 0
    figure = Figure(figsize=(12.5, 4.1 + 2.45 * rows + (1 if views else 0)), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    if not rows:
        draw_curves(figure, curves, unit=unit)
        return figure
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.4, 2.45 * rows + 1])[:, 0]
    draw_curves(top, curves, unit=unit)
    axes = bottom.subplots(rows, len(images), squeeze=False)
    side = 72 * min(2.0, 11.5 / len(images))
    for j, image in enumerate(images):
        axes[0, j].imshow(image)
        axes[0, j].set_title(f"class {name(int(labels[j]))}", fontsize=11)
        for i, view in enumerate(views, start=1):
            draw_cells(axes[i, j], image, view.probability[j], colors, name, side=side)
            right = view.prediction[j] == labels[j]
            verdict = f"whole image: {name(int(view.prediction[j]))}{'' if right else ' (wrong)'}"
            axes[i, j].set_xlabel(verdict, fontsize=9, color="0.2" if right else "tab:red")
    for i, text in enumerate(["evaluation images", *[view.title for view in views]]):
        axes[i, 0].set_ylabel(text, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    draw_legend(bottom, shown, colors, name)
    return figure


def _test_images(config: dict[str, Any], info: ModelInfo, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first `count` images of the evaluation split with different classes, and their labels."""
    from tlvit.data.pipeline import eval_batches
    from tlvit.data.sources.open import open_source

    data = config["data"]
    exif = data.get("exif", "auto")
    source = open_source(data["name"], data["eval_split"], data_dir=data["dir"] or None, exif=exif)
    batch = next(iter(eval_batches(source, info, batch_size=min(128, source.num_examples))))
    _, first = np.unique(batch.label[batch.mask], return_index=True)
    chosen = np.sort(first)[:count]
    return batch.image[chosen], batch.label[chosen]


def _title(config: dict[str, Any], info: ModelInfo) -> str:
    if config["token_labels"]:
        return f"{info.model} trained with token labels: every cell has a target of its own"
    return f"{info.model} trained on image labels"
