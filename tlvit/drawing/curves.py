"""Draws the curves of runs: training loss, and the metric of their evaluations."""

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


def draw_curves(
    figure: "FigureBase",
    curves: dict[str, list[dict[str, float]]],
    *,
    unit: Literal["epoch", "step"] = "epoch",
    metric: str = "top1",
    title: str = "top-1 accuracy on the evaluation images, %",
) -> None:
    """Draws the training loss of the first run, and a metric of the evaluations of every run.

    Args:
      figure: a figure without axes.
      curves: name of a run -> its lines of metrics, as returned by `read_metrics`.
      unit: of the horizontal axes: "step" for a run whose length is given in steps.
      metric: "top1", "miou", …
      title: of the metric.
    """
    losses, accuracy = figure.subplots(1, 2)
    for i, (run, lines) in enumerate(curves.items()):
        color = f"C{i}"
        time = "step" if unit == "step" else "train/epoch"
        at = {line["step"]: line[time] for line in lines if time in line}
        train = [(at[line["step"]], line["train/loss"]) for line in lines if "train/loss" in line]
        if train and i == 0:
            losses.plot(*zip(*train, strict=True), marker="." if len(train) < 50 else None, color=color)
        for kind, style in (("ema", "-"), ("raw", ":")):
            key = f"eval/{kind}_{metric}"
            points = [(at.get(line["step"], math.nan), line[key]) for line in lines if key in line]
            if points:
                words = "averaged (EMA)" if kind == "ema" else "not averaged (raw)"
                label = f"{run}, weights {words}: {points[-1][1]:.1f} %"
                accuracy.plot(*zip(*points, strict=True), style, marker=".", color=color, label=label)
    losses.set(title="training loss", xlabel=unit)
    accuracy.set(title=title, xlabel=unit)
    if accuracy.lines:
        accuracy.legend(fontsize=8)
    for axis in (losses, accuracy):
        axis.grid(alpha=0.3)
