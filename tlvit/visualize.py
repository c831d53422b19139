"""Draws what a run learned and what models see in images.

tlvit visualize --checkpoint=WORKDIR [--annotator=PATH]         # report.png of a run; also: visualize report
tlvit visualize attention CHECKPOINT photo.jpg                  # attention rollout
tlvit visualize relevance CHECKPOINT photo.jpg --class=cat      # relevance of the patches for a class
tlvit visualize tokens CHECKPOINT photo.jpg                     # classes of the tokens
tlvit visualize compare CHECKPOINT CHECKPOINT photo.jpg         # two models side by side
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence

from tlvit import command
from tlvit.checkpoint_flags import add_flags
from tlvit.checkpoints.load import Opened, open_checkpoint
from tlvit.class_names import read_class_names
from tlvit.drawing.explanation import KINDS, draw_explanations
from tlvit.drawing.panels import save
from tlvit.drawing.report import report
from tlvit.files import as_path
from tlvit.predict import list_images
from tlvit.training.run_log import start_logging

EXAMPLES = """  tlvit visualize --checkpoint=runs/student
  tlvit visualize --checkpoint=runs/student --annotator=runs/annotator --baseline=runs/baseline
  tlvit visualize attention runs/student photo.jpg
  tlvit visualize relevance runs/student photo.jpg --class=cat --class=dog
  tlvit visualize tokens runs/student photos/
  tlvit visualize compare deit_base_patch16_224.pth lvvit_s.pth photo.jpg
"""
DESCRIPTIONS = {
    "report": "Draws report.png of a run into its workdir. Other pictures, each with its own --help: tlvit "
    "visualize attention, relevance, tokens, compare.",
    "attention": "Draws attention rollout from the class token to the patches (Abnar & Zuidema 2020).",
    "relevance": "Draws how relevant each patch is for a class (Chefer et al. 2021).",
    "tokens": "Draws the most probable class of each token.",
    "compare": "Draws two models side by side.",
}
MAX_IMAGES = 24  # rows of a picture

log = logging.getLogger("tlvit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    body = _report if options.picture == "report" else _explain
    return command.run(lambda: body(options), debug=options.debug)


def _report(options: argparse.Namespace) -> int:
    start_logging()
    if as_path(options.checkpoint).is_dir():
        command.check_writable(as_path(options.checkpoint) / "report.png", folder=False)
    path = report(
        options.checkpoint,
        weights=options.weights,
        annotator=options.annotator,
        baseline=options.baseline,
        count=options.count,
    )
    log.info("report written: %s", path)
    return 0


def _explain(options: argparse.Namespace) -> int:
    start_logging()
    out = options.out or f"{options.picture}.png"
    if not out.lower().endswith(".png"):
        raise ValueError(f"The picture is written as .png, not as {out}.")
    command.check_writable(out, folder=False)
    paths = list_images(options.images)
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"A picture has at most {MAX_IMAGES} images, not {len(paths)}.")
    names = options.model or [None] * len(options.checkpoints)
    if len(names) != len(options.checkpoints):
        raise ValueError("--model is given once for each checkpoint, in their order, or not at all.")
    models = [_open(path, name, options) for path, name in zip(options.checkpoints, names, strict=True)]
    figure = draw_explanations(
        options.show if options.picture == "compare" else options.picture,
        models,
        paths,
        classes=getattr(options, "class"),
        top=options.top,
        exif=options.exif == "apply",
    )
    save(figure, out)
    log.info("drawn: %s", out)
    return 0


def _open(path: str, model: str | None, options: argparse.Namespace) -> Opened:
    """Opens a checkpoint for computation in float32, with the class names that the user gave."""
    how = {"weights": options.weights, "image_size": options.image_size, "dtype": "float32"}
    opened = open_checkpoint(path, model=model, **how)
    if options.classes:
        names = read_class_names(options.classes, opened.info.num_classes)
        opened = dataclasses.replace(opened, info=dataclasses.replace(opened.info, class_names=names))
    return opened


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the flags of a picture. Without its name, the picture is the report."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = bool(words) and not words[0].startswith("-")
    picture = words.pop(0) if named else "report"
    if picture not in DESCRIPTIONS:
        command.parser("visualize", DESCRIPTIONS["report"], EXAMPLES).error(
            f"there is no picture {picture!r}; choose one of {', '.join(DESCRIPTIONS)}"
        )
    title = f"visualize {picture}" if named else "visualize"
    parser = command.parser(title, DESCRIPTIONS[picture], EXAMPLES)
    parser.set_defaults(picture=picture)
    add_flags(parser, "--weights")
    (_add_report_flags if picture == "report" else _add_image_flags)(parser, picture)
    return parser.parse_args(words)


def _add_report_flags(parser: argparse.ArgumentParser, picture: str) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WORKDIR", help="workdir of the run")
    add("--annotator", metavar="PATH", help="checkpoint of the annotator, whose cells are drawn too")
    add("--baseline", metavar="WORKDIR",
        help="workdir of a run without token labels, whose accuracy is drawn too")  # fmt: skip
    add("--count", type=command.integer(1, 100), default=5, metavar="N",
        help="number of evaluation images that are drawn, each of another class")  # fmt: skip


def _add_image_flags(parser: argparse.ArgumentParser, picture: str) -> None:
    add = parser.add_argument
    count = 2 if picture == "compare" else 1
    add("checkpoints", nargs=count, metavar="CHECKPOINT",
        help="a workdir, a model folder, or a .pth, .pt, .pth.tar or .safetensors file")  # fmt: skip
    add("images", nargs="+", metavar="IMAGE", help="image files, folders or glob patterns")
    add("--model", action="append", metavar="NAME",
        help="architecture of a PyTorch file, if several have its tensors; "
        "compare takes it twice")  # fmt: skip
    add("--out", metavar="PNG", help=f"the picture (default: {picture}.png)")
    add_flags(parser, "--classes", "--image-size")
    add("--exif", choices=("apply", "ignore"), default="apply",
        help="turn images as their EXIF orientation says")  # fmt: skip
    if picture == "compare":
        add("--show", choices=KINDS, default="relevance", help="what is compared")
    if picture in ("relevance", "compare"):
        add("--class", action="append", default=[], metavar="CLASS",
            help="name or index of a class; may be repeated (default: the most probable ones)")  # fmt: skip
        add("--top", type=command.integer(1, 5), default=1 if picture == "compare" else 2, metavar="N",
            help="most probable classes of each model that are drawn")  # fmt: skip
    else:
        parser.set_defaults(**{"class": [], "top": 1})


if __name__ == "__main__":
    sys.exit(main())
