"""Draws report.png of a run: its curves, and what annotator and student see in every cell of a few test
images.

python -m tlvit.visualize WORKDIR [--annotator=PATH]
"""

import argparse
import dataclasses
import json
import logging
import math
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.training.run_log import read_journal, start_logging
from tlvit.types import Array

log = logging.getLogger("tlvit")


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """A model's view of images, cell by cell.

    Attributes:
      title: of the row.
      probability: float [B, h, w, L].
      prediction: int [B], the class of the whole image.
    """

    title: str
    probability: np.ndarray
    prediction: np.ndarray


def report(
    workdir: str | pathlib.Path,
    *,
    annotator: str | pathlib.Path | None = None,
    count: int = 5,
    baseline: str | pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes report.png into a workdir.

    Args:
      workdir: of a run with at least one checkpoint.
      annotator: checkpoint of the annotator, to show its maps beside the student's.
      count: test images shown.
      baseline: another workdir, whose accuracy is drawn for comparison.

    Returns:
      The file.

    Raises:
      ValueError: there is no checkpoint, or the data set is gone.
      ImportError: matplotlib is missing.
    """
    workdir = pathlib.Path(workdir)
    config = json.loads((workdir / "config.json").read_text())
    paths = {"annotator": annotator, "student": workdir} if annotator else {"model": workdir}
    loaded = {name: load(path) for name, path in paths.items()}
    info = loaded[list(paths)[-1]][1]
    images, labels = _test_images(config, info, count)
    views = []
    for name, (model, own) in loaded.items():
        if not hasattr(model, "dense_logits") or getattr(model, "aux_head", True) is None:
            continue  # it has no token head, and so no view of its own on a cell
        if own.image_size != info.image_size:
            model, own = load(paths[name], image_size=info.image_size)
        views.append(class_map(f"what the {name}\nsees in each cell", model, own, images))
    names = info.class_names
    curves = {"this run": read_journal(workdir)}
    if baseline:
        curves["without token labels"] = read_journal(baseline)
    figure = draw(images, labels, views, curves, class_names=names, title=_title(config, info))
    path = workdir / "report.png"
    figure.savefig(path, dpi=110)
    return path


def class_map(title: str, model: nnx.Module, info: ModelInfo, images: np.ndarray) -> ClassMap:
    """Runs a model with `dense_logits` on uint8 images [B, H, W, 3]."""
    net, params, stats = functionalize(model)

    @jax.jit
    def run(params, stats, images):
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
    class_names: Sequence[str] | None = None,
    title: str = "",
):
    """The figure: curves above, below a column an image with one row for each ClassMap.

    Args:
      images: uint8 [B, H, W, 3].
      labels: int [B].
      views: what to draw over the images.
      curves: name of a run -> its journal.
      class_names: one a class; numbers if not given.
      title: over everything.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    name = lambda k: str(class_names[k]) if class_names else str(k)
    seen = {int(c) for view in views for c in np.unique(view.probability.argmax(-1))}
    colors = _colors(sorted(seen | {int(k) for k in labels}))
    rows = 1 + len(views) if views else 0
    figure = Figure(figsize=(12.5, 4.1 + 2.45 * rows), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.4, 2.45 * rows]) if rows else (figure, None)
    _draw_curves(top, curves)
    if not rows:
        return figure
    axes = bottom.subplots(rows, len(images), squeeze=False)
    for j, image in enumerate(images):
        axes[0, j].imshow(image)
        axes[0, j].set_title(f"class {name(int(labels[j]))}", fontsize=11)
        for i, view in enumerate(views, start=1):
            _draw_map(axes[i, j], image, view.probability[j], colors, name)
            right = view.prediction[j] == labels[j]
            verdict = f"whole image: {name(int(view.prediction[j]))}{'' if right else ' (wrong)'}"
            axes[i, j].set_xlabel(verdict, fontsize=9, color="0.2" if right else "tab:red")
    for i, text in enumerate(["test images", *[view.title for view in views]]):
        axes[i, 0].set_ylabel(text, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def _draw_map(axis, image: np.ndarray, probability: np.ndarray, colors: dict[int, Array], name) -> None:
    """Every cell in the color of its most likely class, the stronger the surer, with the class written into
    sure cells."""
    height, width = image.shape[:2]
    best, sure = probability.argmax(-1), probability.max(-1)
    chance = 1 / probability.shape[-1]
    strength = np.sqrt(np.clip((sure - chance) / (1 - chance), 0, 1))  # half sure is seen well already
    axis.imshow(image.mean(-1), cmap="gray", vmin=-60, vmax=320)
    paint = np.zeros((*best.shape, 4))
    for k in np.unique(best):
        paint[best == k, :3] = colors[int(k)]
    paint[..., 3] = 0.75 * strength
    axis.imshow(paint, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    h, w = best.shape
    for y, x in zip(*np.nonzero(strength > 0.5), strict=True):
        place = ((x + 0.5) * width / w - 0.5, (y + 0.5) * height / h - 0.5)
        text = {"fontsize": max(5, 54 / max(h, w)), "color": "white", "fontweight": "bold"}
        axis.text(*place, name(int(best[y, x]))[:6], ha="center", va="center", **text)


def _draw_curves(figure, curves: dict[str, list[dict[str, float]]]) -> None:
    losses, accuracy = figure.subplots(1, 2)
    for i, (run, lines) in enumerate(curves.items()):
        color = f"C{i}"
        train = [(line["train/epoch"], line["train/loss"]) for line in lines if "train/loss" in line]
        if train and i == 0:
            losses.plot(*zip(*train, strict=True), marker="." if len(train) < 50 else None, color=color)
        epoch = {line["step"]: line["train/epoch"] for line in lines if "train/epoch" in line}
        for kind, style in (("ema", "-"), ("raw", ":")):
            key = f"eval/{kind}_top1"
            points = [(epoch.get(line["step"], math.nan), line[key]) for line in lines if key in line]
            if points:
                label = f"{run}, {'averaged' if kind == 'ema' else 'raw'} weights: {points[-1][1]:.1f} %"
                accuracy.plot(*zip(*points, strict=True), style, marker=".", color=color, label=label)
    losses.set(title="training loss", xlabel="epoch")
    accuracy.set(title="top-1 accuracy on the test images, %", xlabel="epoch")
    if accuracy.lines:
        accuracy.legend(fontsize=8, loc="lower right")
    for axis in (losses, accuracy):
        axis.grid(alpha=0.3)


def _colors(classes: Sequence[int]) -> dict[int, Array]:
    from matplotlib import colormaps

    table = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    return {k: np.array(table(i % table.N)[:3]) for i, k in enumerate(classes)}


def _test_images(config: dict, info: ModelInfo, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of the evaluation split, one a class as far as they go."""
    from tlvit.data import pipeline
    from tlvit.data.sources import tfds as sources

    data = config["data"]
    source = sources.open_source(data["name"], data["eval_split"], data_dir=data["dir"] or None)
    batches = pipeline.eval_batches(
        source,
        batch_size=min(128, source.num_examples),
        image_size=info.image_size,
        crop_pct=info.preprocessing.crop_pct,
    )
    batch = next(iter(batches))
    _, first = np.unique(batch.label[batch.mask], return_index=True)
    chosen = np.sort(first)[:count]
    return batch.image[chosen], batch.label[chosen]


def _title(config: dict, info: ModelInfo) -> str:
    if config["token_labels"]:
        return f"{info.model} trained with token labels: every cell has a target of its own"
    return f"{info.model} trained on image labels"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tlvit.visualize", description="Draw report.png of a run."
    )
    parser.add_argument("workdir")
    parser.add_argument("--annotator", help="its checkpoint, to show its maps too")
    parser.add_argument("--baseline", help="workdir of a run to compare the curves with")
    parser.add_argument("--count", type=int, default=5, help="test images shown")
    options = parser.parse_args(arguments)
    start_logging()
    try:
        path = report(
            options.workdir, annotator=options.annotator, baseline=options.baseline, count=options.count
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        log.error("%s", error)
        return 1
    log.info("drawn: %s", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
