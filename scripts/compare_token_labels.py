"""Compares ways of training a student on scenes of digits, over several seeds.

    python -m scripts.compare_token_labels --out=runs/compare --studies main alignment --table

Trains the arms of the studies of scripts/comparison_arms.py. Runs with the same seed have the same
initialization, order of images and crops, so that they are pairs. One annotator, which is trained first,
makes the score maps of all students; the study "annotators" stops it early. Each finished run is a line of
--results; lines that are there are not computed again, and an interrupted run resumes. Prints a table for
each study; --table also writes them into README.md and docs/results.md.
"""

import argparse
import functools
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

from configs import digits_segmentation, digits_small
from scripts.comparison_arms import ARMS, SEGMENTATION, STUDIES, TOKENS, Arm
from scripts.comparison_table import PAGES, read_lines, table, write_tables
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.native import restore_for_inference
from tlvit.config import Config, resolve, to_dict
from tlvit.data.sources import digit_scenes
from tlvit.data.sources.open import open_source
from tlvit.models.functional import update
from tlvit.training.annotation import Annotator, annotate
from tlvit.training.loop import train
from tlvit.training.run_log import read_metrics, start_logging

ROOT = pathlib.Path(__file__).parent.parent
LIBRARIES = ("tlvit", "jax", "flax", "optax", "tensorflow-cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    out, results = pathlib.Path(options.out).absolute(), pathlib.Path(options.results)
    for folder in (out, results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    start_logging()
    for arm, seed in _runs(options):
        if finished(read_lines(results), arm, seed, settings_hash(arm)):
            continue
        record = student(arm, seed, out)
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
    lines = current_lines(read_lines(results))
    tables = {name: table(lines, study, ARMS) for name, study in STUDIES.items()}
    for name in options.studies:
        print(f"\n{name}\n\n{tables[name]}\n")
    if options.table:
        for page, names in PAGES.items():
            write_tables({name: tables[name] for name in names}, page)
    return 0


def _runs(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(arm, seed) of the studies, seed by seed, so that an interrupted study has complete pairs."""
    runs: dict[tuple[str, int], None] = {}
    for name in options.studies:
        study = STUDIES[name]
        for seed in range(study.seeds) if options.seeds is None else options.seeds:
            for arm in study.arms:
                if ARMS[arm].start:
                    runs[ARMS[arm].start, seed] = None
                runs[arm, seed] = None
    return [(arm, seed) for arm, seed in runs if not options.arms or arm in options.arms]


def current_lines(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records whose settings are those of the recipe as it is."""
    hashes = {arm: settings_hash(arm) for arm in ARMS}
    return [line for line in lines if line["settings"] == hashes.get(line["arm"])]


def settings(arm: str, seed: int, out: pathlib.Path) -> Config:
    """The settings of a run of an arm. Its data, annotator and score maps are in the folder `out`."""
    how = ARMS[arm]
    if how.variant == SEGMENTATION:
        config = digits_segmentation.get_config()
    else:
        config = digits_small.get_config(how.variant)
        config.eval.every_epochs = digits_small.EPOCHS // 10
        config.checkpoint.every_epochs = 0
    config.seed = seed
    config.data.dir = str(_data(how, out))
    config.update_from_flattened_dict(dict(how.changes))
    if how.variant == TOKENS:
        config.data.score_maps = str(_score_maps(how, out))
    if how.teacher:
        config.distill.teacher = str(out / "annotator")
    if how.start:
        config.model.init_from = str(workdir(how.start, seed, out))
    return resolve(config)


def settings_hash(arm: str) -> str:
    """Eight hex digits of an arm: its settings, those of what it starts or learns from, and the scenes.

    Seed, folders and settings that have their defaults are left out, so that a new setting changes no hash.
    """
    how = ARMS[arm]
    annotator = resolve(digits_small.get_config("annotator"))
    learns_from_it = how.variant == TOKENS or how.teacher
    parts = [
        _changed(settings(arm, 0, pathlib.Path())),
        [_changed(annotator), how.annotator] if learns_from_it else [],
        settings_hash(how.start) if how.start else "",
        {**digits_small.SCENES, "size": how.scene_size},
        digits_small.TOP_K,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _changed(config: Config) -> dict[str, Any]:
    """Name -> value of the settings that do not have their defaults, without the seed and folders."""
    values, defaults = to_dict(config), to_dict(Config())
    flat = lambda tree: {
        f"{section}.{name}": value
        for section, part in tree.items()
        for name, value in (part.items() if isinstance(part, dict) else [("", part)])
    }
    ignored = ("seed.", "data.dir", "data.score_maps", "distill.teacher", "model.init_from")
    changed = {k: v for k, v in flat(values).items() if v != flat(defaults)[k] and k not in ignored}
    return dict(sorted(changed.items()))


def workdir(arm: str, seed: int, out: pathlib.Path) -> pathlib.Path:
    """The folder of a run."""
    return out / f"{arm}_seed{seed}_{settings_hash(arm)}"


def finished(lines: Sequence[Mapping[str, Any]], arm: str, seed: int, settings: str) -> bool:
    """Whether the results have the run."""
    wanted = {"arm": arm, "seed": seed, "settings": settings}
    return any(wanted.items() <= line.items() for line in lines)


def student(arm: str, seed: int, out: pathlib.Path) -> dict[str, Any]:
    """Trains a student and returns its line of the results."""
    how, config = ARMS[arm], settings(arm, seed, out)
    digit_scenes.prepare(_data(how, out), **{**digits_small.SCENES, "size": how.scene_size})
    annotator_top1 = None
    if how.variant == TOKENS or how.teacher:
        annotator_top1 = prepare_annotator(how, out)
    folder = workdir(arm, seed, out)
    clock, cpu = time.perf_counter(), time.process_time()
    result = train(config, folder)
    if not result.finished:
        sys.exit(75)
    score = "miou" if how.variant == SEGMENTATION else "top1"
    lines = read_metrics(folder)
    steps = next(line["step"] / line["train/epoch"] for line in lines if "train/epoch" in line)
    raw, ema = f"eval/raw_{score}", f"eval/ema_{score}"
    return {
        "arm": arm,
        "seed": seed,
        "settings": settings_hash(arm),
        "score": score,
        "ema": result.metrics[ema],
        "raw": result.metrics[raw],
        "annotator_top1": annotator_top1,
        "curve": [[round(line["step"] / steps, 2), line[raw], line[ema]] for line in lines if raw in line],
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }


def prepare_annotator(how: Arm, out: pathlib.Path) -> float:
    """Trains the annotator and scores an arm's training scenes, where that is not done.

    Returns:
      top-1 of the annotator of the arm in percent.
    """
    accuracy = _annotator_accuracies(out)
    step = max(accuracy) if how.annotator is None else closest_step(accuracy, how.annotator)
    if how.variant == TOKENS:
        params, stats, record = restore_for_inference(out / "annotator", weights="ema", step=step)
        info = ModelInfo.from_json(record, "The annotator")
        model = info.build()
        update(model, params, stats)
        source = open_source("digits", "train", data_dir=str(_data(how, out)))
        annotate(Annotator(model, info), source, _score_maps(how, out), top_k=digits_small.TOP_K)
    return accuracy[step]


@functools.cache
def _annotator_accuracies(out: pathlib.Path) -> dict[int, float]:
    """Trains the annotator and returns step -> top-1 in percent, after every epoch."""
    config = digits_small.get_config("annotator")
    config.data.dir = str(out / "data" / str(digits_small.SCENES["size"]))
    config.eval.every_epochs = config.checkpoint.every_epochs = 1
    config.checkpoint.keep = config.epochs
    digit_scenes.prepare(config.data.dir, **digits_small.SCENES)
    if not train(resolve(config), out / "annotator").finished:
        sys.exit(75)
    return {
        int(line["step"]): line["eval/ema_top1"]
        for line in read_metrics(out / "annotator")
        if "eval/ema_top1" in line
    }


def closest_step(accuracy: Mapping[int, float], target: float) -> int:
    """The first step whose accuracy is closest to a target, both in percent."""
    return min(sorted(accuracy), key=lambda step: abs(accuracy[step] - target))


def _data(how: Arm, out: pathlib.Path) -> pathlib.Path:
    return out / "data" / str(how.scene_size)


def _score_maps(how: Arm, out: pathlib.Path) -> pathlib.Path:
    stopped = "" if how.annotator is None else f"_stopped{how.annotator}"
    return out / f"score_maps_{how.scene_size}{stopped}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_token_labels",
        description="Compares ways of training a student on scenes of digits, over several seeds.",
        epilog="example:\n  python -m scripts.compare_token_labels --studies main --seeds 0 1 2 --table",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="runs/compare", metavar="FOLDER", help="folder of all runs (default: %(default)s)")
    add("--results", default=str(ROOT / "docs/results/token_labels.jsonl"), metavar="FILE",
        help="JSON lines of the finished runs (default: docs/results/token_labels.jsonl)")  # fmt: skip
    add("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES), metavar="STUDY",
        help="default: all, " + " ".join(STUDIES))  # fmt: skip
    add("--seeds", type=int, nargs="*", metavar="SEED", help="default: as many as each study has")
    add("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help="only these arms of the studies")
    add("--table", action="store_true", help="write the tables into README.md and docs/results.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
