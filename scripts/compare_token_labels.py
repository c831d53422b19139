"""Compares students that are trained with and without token labels, over several seeds.

    python -m scripts.compare_token_labels --out=runs/compare --seeds 0 1 2 3 4 5 6 7 8 9 --table

Trains the student of configs/digits_small.py in the ways of `ARMS`, all with one annotator, which is trained
first. Runs with the same seed have the same initialization, order of images and crops, so that they are
pairs. Each finished run is a line of --results; lines that are there are not computed again, and an
interrupted run resumes. Prints the table; --table also writes it into docs/results.md.
"""

import argparse
import hashlib
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from configs import digits_small as recipe
from scripts.comparison_table import read_lines, table, write_pages
from tlvit.checkpoints.load import load
from tlvit.config import Config, resolve, to_dict
from tlvit.data.sources import digit_scenes
from tlvit.data.sources.open import open_source
from tlvit.training.annotation import Annotator, annotate
from tlvit.training.loop import train
from tlvit.training.run_log import read_metrics, start_logging

ROOT = pathlib.Path(__file__).parent.parent
LIBRARIES = ("tlvit", "jax", "flax", "optax", "tensorflow-cpu")

# arm -> (variant of the recipe, changes of its settings), in the order in which a seed trains them.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("no_token_labels", {}),
    "aligned": ("token_labels", {}),
    "published_crop": ("token_labels", {"data.label_crop": "published"}),
    "aligned_no_mixtoken": ("token_labels", {"loss.mixtoken": False}),
    "labels_mixed": ("no_token_labels", {"augment.mixup": 0.8, "augment.cutmix": 1.0}),
    "labels_twice": ("no_token_labels", {"epochs": 2 * recipe.EPOCHS}),
    "pooled": ("token_labels", {"loss.dense_weight": 0.0, "loss.cls_target": "annotator"}),
}

# The rows of the table: arm -> what it is.
NAMES = {
    "labels": "image labels only",
    "labels_mixed": "image labels, mixup 0.8 and cutmix 1.0",
    "labels_twice": "image labels only, twice the epochs",
    "pooled": "one target for each crop, pooled from its score map (ReLabel)",
    "published_crop": "token labels, published (transposed) crop",
    "aligned_no_mixtoken": "token labels, aligned, without MixToken",
    "aligned": "**token labels, aligned**",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    out, results = pathlib.Path(options.out).absolute(), pathlib.Path(options.results)
    for folder in (out, results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    start_logging()
    missing = [
        (seed, arm)
        for seed in options.seeds  # seed by seed, so that an interrupted comparison has complete pairs
        for arm in options.arms
        if not finished(read_lines(results), arm, seed, settings_hash(settings(arm, seed, out)))
    ]
    if missing:
        prepare(out)
    for seed, arm in missing:
        record = student(arm, seed, out)
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
    text = table(current_lines(read_lines(results)), NAMES)
    print(f"\n{text}\n")
    if options.table:
        write_pages(text)
    return 0


def current_lines(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records whose settings are those of the recipe as it is."""
    hashes = {arm: settings_hash(settings(arm, 0, pathlib.Path())) for arm in ARMS}
    return [line for line in lines if line["settings"] == hashes.get(line["arm"])]


def settings(arm: str, seed: int, out: pathlib.Path) -> Config:
    """The settings of a run of an arm whose data and score maps are in the folder `out`."""
    variant, changes = ARMS[arm]
    config = recipe.get_config(variant)
    config.seed = seed
    config.data.dir = str(out / "data")
    config.data.score_maps = str(out / "score_maps") if variant == "token_labels" else ""
    config.eval.every_epochs = recipe.EPOCHS // 5
    config.checkpoint.every_epochs = 0
    config.update_from_flattened_dict(changes)
    return resolve(config)


def settings_hash(config: Config) -> str:
    """Eight hex digits of a run's settings, its annotator's and the scenes, without the seed and folders.

    Settings that have their defaults are left out, so that a new setting changes no hash.
    """
    annotator = resolve(recipe.get_config("annotator")) if config.token_labels else None
    parts = [_changed(config), _changed(annotator) if annotator else {}, recipe.SCENES, recipe.TOP_K]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _changed(config: Config) -> dict[str, Any]:
    """Name -> value of the settings that do not have their defaults, without the seed and folders."""
    values, defaults = to_dict(config), to_dict(Config())
    flat = lambda tree: {
        f"{section}.{name}": value
        for section, part in tree.items()
        for name, value in (part.items() if isinstance(part, dict) else [("", part)])
    }
    ignored = ("seed.", "data.dir", "data.score_maps")
    changed = {k: v for k, v in flat(values).items() if v != flat(defaults)[k] and k not in ignored}
    return dict(sorted(changed.items()))


def finished(lines: Sequence[Mapping[str, Any]], arm: str, seed: int, settings: str) -> bool:
    """Whether the results have the run."""
    wanted = {"arm": arm, "seed": seed, "settings": settings}
    return any(wanted.items() <= line.items() for line in lines)


def prepare(out: pathlib.Path) -> None:
    """Draws the scenes, trains the annotator and writes the score maps of the training scenes."""
    digit_scenes.prepare(out / "data", **recipe.SCENES)
    config = recipe.get_config("annotator")
    config.data.dir = str(out / "data")
    if not train(resolve(config), out / "annotator").finished:
        sys.exit(75)
    model, info = load(out / "annotator")
    source = open_source("digits", "train", data_dir=str(out / "data"))
    annotate(Annotator(model, info), source, out / "score_maps", top_k=recipe.TOP_K)


def student(arm: str, seed: int, out: pathlib.Path) -> dict[str, Any]:
    """Trains a student and returns its line of the results."""
    config = settings(arm, seed, out)
    workdir = out / f"{arm}_seed{seed}_{settings_hash(config)}"
    clock, cpu = time.perf_counter(), time.process_time()
    result = train(config, workdir)
    if not result.finished:
        sys.exit(75)
    steps = next(
        line["step"] / line["train/epoch"] for line in read_metrics(workdir) if "train/epoch" in line
    )
    curve = [
        [round(line["step"] / steps, 2), line["eval/raw_top1"], line["eval/ema_top1"]]
        for line in read_metrics(workdir)
        if "eval/raw_top1" in line
    ]
    return {
        "arm": arm,
        "seed": seed,
        "settings": settings_hash(config),
        "ema_top1": result.metrics["eval/ema_top1"],
        "raw_top1": result.metrics["eval/raw_top1"],
        "annotator_top1": _final_top1(out / "annotator") if config.token_labels else None,
        "curve": curve,  # [epoch, raw top-1, EMA top-1]
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _final_top1(workdir: pathlib.Path) -> float:
    """The top-1 of the averaged weights at the end of a run, in percent."""
    return [line["eval/ema_top1"] for line in read_metrics(workdir) if "eval/ema_top1" in line][-1]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_token_labels",
        description="Compares students that are trained with and without token labels, over several seeds.",
        epilog="example:\n  python -m scripts.compare_token_labels --out=runs/compare --seeds 0 1 2 --table",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="runs/compare", metavar="FOLDER", help="folder of all runs (default: %(default)s)")
    add("--results", default=str(ROOT / "docs/results/token_labels.jsonl"), metavar="FILE",
        help="JSON lines of the finished runs (default: docs/results/token_labels.jsonl)")  # fmt: skip
    add("--seeds", type=int, nargs="*", default=list(range(10)), metavar="SEED", help="default: 0 to 9")
    add("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM",
        help="default: all, " + " ".join(ARMS))  # fmt: skip
    add("--table", action="store_true", help="write the table into docs/results.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
