"""Scores every cell of every image of a data set once, with a trained annotator.

tlvit annotate --checkpoint=WORKDIR --data=imagenet2012 --split=train --out=/data/score_maps

`tlvit maps` verifies the result and imports published score maps. In Python: `tlvit.annotate(annotator, …)`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import jax

from tlvit import command
from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import WEIGHTS
from tlvit.config import MAX_BATCH, parse_image_size
from tlvit.training.annotation import Annotator, annotate
from tlvit.training.run_log import start_logging

EXAMPLE = """  tlvit annotate --checkpoint=nfnet_f6.pth --data=imagenet2012 --split=train --top-k=5 \\
      --out=/data/score_maps
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
    model, info = load(
        options.checkpoint,
        model=options.model,
        weights=options.weights,
        image_size=options.image_size,
        dtype=_dtype(options.dtype),
    )
    from tlvit.data.sources.open import open_source  # imports TensorFlow

    annotate(
        Annotator(model, info),
        open_source(options.data, options.split, data_dir=options.data_dir, exif=options.exif),
        options.out,
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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = "Writes the score maps of a data set. The same command continues an interrupted annotation."
    parser = command.parser("annotate", text, EXAMPLE)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH",
        help="the annotator: a workdir, a model folder or a PyTorch file")  # fmt: skip
    add("--model", metavar="NAME", help="architecture of a PyTorch file, if several have its tensors")
    add(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="ema (averaged), raw (not averaged) or auto (those that scored best in the run)",
    )
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
        help="384 or 384x256 (default: the annotator's image size)")  # fmt: skip
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
