"""Draws report.png of a run: its curves, and the class of every token of some test images.

python -m tlvit.visualize --checkpoint=/runs/student --annotator=/runs/annotator
"""

import argparse
import colorsys
import dataclasses
import json
import logging
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.training.run_log import read_metrics, start_logging
from tlvit.types import Array

log = logging.getLogger("tlvit")


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """The classes that a model predicts for the tokens of some images.

    Attributes:
      title: title of the row in the figure.
      probability: float [B, h, w, L], class probabilities of every token.
      prediction: int [B], the predicted class of the image.
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
      workdir: workdir of a run with at least one checkpoint.
      annotator: checkpoint of the annotator, to show its score maps as well.
      count: number of test images.
      baseline: workdir of another run, whose accuracy is drawn for comparison.

    Returns:
      The path of the file.

    Raises:
      ValueError: there is no checkpoint, or the data set does not exist any more.
      ImportError: matplotlib is not installed.
    """
    workdir = pathlib.Path(workdir)
    config = json.loads((workdir / "config.json").read_text())
    paths = {"annotator": annotator, "student": workdir} if annotator else {"model": workdir}
    loaded = {name: load(path) for name, path in paths.items()}
    info = loaded[list(paths)[-1]][1]
    images, labels = _test_images(config, info, count)
    views = []
    for name, (model, own) in loaded.items():
        if not model.has_dense_logits:
            continue
        if own.image_size != info.image_size:
            model, own = load(paths[name], image_size=info.image_size)
        views.append(class_map(f"classes of the cells,\n{name}", model, own, images))
    names = info.class_names
    curves = {"this run": read_metrics(workdir)}
    if baseline:
        curves["without token labels"] = read_metrics(baseline)
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
) -> Any:
    """Makes the figure: curves at the top, below them a column for each image and a row for each ClassMap.

    Args:
      images: uint8 [B, H, W, 3].
      labels: int [B].
      views: the rows.
      curves: name of a run -> the lines of its metrics.jsonl.
      class_names: None: class indices.
      title: title of the figure.

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


def draw_tokens(image: Image.Image, tokens: np.ndarray, names: Sequence[str] | None = None) -> Image.Image:
    """Draws the image, and next to it the image under the classes of its tokens.

    The color is the class and its opacity the probability. The most frequent classes are named below.

    Args:
      image: the image as the model sees it.
      tokens: [h, w, L], probabilities.
      names: class names; None: their indices.
    """
    zoom = max(1, round(384 / max(image.size)))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
    classes, strength = tokens.argmax(-1), tokens.max(-1)
    order, counts = np.unique(classes, return_counts=True)
    order = order[np.argsort(-counts, kind="stable")]
    color = {int(c): _distinct_color(i) for i, c in enumerate(order)}
    colors = np.array([[color[int(c)] for c in row] for row in classes], np.uint8)
    enlarge = lambda cells: Image.fromarray(cells).resize(image.size, Image.Resampling.NEAREST)
    flat, alpha = enlarge(colors), enlarge((70 + 130 * strength).astype(np.uint8))
    shown = [int(c) for c in order[:8]]
    canvas = Image.new("RGB", (2 * image.width + 8, image.height + 8 + 16 * len(shown)), "white")
    canvas.paste(image, (0, 0))
    canvas.paste(Image.composite(flat, image, alpha), (image.width + 8, 0))
    draw = ImageDraw.Draw(canvas)
    for i, c in enumerate(shown):
        y, cells = image.height + 8 + 16 * i, int((classes == c).sum())
        draw.rectangle((4, y, 16, y + 12), fill=color[c])
        draw.text((22, y), f"{names[c] if names else c}: {cells} of {classes.size} tokens", fill="black")
    return canvas


def _draw_map(
    axis: Any,
    image: np.ndarray,
    probability: np.ndarray,
    colors: dict[int, Array],
    name: Callable[[int], str],
) -> None:
    """Draws every cell in the color of its most probable class, with opacity for the probability, and writes
    the class into cells with a high probability."""
    height, width = image.shape[:2]
    best, sure = probability.argmax(-1), probability.max(-1)
    chance = 1 / probability.shape[-1]
    strength = np.sqrt(np.clip((sure - chance) / (1 - chance), 0, 1))
    axis.imshow(image.mean(-1), cmap="gray", vmin=-60, vmax=320)
    paint = np.zeros((*best.shape, 4))
    for k in np.unique(best):
        paint[best == k, :3] = colors[int(k)]
    paint[..., 3] = 0.75 * strength
    axis.imshow(paint, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    h, w = best.shape
    for y, x in zip(*np.nonzero(strength > 0.5), strict=True):
        center = ((x + 0.5) * width / w - 0.5, (y + 0.5) * height / h - 0.5)
        text = {"fontsize": max(5, 54 / max(h, w)), "color": "white", "fontweight": "bold"}
        axis.text(*center, name(int(best[y, x]))[:6], ha="center", va="center", **text)


def _draw_curves(figure: Any, curves: dict[str, list[dict[str, float]]]) -> None:
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


def _distinct_color(i: int) -> tuple[int, int, int]:
    """Color i of a series in which neighbors differ: the hue advances by the golden ratio."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb((0.02 + 0.618034 * i) % 1, 0.85, 0.95))


def _test_images(config: dict, info: ModelInfo, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first image of each class in the first batch of the evaluation split."""
    from tlvit.data.pipeline import eval_batches
    from tlvit.data.sources.open import open_source

    data = config["data"]
    source = open_source(data["name"], data["eval_split"], data_dir=data["dir"] or None)
    batch = next(iter(eval_batches(source, info, batch_size=min(128, source.num_examples))))
    _, first = np.unique(batch.label[batch.mask], return_index=True)
    chosen = np.sort(first)[:count]
    return batch.image[chosen], batch.label[chosen]


def _title(config: dict, info: ModelInfo) -> str:
    if config["token_labels"]:
        return f"{info.model} trained with token labels"
    return f"{info.model} trained on image labels"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "tlvit visualize",
        description="Draw report.png of a run: its curves, and the class of every token of some test images.",
        epilog="example:\n  tlvit visualize --checkpoint=/runs/student --annotator=/runs/annotator",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="workdir of the run")
    add("--annotator", metavar="CHECKPOINT", help="also show what the annotator sees in every cell")
    add("--baseline", metavar="WORKDIR", help="run whose accuracy is drawn for comparison")
    add("--count", type=int, default=5, help="number of test images (5)")
    options = parser.parse_args(arguments)
    start_logging()
    try:
        path = report(
            options.checkpoint, annotator=options.annotator, baseline=options.baseline, count=options.count
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        log.error("%s", error)
        return 1
    log.info("drew %s", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
