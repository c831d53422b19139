"""Checkpoint files of PyTorch in and out.

python -m tlvit.convert weights.pth --model=lvvit_s --out=DIR          # PyTorch -> tlvit model folder
python -m tlvit.convert WORKDIR --to=pytorch --out=weights.pth         # and back (or .safetensors)
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from tlvit.checkpoints.load import load, open_weights, save_folder
from tlvit.checkpoints.model_info import image_size_pair
from tlvit.checkpoints.torch_files import export, read_weights
from tlvit.checkpoints.torch_names import to_torch


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parse(arguments)
    try:
        out = pathlib.Path(options.out)
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise ValueError(f"{options.out} exists already; choose another name or remove it.")
        if options.to == "pytorch":
            model, info = load(
                options.source, model=options.model, ema=options.ema, image_size=options.image_size
            )
            export(model, options.out, info=info)
            print(f"{info.model}: {len(to_torch(model))} tensors written to {options.out}")
            return 0
        weights = read_weights(options.source, ema=options.ema)
        model, info, report = open_weights(
            weights, model=options.model, num_classes=options.num_classes, image_size=options.image_size,
            drop_heads=options.heads == "drop", allow=options.allow, pos_grid=options.pos_grid,
        )  # fmt: skip
        if options.class_names:
            names = pathlib.Path(options.class_names).read_text().splitlines()
            info = dataclasses.replace(info, class_names=tuple(names))
        size = "x".join(map(str, info.image_size))
        what = f"{info.model}, {info.num_classes} classes, {size} pixels"
        print(f"{options.source}: {weights.section} -> {what}\n{report}")
        save_folder(options.out, model, info)
        print(f"written to {options.out}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tlvit.convert", description="Checkpoints from and to PyTorch.")
    parser.add_argument(
        "source", help="a .pth, .pt, .pth.tar or .safetensors file; or a workdir or model folder"
    )
    parser.add_argument(
        "--out", required=True, help="folder, or with --to=pytorch a .pth or .safetensors file"
    )
    parser.add_argument("--to", choices=("tlvit", "pytorch"), default="tlvit")
    parser.add_argument("--model", help="name, where the tensors do not tell")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: EMA where there is one"
    )
    parser.add_argument(
        "--heads", choices=("keep", "drop"), default="keep", help="drop: new ones, for other classes"
    )
    parser.add_argument("--num-classes", type=int, help="with --heads=drop")
    parser.add_argument(
        "--image-size", type=image_size_pair, help="224 or 384x256: position embeddings are resized"
    )
    parser.add_argument(
        "--pos-grid", type=image_size_pair, help="of the file's position embeddings, if no square"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME", help="tensors that may differ"
    )
    parser.add_argument("--class-names", help="a text file, one name a line")
    options = parser.parse_args(arguments)
    options.ema = {"auto": None, "ema": True, "raw": False}[options.weights]
    return options


if __name__ == "__main__":
    sys.exit(main())
