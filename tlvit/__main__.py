"""The `tlvit` command.

    tlvit train --config=lvvit_s --workdir=/runs/lvvit_s --config.data.score_maps=/data/score_maps
    tlvit predict --checkpoint=/runs/lvvit_s photo.jpg

`tlvit train` and `tlvit eval` are `python -m tlvit.main` with --mode=train and --mode=eval. The other
commands are `python -m tlvit.NAME`.
"""

import importlib
import sys
from collections.abc import Sequence

import tlvit
from tlvit.signals import ignore_until_exit, stop_quietly

COMMANDS = {
    "train": ("tlvit.main", "train or resume a run"),
    "eval": ("tlvit.main", "evaluate a run or a checkpoint"),
    "annotate": ("tlvit.annotate", "write the score maps of a data set"),
    "maps": ("tlvit.maps", "check and draw score maps, or import published ones"),
    "predict": ("tlvit.predict", "classify image files, or segment them"),
    "probe": ("tlvit.probe", "evaluate frozen features: k-nearest neighbors, linear classifier"),
    "export": ("tlvit.export", "export a model as a program for JAX or TensorFlow"),
    "convert": ("tlvit.convert", "convert checkpoints from and to PyTorch"),
    "summary": ("tlvit.summary", "print parameters, multiply-adds and published accuracy of models"),
    "visualize": ("tlvit.visualize", "draw the curves of a run, attention, relevance and classes of tokens"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"tlvit {tlvit.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: tlvit has no command {name!r}\n\n{help_text()}", file=sys.stderr)
        return 2
    if name == "train":
        stop_quietly()
    if name in ("train", "eval"):
        rest = [f"--mode={name}", *rest]
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    except KeyboardInterrupt:  # while the libraries are imported; see tlvit.command
        print("interrupted", file=sys.stderr)
        return 75 if name == "train" else 130


def console() -> int:
    """The console script `tlvit`: the command, after which the process ends."""
    status = main()
    ignore_until_exit()
    return status


def help_text() -> str:
    """The text of --help."""
    lines = [f"  {name:<11}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([__doc__.strip(), "", "Commands (each has its own --help):", *lines])


if __name__ == "__main__":
    sys.exit(console())
