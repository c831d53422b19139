"""Compares students that are trained with and without token labels, over several seeds.

    python -m scripts.compare_token_labels --out=runs/compare --seeds 0 1 2

Trains the student of configs/digits.py in three ways with the same budget: on image labels alone, with score
maps that are cropped as in the published code (transposed), and with aligned score maps. All use one
annotator, which is trained first. Finished runs are not repeated. Prints a table of the top-1 accuracy on the
test scenes with mean and standard deviation over the seeds.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence

from configs import digits as recipe
from scripts.demo import annotate_training_scenes, run
from tlvit.data.sources import digit_scenes
from tlvit.training.run_log import start_logging

VARIANTS = {
    "no token labels": ("no_token_labels", {}),
    "token labels, published (transposed) crop": ("token_labels", {"data.label_crop": "published"}),
    "token labels, aligned": ("token_labels", {}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    out = pathlib.Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    start_logging()
    digit_scenes.prepare(out / "data", **recipe.SCENES)
    annotator = run("annotator", out / "annotator", out, epochs=options.epochs)
    annotate_training_scenes(out)
    results: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:  # seed by seed, so that an interrupted comparison has complete seeds
        for variant, (name, changes) in VARIANTS.items():
            workdir = out / f"{variant.replace(' ', '_').replace(',', '')}_seed{seed}"
            metrics = run(name, workdir, out, epochs=options.epochs, seed=seed, changes=changes)
            results.setdefault(variant, []).append(metrics)
        print(table(results, annotator), flush=True)
    record = {"seeds": options.seeds, "annotator": annotator, **results}
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0


def table(results: dict[str, list[dict[str, float]]], annotator: dict[str, float]) -> str:
    """Returns a markdown table: the top-1 of every seed, mean and standard deviation of each variant."""
    lines = [
        "",
        "| student trained with | top-1 of each seed, % | mean ± standard deviation |",
        "|---|---|---|",
    ]
    for variant, runs in results.items():
        top = [metrics["eval/ema_top1"] for metrics in runs]
        spread = f" ± {statistics.stdev(top):.1f}" if len(top) > 1 else ""
        lines.append(
            f"| {variant} | {' / '.join(f'{t:.1f}' for t in top)} | {statistics.mean(top):.1f}{spread} |"
        )
    images, best = annotator["eval/images"], annotator["eval/ema_top1"]
    note = f"Averaged weights, {images:.0f} test scenes; the annotator has {best:.1f} %."
    return "\n".join([*lines, "", note, ""])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_token_labels",
        description="Compares students that are trained with and without token labels, over several seeds.",
        epilog="example:\n  python -m scripts.compare_token_labels --out=runs/compare --seeds 0 1 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="runs/compare", metavar="FOLDER", help="folder of all runs (default: runs/compare)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    add("--epochs", type=int, metavar="N", help="epochs of each training (default: the recipe's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
