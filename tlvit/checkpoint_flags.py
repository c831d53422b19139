"""The flags of the commands that open a checkpoint: one name and one help text in all of them."""

import argparse
from typing import Any

from tlvit import command
from tlvit.checkpoints.model_info import WEIGHTS
from tlvit.config import parse_image_size

FLAGS: dict[str, dict[str, Any]] = {
    "--checkpoint": {
        "required": True,
        "metavar": "PATH",
        "help": "a workdir, a model folder, or a .pth, .pt, .pth.tar or .safetensors file",
    },
    "--model": {"metavar": "NAME", "help": "architecture of a PyTorch file, if several have its tensors"},
    "--weights": {
        "choices": WEIGHTS,
        "default": "auto",
        "help": "ema (averaged), raw (not averaged) or auto (those that scored best in the run)",
    },
    "--classes": {"metavar": "FILE", "help": "class names, one a line (default: the checkpoint's)"},
    "--image-size": {
        "type": command.parsed(parse_image_size),
        "metavar": "SIZE",
        "help": "height and width in pixels, 384 or 384x256 (default: the checkpoint's)",
    },
}


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds flags of `FLAGS` to the parser of a command, in the given order."""
    for name in names:
        parser.add_argument(name, **FLAGS[name])
