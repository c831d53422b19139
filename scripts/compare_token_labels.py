"""Compares training with and without token labels, aligned and with the published crop.

    python -m scripts.compare_token_labels --out runs/compare --seeds 0 1 2

Trains the student of configs/digits.py in three ways with the same budget: on image labels, with score maps
cropped as in the published code (transposed), and with aligned score maps. All use one annotator, which is
trained first. Finished runs are not repeated. Prints a table of top-1 accuracy on the test scenes with mean
and standard deviation over the seeds.
"""

import argparse
import json
import pathlib
import statistics
import sys

from configs import digits as recipe
from scripts.demo import annotate_training_scenes, run
from tlvit.data.sources import digit_scenes
from tlvit.training.run_log import start_logging

RUNS = {
    "no token labels": ("no_token_labels", {}),
    "token labels, published (transposed) crop": ("token_labels", {"data.label_crop": "published"}),
    "token labels, aligned": ("token_labels", {}),
}


def main() -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="epochs of every training; the recipe's by default")
    options = parser.parse_args()
    out = pathlib.Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    start_logging()
    digit_scenes.prepare(out / "data", **recipe.SCENES)
    annotator = run("annotator", out / "annotator", out, epochs=options.epochs)
    annotate_training_scenes(out)
    results: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:  # an interrupted comparison has complete seeds
        for title, (variant, changes) in RUNS.items():
            workdir = out / f"{title.replace(' ', '_').replace(',', '')}_seed{seed}"
            metrics = run(variant, workdir, out, epochs=options.epochs, seed=seed, changes=changes)
            results.setdefault(title, []).append(metrics)
        print(table(results, annotator), flush=True)
    record = {"seeds": options.seeds, "annotator": annotator, **results}
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0


def table(results: dict[str, list[dict[str, float]]], annotator: dict[str, float]) -> str:
    """Markdown table of top-1 accuracy: every seed, mean and standard deviation."""
    lines = [
        "",
        "| student trained with | top-1 of each seed, % | mean ± standard deviation |",
        "|---|---|---|",
    ]
    for title, runs in results.items():
        top = [metrics["eval/ema_top1"] for metrics in runs]
        spread = f" ± {statistics.stdev(top):.1f}" if len(top) > 1 else ""
        lines.append(
            f"| {title} | {' / '.join(f'{t:.1f}' for t in top)} | {statistics.mean(top):.1f}{spread} |"
        )
    images, best = annotator["eval/images"], annotator["eval/ema_top1"]
    note = f"Averaged weights, {images:.0f} test scenes; the annotator has {best:.1f} %."
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    sys.exit(main())
