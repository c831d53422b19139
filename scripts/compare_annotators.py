"""Compares students whose score maps are from annotators of different accuracy.

    python -m scripts.compare_annotators --out=runs/annotators --epochs=40

Trains the annotator of configs/digits.py once and evaluates it after every epoch. The epochs whose accuracy
is closest to each of --targets are the annotators; every one of them scores the training scenes. On each
folder of score maps two students are trained with the same budget: one whose class token learns the
annotator's target (loss.cls_target="annotator") and one whose class token learns the label ("label"). The
last student has no token labels. Each finished student is a line of --results; lines that are there are not
computed again, and an interrupted run resumes. Prints a table.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from configs import digits as recipe
from scripts.demo import run
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import restore_for_inference
from tlvit.data.sources import digit_scenes
from tlvit.data.sources.open import open_source
from tlvit.models.functional import update
from tlvit.training.annotation import annotate
from tlvit.training.device_scorer import Annotator
from tlvit.training.run_log import read_metrics, start_logging

CLS_TARGETS = ("annotator", "label")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    out, results = pathlib.Path(options.out).absolute(), pathlib.Path(options.results)
    for folder in (out, results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    start_logging()
    digit_scenes.prepare(out / "data", **recipe.SCENES)
    if not options.trained:
        every_epoch = {"eval.every_epochs": 1, "checkpoint.every_epochs": 1, "checkpoint.keep": 1000}
        budget = {"epochs": options.annotator_epochs, "seed": options.seed}
        run("annotator", out / "annotator", out, **budget, changes=every_epoch, recipe=recipe)
    accuracy = {
        int(line["step"]): line["eval/ema_top1"]
        for line in read_metrics(out / "annotator")
        if "eval/ema_top1" in line
    }
    arms: list[dict[str, Any]] = []
    for target in options.targets:
        step = closest_step(accuracy, target)
        same = {"annotator_step": step, "annotator_top1": accuracy[step]}
        arms += [{**same, "cls_target": cls_target} for cls_target in CLS_TARGETS]
    arms.append({"annotator_step": 0, "annotator_top1": None, "cls_target": "label"})
    for arm in arms:
        record = {**arm, "epochs": options.epochs, "seed": options.seed}
        if not any(record.items() <= line.items() for line in _lines(results)):
            metrics = _student(record, out)
            with results.open("a") as file:
                file.write(json.dumps({**record, **metrics}) + "\n")
        print(table(_lines(results), options.epochs), flush=True)
    return 0


def closest_step(accuracy: Mapping[int, float], target: float) -> int:
    """The first step whose accuracy is closest to a target, both in percent."""
    return min(sorted(accuracy), key=lambda step: abs(accuracy[step] - target))


def table(lines: Sequence[Mapping[str, Any]], epochs: int) -> str:
    """A markdown table: one row for each annotator, the top-1 of its students in the columns."""
    lines = [line for line in lines if line["epochs"] == epochs]
    rows: dict[float | None, dict[str, float]] = {}
    for line in lines:
        rows.setdefault(line["annotator_top1"], {})[line["cls_target"]] = line["ema_top1"]
    head = ["", "| annotator, top-1 | " + " | ".join(f'cls_target="{c}"' for c in CLS_TARGETS) + " |"]
    head.append("|---|" + "---|" * len(CLS_TARGETS))
    body = []
    for accuracy, found in sorted(rows.items(), key=lambda row: row[0] or 0.0):
        name = "none: image labels only" if accuracy is None else f"{accuracy:.1f}"
        cells = [f"{found[c]:.1f}" if c in found else "" for c in CLS_TARGETS]
        body.append(f"| {name} | {' | '.join(cells)} |")
    note = f"Top-1 of the students in percent, averaged weights, {epochs} epochs, one seed."
    return "\n".join([*head, *body, "", note, ""])


def _student(record: Mapping[str, Any], out: pathlib.Path) -> dict[str, float]:
    """Trains the student of an arm and returns its accuracy."""
    step, cls_target = record["annotator_step"], record["cls_target"]
    variant: str = "no_token_labels"
    changes: dict[str, Any] = {"eval.every_epochs": 0}  # only the end
    if step:
        maps = out / f"score_maps_{step}"
        _annotate(out, step, maps)
        variant = "token_labels"
        changes |= {"data.score_maps": str(maps), "loss.cls_target": cls_target}
    workdir = out / f"student_{step}_{cls_target}_{record['epochs']}"
    epochs, seed = record["epochs"], record["seed"]
    metrics = run(variant, workdir, out, epochs=epochs, seed=seed, changes=changes, recipe=recipe)
    return {"ema_top1": metrics["eval/ema_top1"], "raw_top1": metrics["eval/raw_top1"]}


def _annotate(out: pathlib.Path, step: int, folder: pathlib.Path) -> None:
    """Writes the score maps of the training scenes with the averaged weights of a step of the annotator."""
    params, stats, record = restore_for_inference(out / "annotator", weights="ema", step=step)
    info = ModelInfo.from_json(record, "The annotator")
    model = info.build()
    update(model, params, stats)
    source = open_source("digits", "train", data_dir=str(out / "data"))
    annotate(Annotator(model, info), source, folder, top_k=recipe.TOP_K)


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_annotators",
        description="Compares students whose score maps are from annotators of different accuracy.",
        epilog="example:\n  python -m scripts.compare_annotators --out=runs/annotators --epochs=40",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--out", default="runs/annotators", metavar="FOLDER", help="folder of all runs (default: %(default)s)"
    )
    add("--results", default="docs/results/annotators.jsonl", metavar="FILE",
        help="JSON lines of the finished students (default: %(default)s)")  # fmt: skip
    add("--targets", type=float, nargs="+", default=[60.0, 80.0, 90.0, 95.0], metavar="PERCENT",
        help="accuracies at which the annotator is stopped (default: 60 80 90 95)")  # fmt: skip
    add(
        "--trained",
        action="store_true",
        help="take the annotator's checkpoints that are there, train no more",
    )
    add("--epochs", type=int, default=40, metavar="N", help="epochs of each student (default: %(default)s)")
    add("--annotator-epochs", type=int, metavar="N", help="epochs of the annotator (default: the recipe's)")
    add("--seed", type=int, default=0, metavar="SEED", help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
