"""Scores every cell of every image of a data set once, with any annotator.

tlvit annotate --checkpoint=WORKDIR --data=imagenet2012 --split=train --out=/data/score_maps
tlvit annotate --annotator=timm:resnet50 --classes-map=classes.csv --data=photos --out=photos/score_maps
tlvit annotate --annotator=my_annotator.py:make --data=photos --crop-grid=2x3 --flip --out=photos/score_maps

`tlvit maps` verifies the result and imports published score maps. In Python: `tlvit.annotate(annotator, …)`.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from tlvit import command
from tlvit.annotators.classes_map import read_classes_map
from tlvit.annotators.dense import DenseAnnotator, annotator_classes, check_annotator
from tlvit.annotators.scoring import GEOMETRIES, LOGITS, Scoring
from tlvit.checkpoint_flags import add_flags
from tlvit.checkpoints.load import load
from tlvit.config import MAX_BATCH, parse_image_size
from tlvit.recipes import load_annotator
from tlvit.training.annotation import annotate
from tlvit.training.device_scorer import Annotator
from tlvit.training.run_log import start_logging

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow
    from tlvit.data.sources.source import Source

EXAMPLE = """  tlvit annotate --checkpoint=nfnet_f6.pth --data=imagenet2012 --split=train --top-k=5 \\
      --out=/data/score_maps
  tlvit annotate --annotator=timm:resnet50 --classes-map=classes.csv --data=photos --out=photos/score_maps
  tlvit annotate --annotator=my_annotator.py:make --data=photos --crop-grid=2x3 --flip --out=photos/score_maps
"""

log = logging.getLogger("tlvit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: the command-line arguments. None: those of the process.

    Returns:
      The exit status: 0, or 1 after an error.
    """
    options = _parse(arguments)
    return command.run(lambda: _run(options), debug=options.debug)


def _run(options: argparse.Namespace) -> int:
    if options.multihost:
        jax.distributed.initialize()
    start_logging()
    command.check_writable(options.out, folder=True)
    annotator = _annotator(options)
    from tlvit.data.sources.open import open_source  # imports TensorFlow

    source = open_source(options.data, options.split, data_dir=options.data_dir, exif=options.exif)
    annotate(
        annotator,
        source,
        options.out,
        scoring=_scoring(options, annotator, source),
        top_k=options.top_k,
        batch_size=options.batch_size,
        max_corrupt=options.max_missing,
        threads=options.threads,
    )
    log.info("score maps written: %s", options.out)
    return 0


def _dtype(name: str) -> str:
    """The type of the computation. CPUs compute faster in float32, which they have instructions for."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _annotator(options: argparse.Namespace) -> Annotator | DenseAnnotator:
    """The annotator of the flags."""
    if options.annotator:
        annotator = load_annotator(options.annotator, options.image_size)
        check_annotator(annotator)
        return annotator
    model, info = load(
        options.checkpoint,
        model=options.model,
        weights=options.weights,
        image_size=options.image_size,
        dtype=_dtype(options.dtype),
    )
    return Annotator(model, info)


def _scoring(options: argparse.Namespace, annotator: Annotator | DenseAnnotator, source: "Source") -> Scoring:
    """What the flags say about crops, mirror images, classes, logits and geometry."""
    classes = None
    if options.classes_map:
        if isinstance(annotator, Annotator):
            names = annotator.info.class_names or annotator.info.num_classes
        else:
            names = annotator_classes(annotator) or int(annotator.num_classes)
        classes = read_classes_map(options.classes_map, names, source.class_names or source.num_classes)
    return Scoring(options.crop_grid, options.flip, classes, options.logits, options.geometry)


def _crop_grid(text: str) -> tuple[int, int]:
    """The rows and columns of "2x3"."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ValueError(f"must be ROWSxCOLUMNS, such as 2x3, not {text!r}")
    return Scoring((int(found[1]), int(found[2]))).crop_grid


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = "Writes the score maps of a data set. The same command continues an interrupted annotation."
    parser = command.parser("annotate", text, EXAMPLE)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", metavar="PATH",
        help="the annotator: a workdir, a model folder or a PyTorch file")  # fmt: skip
    which.add_argument("--annotator", metavar="ANNOTATOR",
        help="another annotator: timm:NAME, timm:NAME:WEIGHTS or FILE.py:FUNCTION")  # fmt: skip
    add_flags(parser, "--model", "--weights")
    add(
        "--data",
        metavar="NAME",
        required=True,
        help='a TFDS data set, "digits", or a folder with SPLIT/CLASS/IMAGE',
    )
    add("--split", default="train", help="split of the data set")
    add("--data-dir", metavar="FOLDER", help="folder of the TFDS data sets (default: ~/tensorflow_datasets)")
    add("--out", required=True, metavar="FOLDER", help="folder of the score maps")
    add("--top-k", type=command.integer(1, 65535), default=5, metavar="K", help="classes kept for each cell")
    add("--image-size", type=command.parsed(parse_image_size), metavar="SIZE",
        help="height and width in pixels, 384 or 384x256 (default: the annotator's)")  # fmt: skip
    add("--crop-grid", type=command.parsed(_crop_grid), default=(1, 1), metavar="RxC",
        help="score R x C overlapping crops, each of the annotator's image size (default: 1x1)")  # fmt: skip
    add("--flip", action="store_true", help="also score the mirror images, and average")
    add("--classes-map", metavar="FILE",
        help="CSV or JSON: the class of the images for each class of the annotator")  # fmt: skip
    add("--logits", choices=LOGITS, default="auto",
        help="raw: as computed; shifted: so that the K kept classes have exactly their probabilities when "
        "all other logits are 0; auto: raw for a checkpoint with the classes of the images, else "
        "shifted")  # fmt: skip
    add("--geometry", choices=GEOMETRIES, default="auto",
        help="score the full image or the annotator's center crop; auto: for models of timm as "
        "they were evaluated, which is mostly center, and full for all others")  # fmt: skip
    add("--batch-size", type=command.integer(1, MAX_BATCH), metavar="N",
        help="images in a batch of each process (default: what the memory of its devices holds, at most 128 "
        "each; 64 on CPUs)")  # fmt: skip
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="type of the computation; auto: bfloat16 on accelerators, float32 on CPUs")  # fmt: skip
    add("--multihost", action="store_true", help="run as one of several processes, which divide the shards")
    add("--threads", type=command.integer(0, 1024), default=0, metavar="N",
        help="threads that decode images; 0: one for each core")  # fmt: skip
    add("--exif", choices=("auto", "apply", "ignore"), default="auto",
        help="turn images as their EXIF orientation says; auto: in class folders only")  # fmt: skip
    add("--max-missing", type=command.fraction, default=0.0, metavar="FRACTION",
        help="largest fraction of images without a map")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
