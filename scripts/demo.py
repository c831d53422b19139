"""The whole idea on two CPU cores in minutes: make demo, or: python -m scripts.demo --out runs/demo.

Real handwritten digits in cluttered scenes; an annotator learns from image labels alone, scores every cell of
every training image once, and an LV-ViT learns from these score maps with all of its tokens. The last steps
export the student for PyTorch, check the export and draw report.png. Every step prints the command that does
the same by hand.
"""

import argparse
import pathlib
import sys
import time

import jax
import numpy as np

from configs import digits as recipe
from tlvit import annotate, visualize
from tlvit.checkpoints import torch_files as convert
from tlvit.checkpoints.load import load
from tlvit.data.sources import digit_scenes as digits
from tlvit.data.sources import tfds as sources
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.training import run_log as reporting
from tlvit.training.loop import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/demo", help="folder of everything the demo makes")
    parser.add_argument("--epochs", type=int, help="of both trainings; the recipe's own by default")
    options = parser.parse_args()
    out = pathlib.Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    reporting.start_logging()
    start = time.perf_counter()

    say("1/5  Scenes: one large digit gives the class, smaller ones of other classes stand around it.")
    builder = digits.prepare(out / "data", **recipe.SCENES)
    splits = builder.info.splits
    print(f"     {splits['train'].num_examples} for training, {splits['test'].num_examples} for testing")

    say("2/5  The annotator learns from the image labels alone.", run_command("annotator", out / "annotator"))
    annotator = run("annotator", out / "annotator", out, epochs=options.epochs)

    say(
        "3/5  It scores every cell of every training image once: the score maps.",
        f"python -m tlvit.annotate --model={out}/annotator --data=digits --data-dir={out}/data "
        f"--out={out}/score_maps",
    )
    annotate_training_scenes(out)

    say(
        "4/5  The student, an LV-ViT, learns from the maps with all of its tokens.",
        run_command("token_labels", out / "student"),
    )
    student = run("token_labels", out / "student", out, epochs=options.epochs)

    say(
        "5/5  Export for PyTorch, check, picture.",
        f"python -m tlvit.convert {out}/student --to=pytorch --out={out}/student.safetensors",
    )
    difference = export(out / "student", out / "student.safetensors", builder)
    picture = visualize.report(out / "student", annotator=out / "annotator")
    picture = picture.replace(out / "report.png")

    rows = [
        ("annotator, top-1", f"{annotator['eval/ema_top1']:.1f} %"),
        ("student, top-1 (averaged weights)", f"{student['eval/ema_top1']:.1f} %"),
        ("student, top-1 (raw weights)", f"{student['eval/raw_top1']:.1f} %"),
        ("student, training speed", f"{speed(out / 'student'):.0f} images/s"),
        ("export and re-import, largest difference", f"{difference:.1e} in the logits"),
        ("the picture", str(picture)),
        ("student for PyTorch", str(out / "student.safetensors")),
        ("runs (TensorBoard, checkpoints)", f"{out}/annotator, {out}/student"),
        ("score maps", f"{out}/score_maps"),
        ("time", reporting.duration(time.perf_counter() - start)),
    ]
    width = max(len(label) for label, _ in rows)
    print("\n" + "\n".join(f"  {label.ljust(width)}   {text}" for label, text in rows))
    print("\n  Without token labels, for comparison: " + run_command("no_token_labels", out / "baseline"))
    return 0


def run(
    arm: str, workdir: pathlib.Path, out: pathlib.Path, *, epochs: int | None = None, seed: int = 0,
    changes: dict | None = None,
) -> dict[str, float]:  # fmt: skip
    """One training, as `tlvit.main` does it; a finished one is only evaluated again."""
    config = recipe.get_config(arm)
    config.data.dir = str(out / "data")
    config.data.score_maps = str(out / "score_maps") if arm == "token_labels" else ""
    config.epochs = epochs or config.epochs
    config.seed = seed
    config.update_from_flattened_dict(changes or {})
    result = train(config, workdir)
    if not result.finished:
        sys.exit(75)
    return result.metrics


def annotate_training_scenes(out: pathlib.Path) -> None:
    """The score maps of the training scenes, by the annotator in `out`."""
    model, info = load(out / "annotator")
    source = sources.open_source("digits", "train", data_dir=str(out / "data"))
    annotate.annotate(model, info, source, out / "score_maps", top_k=recipe.TOP_K)


def run_command(arm: str, workdir: pathlib.Path) -> str:
    """The same by hand."""
    name = "configs/digits.py" + ("" if arm == "token_labels" else f":{arm}")
    maps = f" --config.data.score_maps={workdir.parent}/score_maps" if arm == "token_labels" else ""
    data = f"--config.data.dir={workdir.parent}/data{maps}"
    return f"python -m tlvit.main --config={name} --workdir={workdir} {data}"


def export(workdir: pathlib.Path, path: pathlib.Path, builder) -> float:
    """Writes the student under PyTorch's names and reads it back; the largest difference of any logit on test
    images."""
    model, info = load(workdir)
    convert.export(model, path, info=info)
    again, _ = load(path)
    images = np.stack(
        [example["image"] for example in builder.as_dataset("test").take(32).as_numpy_iterator()]
    )
    one, other = (logits(m, info, images) for m in (model, again))
    return float(np.abs(one - other).max())


def logits(model, info, images: np.ndarray) -> np.ndarray:
    """By the model's rule of inference, [B, L]."""
    net, params, stats = functionalize(model)
    inputs = normalize(images, info.preprocessing.mean, info.preprocessing.std)
    return np.asarray(jax.jit(net.apply)(params, stats, inputs)[0].logits)


def speed(workdir: pathlib.Path) -> float:
    """Median images/s over the progress lines."""
    rates = [
        line["train/images_per_s"] for line in reporting.read_journal(workdir) if "train/images_per_s" in line
    ]
    return float(np.median(rates)) if rates else float("nan")


def say(text: str, command: str = "") -> None:
    print(f"\n{text}" + (f"\n     $ {command}" if command else ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
