"""Draws learning_curves.png from the stored results of scripts/compare_token_labels.py.

python docs/images/draw_learning_curves.py docs/images/learning_curves.png
"""

import pathlib
import sys

import matplotlib
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from scripts.compare_token_labels import current_lines  # noqa: E402
from scripts.comparison_arms import ARMS, STUDIES  # noqa: E402
from scripts.comparison_table import read_lines  # noqa: E402


def main(path: str) -> None:
    """Draws a line for each arm of two studies: the mean over its seeds, and every seed as a thin line."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    arms = {arm: None for name in ("main", "baselines") for arm in STUDIES[name].arms}
    lines = current_lines(read_lines(ROOT / "docs/results/token_labels.jsonl"))
    figure, axis = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    for i, arm in enumerate(arms):
        curves = [np.array(line["curve"]) for line in lines if line["arm"] == arm]
        if not curves:
            continue
        for curve in curves:
            axis.plot(curve[:, 0], curve[:, 2], color=f"C{i}", lw=0.6, alpha=0.4)
        mean = np.mean(curves, axis=0)
        label = f"{ARMS[arm].words} (n = {len(curves)})"
        axis.plot(mean[:, 0], mean[:, 2], color=f"C{i}", lw=2, marker=".", label=label)
    axis.set(xlabel="epoch", ylabel="top-1 on the test scenes, averaged weights, %")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
