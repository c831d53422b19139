"""Verifies a folder of score maps, or imports the published ones.

tlvit maps /data/score_maps [--data=imagenet2012 --split=train]
tlvit maps /data/score_maps --import-published=LABEL_DIR --data=imagenet2012 --split=train
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tlvit import command
from tlvit.training.run_log import start_logging

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow
    from tlvit.data.score_maps.format import ScoreMapInfo
    from tlvit.data.sources.source import Source

EXAMPLES = """  Verify the counts, checksums and values of score maps, and compare their keys with the images:
    tlvit maps /data/score_maps --data=imagenet2012 --split=train
  Import published score maps, one .pt file an image:
    tlvit maps /data/score_maps --import-published=/data/label_top5_train_nfnet --data=imagenet2012
"""


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
    from tlvit.data.score_maps.verification import verify
    from tlvit.data.sources.open import open_source

    start_logging()
    if options.import_published:
        command.check_writable(options.folder, folder=True)
    source = open_source(options.data, options.split, data_dir=options.data_dir) if options.data else None
    if source is not None and options.import_published:
        info = _import(options, source)
    else:
        info = verify(options.folder, source)
    state = "imported" if options.import_published else "verified"
    print(f"{options.folder}: {state} {info.num_images - info.num_missing} score maps\n{_describe(info)}")
    return 0


def _import(options: argparse.Namespace, source: "Source") -> "ScoreMapInfo":
    from tlvit.data.score_maps.published import import_published

    return import_published(
        options.import_published,
        source,
        options.folder,
        geometry=options.geometry,
        center_fraction=options.center_fraction,
        max_missing=options.max_missing,
        threads=options.threads,
    )


def _describe(info: "ScoreMapInfo") -> str:
    """A table of what a folder of score maps has."""
    covers = "the entire image" if info.geometry == "full" else f"center, {info.center_fraction:g}"
    rows = (
        ("annotator", f"{info.annotator} ({info.annotator_hash[:12]})"),
        ("data", info.dataset),
        ("images", f"{info.num_images} in {len(info.shards)} shards, {info.num_missing} without a map"),
        ("map", f"{info.top_k} of {info.num_classes} classes in {info.grid[0]} x {info.grid[1]} cells"),
        ("covers", covers),
    )
    return "\n".join(f"  {name:<10} {value}" for name, value in rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = "Verifies score maps and prints their description, or imports the published ones."
    parser = command.parser("maps", text, EXAMPLES)
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder of score maps")
    add(
        "--data",
        metavar="NAME",
        help='their images: a TFDS data set, "digits", or a folder with SPLIT/CLASS/IMAGE',
    )
    add("--split", default="train", help="split of the data set")
    add("--data-dir", metavar="FOLDER", help="folder of the TFDS data sets (default: ~/tensorflow_datasets)")
    group = parser.add_argument_group("import of published score maps")
    add = group.add_argument
    add("--import-published", metavar="LABEL_DIR", help="write DIR from the .pt files in this folder")
    add("--geometry", choices=("full", "center"), default="center", help="what an imported map covers")
    add(
        "--center-fraction",
        type=command.fraction,
        default=1.0,
        metavar="FRACTION",
        help="with center: side of the square as a fraction of the image's shorter side",
    )
    add("--max-missing", type=command.fraction, default=0.0, metavar="FRACTION",
        help="largest fraction of images without a file")  # fmt: skip
    add("--threads", type=command.integer(0, 1024), default=0, metavar="N",
        help="threads that read files; 0: 8")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.import_published and not options.data:
        parser.error("--import-published needs --data")
    return options


if __name__ == "__main__":
    sys.exit(main())
