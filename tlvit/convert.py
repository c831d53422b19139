"""Converts checkpoints: PyTorch files to model folders, workdirs to model folders, and both to PyTorch files.

tlvit convert --checkpoint=weights.pth --model=lvvit_s --out=FOLDER    # PyTorch -> model folder
tlvit convert --checkpoint=WORKDIR --out=weights.safetensors           # run -> PyTorch (or .pth)
tlvit convert --checkpoint=own.pth --model=lvvit_s --option=depth=8 --out=FOLDER  # a model of other sizes
"""

import argparse
import ast
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from tlvit import command
from tlvit.checkpoint_flags import add_flags
from tlvit.checkpoints.load import open_checkpoint
from tlvit.checkpoints.native import save_model_folder
from tlvit.checkpoints.torch_files import ENDINGS, check_ending, export
from tlvit.class_names import read_class_names
from tlvit.config import parse_image_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    return command.run(lambda: convert(options), debug=options.debug)


def convert(options: argparse.Namespace) -> int:
    """Opens the checkpoint, prints what was loaded, and writes it in the other format. Returns 0.

    Raises:
      ValueError: the output exists, or the checkpoint does not fit.
      OSError: a file cannot be read or written.
      ImportError: torch is needed and not installed.
    """
    out = pathlib.Path(options.out)
    command.check_new(out)
    to_pytorch = (options.to or ("pytorch" if out.name.endswith(ENDINGS) else "tlvit")) == "pytorch"
    if to_pytorch:
        check_ending(out)
    command.check_writable(out, folder=not to_pytorch)
    opened = open_checkpoint(
        options.checkpoint,
        model=options.model,
        weights=options.weights,
        image_size=options.image_size,
        pos_grid=options.pos_grid,
        num_classes=options.num_classes,
        drop_heads=options.heads == "drop",
        allow=options.allow,
        **dict(options.option),
    )
    info = opened.info
    if options.classes:
        names = read_class_names(options.classes, info.num_classes)
        info = dataclasses.replace(info, class_names=names)
    size = "x".join(map(str, info.image_size))
    model = f"{info.model}, {info.num_classes} classes, {size} pixels"
    print(f"{options.checkpoint}: {opened.section} -> {model}; tensors:")
    print(opened.report)
    if to_pytorch:
        export(opened.model, out, info=info)
    else:
        save_model_folder(out, opened.model, info)
    print(f"written to {out}" + ("" if to_pytorch else " (a model folder)"))
    return 0


def _parse_option(text: str) -> tuple[str, Any]:
    """("depth", 12) of "depth=12". What is no Python value is text."""
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as depth=12")
    with contextlib.suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(value.capitalize() if value in ("true", "false", "none") else value)
    return name, value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, examples = __doc__.replace("\ntlvit", "\n  tlvit").split("\n\n", 1)
    parser = command.parser("convert", description, examples)
    add = parser.add_argument
    add_flags(parser, "--checkpoint")
    add("--out", required=True, metavar="PATH", help="model folder, or .safetensors or .pth file, to write")
    add("--to", choices=("tlvit", "pytorch"), help="format of --out (default: by its ending)")
    add_flags(parser, "--model")
    add("--option", action="append", default=[], type=_parse_option, metavar="NAME=VALUE",
        help="option of the model, such as depth=12 (see tlvit summary NAME); may be repeated")  # fmt: skip
    add_flags(parser, "--weights", "--classes")
    add(
        "--heads",
        choices=("keep", "drop"),
        default="keep",
        help="keep the classification heads, or drop them and initialize new ones",
    )
    add(
        "--num-classes",
        type=command.integer(1, 1_000_000),
        metavar="N",
        help="number of classes of the new heads (default: the checkpoint's)",
    )
    add(
        "--image-size",
        type=command.parsed(parse_image_size),
        metavar="SIZE",
        help="height and width in pixels, 224 or 384x256; position embeddings are resized (default: the "
        "checkpoint's)",
    )
    add(
        "--pos-grid",
        type=command.parsed(parse_image_size),
        metavar="GRID",
        help="rows x columns of a PyTorch file's position embeddings, such as 14x24 (default: a square)",
    )
    add("--allow", action="append", default=[], metavar="PREFIX",
        help="accept tensors with this prefix that are missing, unexpected or of another shape; may be "
        "repeated. A missing aux_head or head_dist starts from the class head")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
