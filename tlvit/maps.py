"""Verifies a folder of score maps, shows what is in it, or imports the published ones.

tlvit maps /data/score_maps [--data=imagenet2012 --split=train]
tlvit maps /data/score_maps --data=imagenet2012 --images=12 --out=maps.png --config=lvvit_s
tlvit maps /data/score_maps --stats [--data=imagenet2012 --least-plausible=doubtful.png]
tlvit maps /data/score_maps --import-published=LABEL_DIR --data=imagenet2012 --split=train
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tlvit import command
from tlvit import config as settings
from tlvit.drawing.panels import save
from tlvit.drawing.score_maps import describe_images, draw_least_plausible, draw_score_maps
from tlvit.recipes import load_recipe, override, split_overrides
from tlvit.training.run_log import start_logging

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow
    from tlvit.data.score_maps.format import ScoreMapInfo
    from tlvit.data.score_maps.statistics import MapStatistics
    from tlvit.data.sources.source import Source

EXAMPLES = """  Verify the counts, checksums and values of score maps, and compare their keys with the images:
    tlvit maps /data/score_maps --data=imagenet2012 --split=train
  Draw maps over their images, and the token targets of a random view as training with a recipe samples them:
    tlvit maps /data/score_maps --data=imagenet2012 --images=12 --out=maps.png --config=lvvit_s
  Print statistics, and draw the 20 images whose label is least probable in their map:
    tlvit maps /data/score_maps --data=imagenet2012 --stats --least-plausible=doubtful.png
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
    for picture in (options.out if options.images else None, options.least_plausible):
        if picture:
            _check_picture(picture)
    source = open_source(options.data, options.split, data_dir=options.data_dir) if options.data else None
    if source is not None and options.import_published:
        _print_description(options, "imported", _import(options, source))
    elif options.stats or not options.images:
        _print_description(options, "verified", verify(options.folder, source))
    if options.stats:
        _print_statistics(options, source)
    if options.images:
        _draw(options)
    return 0


def _print_description(options: argparse.Namespace, state: str, info: "ScoreMapInfo") -> None:
    """Prints what was done with the maps, and what they are."""
    print(f"{options.folder}: {state} {info.num_images - info.num_missing} score maps\n{_describe(info)}")


def _draw(options: argparse.Namespace) -> None:
    """Draws maps, views and token targets of images that are opened as the recipe opens them."""
    from tlvit.data.score_maps.reader import open_score_maps
    from tlvit.data.sources.open import open_source

    recipe = load_recipe(options.config)
    for name, text in options.overrides:
        override(recipe, name, text)
    config = settings.resolve(recipe)
    exif = config.data.exif
    source = open_source(options.data, options.split, data_dir=options.data_dir, exif=exif)
    figure = draw_score_maps(
        source, open_score_maps(options.folder), config, count=options.images, recipe=options.config
    )
    save(figure, options.out)
    print(f"drawn: {options.out}")


def _print_statistics(options: argparse.Namespace, source: "Source | None") -> None:
    """Prints the statistics of the maps and draws the least plausible images."""
    from tlvit.data.score_maps.reader import open_score_maps
    from tlvit.data.score_maps.statistics import map_statistics

    reader = open_score_maps(options.folder)
    found = map_statistics(reader, source)
    names = None if source is None else source.class_names
    print(_statistics_text(found, reader.info.num_classes, names))
    if source is not None and options.least_plausible:
        save(draw_least_plausible(source, found), options.least_plausible)
        print(f"drawn: {options.least_plausible}")


def _statistics_text(found: "MapStatistics", num_classes: int, names: Sequence[str] | None) -> str:
    """The statistics as text."""
    agreement = "unknown without --data"
    if found.agreement is not None:
        agreement = (
            f"the label is the best class of the mean map of {100 * found.agreement:.1f} % of the images"
        )
    lines = [
        f"  agreement  {agreement}",
        f"  size       {found.bytes_per_image:,.0f} bytes an image",
        f"  classes    never the best one of a cell: {_classes(found.never_best, num_classes, names)}",
        f"             never among the kept ones: {_classes(found.never_kept, num_classes, names)}",
        "  probability of the best class    cells   mean maps",
    ]
    percent = lambda counts: 100 * counts / max(counts.sum(), 1)
    bins = zip(percent(found.cells), percent(found.mean_maps), strict=True)
    lines += [f"    {i / 10:.1f} to {(i + 1) / 10:.1f}{a:20.1f} %{b:9.1f} %" for i, (a, b) in enumerate(bins)]
    if found.least_plausible:
        lines.append("  images whose label is least probable in their mean map")
        lines += [f"    {line}" for line in describe_images(found.least_plausible, names)]
    return "\n".join(lines)


def _classes(indices: Sequence[int], num_classes: int, names: Sequence[str] | None) -> str:
    """How many classes, and the first of them."""
    shown = ", ".join(str(names[k]) if names else str(k) for k in indices[:10])
    more = ", …" if len(indices) > 10 else ""
    return f"{len(indices)} of {num_classes}" + (f" ({shown}{more})" if indices else "")


def _check_picture(path: str) -> None:
    """Raises unless a picture can be written there."""
    if not path.lower().endswith(".png"):
        raise ValueError(f"The picture is written as .png, not as {path}.")
    command.check_writable(path, folder=False)


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
    text = "Verifies score maps and prints their description, draws them, or imports the published ones."
    others, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
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
    group = parser.add_argument_group("pictures and statistics")
    add = group.add_argument
    add("--images", type=command.integer(0, 100), default=0, metavar="N",
        help="draw N images, their maps, and the token targets of a random view; 0: none")  # fmt: skip
    add("--out", metavar="PNG", default="maps.png", help="the picture of --images")
    add("--config", metavar="RECIPE", default="lvvit_s",
        help="recipe of the student, whose augmentation and token grid are drawn; --config.NAME=VALUE "
        "overrides a setting")  # fmt: skip
    add("--stats", action="store_true",
        help="print agreement with the labels, confidence, classes, bytes an image")  # fmt: skip
    add("--least-plausible", metavar="PNG",
        help="with --stats: draw the 20 images whose label is least probable in their map")  # fmt: skip
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
    options = parser.parse_args(others)
    options.overrides = overrides
    for flag in ("import_published", "images", "least_plausible"):
        if getattr(options, flag) and not options.data:
            parser.error(f"--{flag.replace('_', '-')} needs --data")
    if options.least_plausible and not options.stats:
        parser.error("--least-plausible needs --stats")
    return options


if __name__ == "__main__":
    sys.exit(main())
