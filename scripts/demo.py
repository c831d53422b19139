"""Trains an annotator and a student on token labels: make demo, or python -m scripts.demo --out=runs/demo.

The data are handwritten digits in cluttered scenes. An annotator learns from image labels alone and scores
every cell of every training image once. An LV-ViT learns from these score maps with all of its tokens. The
last steps export the student for PyTorch, check the export and draw report.png, with the stored curve of a
student that was trained without token labels beside it. Every step prints its command. The demo takes a few
minutes on two CPU cores.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from configs import digits_small
from scripts.comparison_table import read_lines
from tlvit import command, visualize
from tlvit.checkpoints import torch_files
from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import resolve
from tlvit.data.sources import digit_scenes
from tlvit.data.sources.open import open_source
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.training.annotation import annotate
from tlvit.training.device_scorer import Annotator
from tlvit.training.loop import train
from tlvit.training.run_log import duration, read_metrics, start_logging

ROOT = pathlib.Path(__file__).parent.parent
STORED = ROOT / "docs/results/token_labels.jsonl"
STORED_ARM = "labels_twice"
STUDENT_EPOCHS = 2 * digits_small.EPOCHS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    return command.run(lambda: demo(options))


def demo(options: argparse.Namespace) -> int:
    """Trains, annotates, exports and draws; prints the results. Returns 0."""
    out = pathlib.Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    start_logging()
    start = time.perf_counter()

    say("1/5  Scenes: one large digit gives the class, smaller ones of other classes surround it.")
    builder = digit_scenes.prepare(out / "data", **digits_small.SCENES)
    splits = builder.info.splits
    print(f"     {splits['train'].num_examples} for training, {splits['test'].num_examples} for testing")

    say("2/5  The annotator learns from the image labels alone.", run_command("annotator", out / "annotator"))
    annotator = run("annotator", out / "annotator", out, epochs=options.epochs)

    say(
        "3/5  It scores every cell of every training image once: the score maps.",
        f"python -m tlvit.annotate --checkpoint={out}/annotator --data=digits --data-dir={out}/data "
        f"--top-k={digits_small.TOP_K} --out={out}/score_maps",
    )
    annotate_training_scenes(out)

    say(
        "4/5  The student, an LV-ViT, learns from the maps with all of its tokens.",
        run_command("token_labels", out / "student"),
    )
    student = run("token_labels", out / "student", out, epochs=options.epochs or STUDENT_EPOCHS)

    say(
        "5/5  Export the student for PyTorch, check the export, draw the report.",
        f"python -m tlvit.convert --checkpoint={out}/student --out={out}/student.safetensors",
    )
    difference = export(out / "student", out / "student.safetensors", builder)
    stored = stored_baseline(out / "stored_baseline")
    picture = visualize.report(
        out / "student",
        annotator=out / "annotator",
        baseline=stored,
        baseline_name="without token labels (stored result)",
    )
    picture = picture.replace(out / "report.png")

    rows = [
        ("annotator, top-1", f"{annotator['eval/ema_top1']:.1f} %"),
        ("student, top-1 (averaged weights)", f"{student['eval/ema_top1']:.1f} %"),
        ("student, top-1 (not averaged)", f"{student['eval/raw_top1']:.1f} %"),
        ("student, training speed", f"{speed(out / 'student'):.0f} images/s"),
        ("export and re-import, largest difference", f"{difference:.1e} in the logits"),
        ("report", str(picture)),
        ("student for PyTorch", str(out / "student.safetensors")),
        ("runs (TensorBoard, checkpoints)", f"{out}/annotator, {out}/student"),
        ("score maps", f"{out}/score_maps"),
        ("time", duration(time.perf_counter() - start)),
    ]
    width = max(len(label) for label, _ in rows)
    print("\n" + "\n".join(f"  {label.ljust(width)}   {text}" for label, text in rows))
    print(f"\n  The curve without token labels is stored ({STORED.relative_to(ROOT)}, seed 0). Train it:")
    print("    " + run_command("no_token_labels", out / "baseline"))
    return 0


def run(
    variant: str, workdir: pathlib.Path, out: pathlib.Path, *, epochs: int | None = None
) -> dict[str, float]:
    """Trains a variant of the recipe as `tlvit.main` does. A finished run is only evaluated again."""
    config = digits_small.get_config(variant)
    config.data.dir = str(out / "data")
    config.data.score_maps = str(out / "score_maps") if variant == "token_labels" else ""
    config.epochs = epochs or config.epochs
    result = train(resolve(config), workdir)
    if not result.finished:
        sys.exit(75)
    return result.metrics


def stored_baseline(folder: pathlib.Path) -> pathlib.Path:
    """Writes the stored accuracies of a student without token labels (seed 0) as a metrics.jsonl."""
    line = next(line for line in read_lines(STORED) if (line["arm"], line["seed"]) == (STORED_ARM, 0))
    metrics = [
        {"step": i, "train/epoch": epoch, "eval/raw_top1": raw, "eval/ema_top1": ema}
        for i, (epoch, raw, ema) in enumerate(line["curve"])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in metrics))
    return folder


def annotate_training_scenes(out: pathlib.Path) -> None:
    """Writes the score maps of the training scenes with the annotator in `out`."""
    model, info = load(out / "annotator")
    source = open_source("digits", "train", data_dir=str(out / "data"))
    annotate(Annotator(model, info), source, out / "score_maps", top_k=digits_small.TOP_K)


def run_command(variant: str, workdir: pathlib.Path) -> str:
    """The command that does the same as `run`."""
    name = "configs/digits_small.py" + ("" if variant == "token_labels" else f":{variant}")
    maps = f" --config.data.score_maps={workdir.parent}/score_maps" if variant == "token_labels" else ""
    epochs = f" --config.epochs={STUDENT_EPOCHS}" if variant == "token_labels" else ""
    data = f"--config.data.dir={workdir.parent}/data{maps}{epochs}"
    return f"python -m tlvit.main --config={name} --workdir={workdir} {data}"


def export(workdir: pathlib.Path, path: pathlib.Path, builder: Any) -> float:
    """Exports the student for PyTorch and reads it back.

    Returns:
      The largest difference between the logits of the two models on 32 test images.
    """
    model, info = load(workdir)
    torch_files.export(model, path, info=info)
    again, _ = load(path)
    # A slice of the split, not `take`: TensorFlow warns about a data set that is read in part.
    images = np.stack([example["image"] for example in builder.as_dataset("test[:32]").as_numpy_iterator()])
    one, other = (logits(m, info, images) for m in (model, again))
    return float(np.abs(one - other).max())


def logits(model: nnx.Module, info: ModelInfo, images: np.ndarray) -> np.ndarray:
    """Logits [B, L] by the model's inference rule, of uint8 images [B, H, W, 3]."""
    net, params, stats = functionalize(model)
    inputs = normalize(images, info.preprocessing.mean, info.preprocessing.std)
    return np.asarray(jax.jit(net.apply)(params, stats, inputs)[0].logits)


def speed(workdir: pathlib.Path) -> float:
    """Median images/s over the progress lines of a run; NaN if there are none."""
    rates = [line["train/images_per_s"] for line in read_metrics(workdir) if "train/images_per_s" in line]
    return float(np.median(rates)) if rates else float("nan")


def say(text: str, command: str = "") -> None:
    """Prints the title of a step and its command."""
    print(f"\n{text}" + (f"\n     $ {command}" if command else ""), flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo",
        description="Trains an annotator and a student on token labels, on two CPU cores in minutes.",
        epilog="example:\n  python -m scripts.demo --out=runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="runs/demo", metavar="FOLDER", help="folder of all results (default: runs/demo)")
    add("--epochs", type=int, metavar="N", help="epochs of each training (default: the recipe's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
