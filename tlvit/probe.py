"""Evaluates the features of a checkpoint on labeled images: k-nearest neighbors and a linear classifier.

tlvit probe --checkpoint=WORKDIR --data=photos                        # splits train and val of class folders
tlvit probe --checkpoint=t2t_vit_14.pth.tar --data=cifar10 --eval-split=test
tlvit probe --checkpoint=WORKDIR --data=photos --method=knn --k=5,10

Nothing is trained but the linear classifier, and images are not augmented. The last line is JSON.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from tlvit import command
from tlvit.checkpoint_flags import add_flags
from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import MAX_BATCH, MAX_THREADS
from tlvit.training.mesh import local_batch_size, make_mesh
from tlvit.training.prefetch import Prefetch
from tlvit.training.probe import KS, extract_features, knn_accuracy, linear_accuracy
from tlvit.training.run_log import start_logging

if TYPE_CHECKING:
    from tlvit.data.sources.source import Source

METHODS = ("knn", "linear")
log = logging.getLogger("tlvit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    return command.run(lambda: probe(options), debug=options.debug)


def probe(options: argparse.Namespace) -> int:
    """Extracts the features of both splits, evaluates them and prints the result. Returns 0.

    Raises:
      ValueError: the checkpoint or the data cannot be opened, or the splits have different classes.
    """
    start_logging()
    # TensorFlow is imported here, not above, so that --help does not wait for it.
    from tlvit.data.sources.open import open_source
    from tlvit.data.sources.source import check_same_classes

    sources = [
        open_source(options.data, split, data_dir=options.data_dir)
        for split in (options.train_split, options.eval_split)
    ]
    check_same_classes(*sources)
    where = {"model": options.model, "weights": options.weights, "image_size": options.image_size}
    opened = open_checkpoint(options.checkpoint, **where)
    model, info = opened.model, opened.info
    size = "x".join(map(str, info.image_size))
    print(f"{options.checkpoint}: {opened.section}, {info.model} at {size} pixels")
    train, test = (features_of(model, info, source, options) for source in sources)
    num_classes = int(max(train[1].max(), test[1].max())) + 1
    result: dict[str, object] = {"train_images": len(train[1]), "eval_images": len(test[1])}
    if "knn" in options.method:
        found = knn_accuracy(train, test, num_classes=num_classes, ks=options.k)
        result["knn_top1"] = {str(k): round(top1, 2) for k, top1 in found.items()}
        print("k-nearest neighbors: " + ", ".join(f"{top1:.2f}% (k={k})" for k, top1 in found.items()))
    if "linear" in options.method:
        top1, strength = linear_accuracy(train, test, num_classes=num_classes)
        result |= {"linear_top1": round(top1, 2), "linear_l2": strength}
        print(f"linear classifier: {top1:.2f}% (L2 penalty {strength:g})")
    print(json.dumps(result))
    return 0


def features_of(
    model: nnx.Module, info: ModelInfo, source: "Source", options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a split."""
    from tlvit.data.pipeline import eval_batches

    mesh = make_mesh()
    local_batch_size(options.batch_size, mesh)
    batches = eval_batches(source, info, batch_size=options.batch_size, threads=options.threads)
    log.info("features of %d images, %s", source.num_examples, source.identity)
    return extract_features(model, info, Prefetch(batches, mesh), mesh)


def _ks(text: str) -> tuple[int, ...]:
    """(5, 10) of "5,10"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"must be numbers above 0 such as 10,20, not {text!r}")
    return tuple(int(part) for part in parts)


def _methods(text: str) -> tuple[str, ...]:
    """("knn", "linear") of "knn,linear"."""
    methods = tuple(text.split(","))
    if not set(methods) <= set(METHODS):
        raise ValueError(f"must be {' or '.join(METHODS)} or both, not {text!r}")
    return methods


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, examples = __doc__.replace("\ntlvit", "\n  tlvit").split("\n\n", 1)
    parser = command.parser("probe", description, examples)
    add = parser.add_argument
    add_flags(parser, "--checkpoint")
    add(
        "--data",
        required=True,
        metavar="NAME",
        help='a TFDS data set, "digits", or a folder with SPLIT/CLASS/IMAGE',
    )
    add("--data-dir", metavar="FOLDER",
        help="folder of the TFDS data sets (default: ~/tensorflow_datasets)")  # fmt: skip
    add(
        "--train-split",
        default="train",
        metavar="SPLIT",
        help="split whose labels the classifiers learn from",
    )
    add("--eval-split", default="val", metavar="SPLIT", help="split that is classified")
    add("--method", type=command.parsed(_methods), default=METHODS, metavar="LIST",
        help="knn, linear or both (default: both)")  # fmt: skip
    add("--k", type=command.parsed(_ks), default=KS, metavar="LIST",
        help=f"numbers of neighbors (default: {','.join(map(str, KS))})")  # fmt: skip
    add_flags(parser, "--model", "--weights", "--image-size")
    add("--batch-size", type=command.integer(1, MAX_BATCH), default=64, metavar="N", help="images in a batch")
    add("--threads", type=command.integer(0, MAX_THREADS), default=0, metavar="N",
        help="threads that decode images; 0: one for each core")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
