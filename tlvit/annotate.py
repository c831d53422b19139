"""Scores every cell of every image of a data set once, with a trained annotator.

python -m tlvit.annotate --checkpoint=WORKDIR --data=imagenet2012 --split=train --out=/data/score_maps

`tlvit.maps` verifies the result and imports published score maps. In Python: `tlvit.annotate(annotator, …)`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import jax

from tlvit.checkpoints.load import load
from tlvit.config import parse_image_size
from tlvit.training.annotation import Annotator, annotate
from tlvit.training.run_log import start_logging

EXAMPLE = """example:
  tlvit annotate --checkpoint=nfnet_f6.pth --data=imagenet2012 --split=train --top-k=5 \\
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
    if options.multihost:
        jax.distributed.initialize()
    start_logging()
    try:
        from tlvit.data.sources.open import open_source

        model, info = load(
            options.checkpoint, model=options.model, weights=options.weights, image_size=options.image_size
        )
        annotate(
            Annotator(model, info),
            open_source(options.data, options.split, data_dir=options.data_dir),
            options.out,
            top_k=options.top_k,
            batch_size=options.batch_size,
            max_corrupt=options.max_missing,
            threads=options.threads,
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        log.error("%s", error)
        return 1
    log.info("score maps written: %s", options.out)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tlvit annotate",
        description="Writes the score maps of a data set. The same command continues an interrupted run.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="the annotator: a workdir, a model folder or a PyTorch file")
    add("--model", help="architecture of a PyTorch file, where its tensors do not identify it")
    add("--weights", choices=("auto", "ema", "raw"), default="auto", help="weights of a workdir (auto)")
    add("--data", required=True, help='TFDS name, "digits", or a folder with ROOT/SPLIT/CLASS/IMAGE')
    add("--split", default="train", help="split of the data set (train)")
    add("--data-dir", help="folder of the TFDS data sets (~/tensorflow_datasets)")
    add("--out", required=True, help="folder of the score maps")
    add("--top-k", type=int, default=5, help="classes kept for each cell (5)")
    add("--image-size", type=parse_image_size, help="384 or 384x256 (the annotator's image size)")
    add("--batch-size", type=int, default=64, help="images in a batch of each process (64)")
    add("--multihost", action="store_true", help="run as one of several processes, which divide the shards")
    add("--threads", type=int, default=0, help="threads that decode images (0: one for each core)")
    add("--max-missing", type=float, default=0.0, help="largest fraction of images without a map (0)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
