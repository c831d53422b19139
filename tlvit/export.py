"""Exports a classifier as a program that runs without tlvit: StableHLO for JAX, or a SavedModel.

tlvit export --checkpoint=WORKDIR --out=FOLDER                     # program.stablehlo and weights.npz
tlvit export --checkpoint=weights.pth --to=savedmodel --out=FOLDER  # for TensorFlow Serving
python FOLDER/example.py photo.jpg                                 # the example that is written with it
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence

from tlvit import command
from tlvit.checkpoint_flags import add_flags
from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.program import PLATFORMS, USUAL_PLATFORMS, export_stablehlo
from tlvit.class_names import read_class_names
from tlvit.files import temporary_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    return command.run(lambda: export(options), debug=options.debug)


def export(options: argparse.Namespace) -> int:
    """Opens the checkpoint and writes the folder. Returns 0.

    Raises:
      ValueError: the output exists, or the checkpoint is no classifier.
      OSError: a file cannot be read or written.
      ImportError: TensorFlow is needed and not installed.
    """
    out = pathlib.Path(options.out)
    command.check_new(out)
    command.check_writable(out, folder=True)
    where = {"model": options.model, "weights": options.weights, "image_size": options.image_size}
    opened = open_checkpoint(options.checkpoint, **where)
    if opened.info.options.get("attention", "xla") != "xla":  # the kernels are for one kind of device
        opened = open_checkpoint(options.checkpoint, attention="xla", **where)
    info = opened.info
    if options.classes:
        names = read_class_names(options.classes, info.num_classes)
        info = dataclasses.replace(info, class_names=names)
    size = "x".join(map(str, info.image_size))
    print(f"{options.checkpoint}: {opened.section}, {info.model}, {info.num_classes} classes, {size} pixels")
    write = export_stablehlo
    if options.to == "savedmodel":
        from tlvit.data.saved_model import export_saved_model as write  # imports TensorFlow

    temporary = pathlib.Path(temporary_name(str(out)))
    try:
        write(opened.model, info, temporary, platforms=tuple(options.platforms))
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"written to {out}, for any number of images; try: python {out}/example.py photo.jpg")
    return 0


def _platforms(text: str) -> list[str]:
    """["cpu", "tpu"] of "cpu,tpu"."""
    names = text.split(",")
    unknown = sorted(set(names) - set(PLATFORMS))
    if unknown:
        raise ValueError(f"must be some of {','.join(PLATFORMS)}, not {','.join(unknown)!r}")
    return names


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, examples = (
        __doc__.replace("\ntlvit", "\n  tlvit").replace("\npython", "\n  python").split("\n\n", 1)
    )
    parser = command.parser("export", description, examples)
    add = parser.add_argument
    add_flags(parser, "--checkpoint")
    add("--out", required=True, metavar="FOLDER", help="folder to write")
    add("--to", choices=("stablehlo", "savedmodel"), default="stablehlo", help="kind of program")
    add(
        "--platforms",
        type=command.parsed(_platforms),
        default=list(USUAL_PLATFORMS),
        metavar="LIST",
        help=f"devices that the program runs on, of {','.join(PLATFORMS)} "
        f"(default: {','.join(USUAL_PLATFORMS)})",
    )
    add_flags(parser, "--model", "--weights", "--classes", "--image-size")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
