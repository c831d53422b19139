"""Prints the size and cost of models: parameters, multiply-adds, activation memory and published accuracy.

    tlvit summary lvvit_s                    # one model or several, with their options
    tlvit summary --checkpoint=runs/student  # the model of a checkpoint
    tlvit summary --all                      # all models, as a Markdown table
    tlvit summary --all --markdown           # the page "Model zoo": also preprocessing and published weights

Multiply-adds are counted in the traced program and activations in the arrays that its derivative keeps. No
weights are allocated for named models.
"""

import argparse
import dataclasses
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit import command, model_zoo, published
from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import parse_image_size
from tlvit.models.functional import Net, count_parameters, functionalize
from tlvit.models.layers import Buffer
from tlvit.models.macs import model_macs
from tlvit.models.options import MEANINGS
from tlvit.models.table import create_model, list_models, model_options, published_image_size
from tlvit.types import Array, PyTree

EXAMPLES = """  tlvit summary lvvit_s lvvit_m --image-size=384
  tlvit summary --checkpoint=runs/student
  tlvit summary --all
  tlvit summary --all --markdown
"""


@dataclasses.dataclass(frozen=True)
class Summary:
    """The size and cost of a model.

    Attributes:
      model: name of the model.
      image_size: (height, width) in pixels.
      parameters: number of parameters as PyTorch counts them: with the fixed tables of T2T-ViT, without the
        statistics of BatchNorm.
      macs: multiply-adds of the matrix products and convolutions for one image.
      activation_bytes: bytes that the backward pass of one image keeps in float32.
      tokens: (h, w) of the token grid, or None.
      top1: published ImageNet accuracy at this image size in percent, or None.
      source: the paper that published top1, or None.
    """

    model: str
    image_size: tuple[int, int]
    parameters: int
    macs: int
    activation_bytes: int
    tokens: tuple[int, int] | None
    top1: float | None
    source: str | None


def summarize(
    name: str, *, image_size: int | tuple[int, int] | None = None, num_classes: int = 1000, **options: Any
) -> Summary:
    """Measures a model abstractly, in about a second and without its weights.

    Args:
      name: one of `list_models()`.
      image_size: an int or (height, width) in pixels. None: the size of the published evaluation.
      num_classes: L, the number of classes.
      **options: further options of the model.

    Raises:
      ValueError: an unknown name, or options that exclude each other.
    """
    size = parse_image_size(published_image_size(name) if image_size is None else image_size)
    make = lambda: create_model(name, num_classes=num_classes, image_size=size, **options)
    model = nnx.eval_shape(make)
    net, params, stats = functionalize(model)
    # Two images: BatchNorm cannot be trained with one value per channel, which UperNet has for one image.
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    is_published = size[0] == size[1] and num_classes == 1000 and not options
    result = published.find(name, size[0]) if is_published else None
    return Summary(
        model=name,
        image_size=size,
        parameters=count_parameters(params) + count_parameters(nnx.state(model, Buffer)),
        macs=model_macs(net, params, stats, size),
        activation_bytes=_kept_bytes(net, params, stats, images) // 2,
        tokens=model.grid,
        top1=result.top1 if result else None,
        source=result.source if result and result.top1 is not None else None,
    )


def summarize_info(info: ModelInfo) -> Summary:
    """Measures the model that a checkpoint describes; arguments and errors are those of `summarize`."""
    return summarize(info.model, image_size=info.image_size, num_classes=info.num_classes, **info.options)


def table(summaries: Sequence[Summary]) -> str:
    """Returns a markdown table with one row for each summary."""
    lines = [
        "| model | image | parameters | MACs | activations | published top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for s in summaries:
        size = (
            str(s.image_size[0]) if s.image_size[0] == s.image_size[1] else "x".join(map(str, s.image_size))
        )
        top1 = "" if s.top1 is None else f"{s.top1:.1f}"
        lines.append(
            f"| `{s.model}` | {size} | {s.parameters / 1e6:.1f} M | {s.macs / 1e9:.1f} G "
            f"| {s.activation_bytes / 1e6:.0f} MB | {top1} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    return command.run(lambda: _run(options), debug=options.debug)


def _run(options: argparse.Namespace) -> int:
    sizes = {"image_size": options.image_size, "num_classes": options.num_classes}
    if options.markdown:
        print(model_zoo.tables())
    elif options.all:
        names = sorted(list_models(), key=_natural_key)
        rows = [(name, size) for name in names for size in _sizes(name, options.image_size)]
        print(table([summarize(n, image_size=s, num_classes=options.num_classes) for n, s in rows]))
    elif options.checkpoint:
        _, info = load(options.checkpoint, model=options.model, image_size=options.image_size)
        print(_describe(summarize_info(info), info.options))
    else:
        print("\n\n".join(_describe(summarize(name, **sizes), {}) for name in options.names))
    return 0


def _kept_bytes(net: Net, params: PyTree, stats: PyTree, images: jax.ShapeDtypeStruct) -> int:
    """Bytes that the derivative of the training forward pass keeps, without parameters and images."""

    def kept(params: PyTree, stats: PyTree, images: Array) -> list[Array]:
        given = {id(x) for x in jax.tree.leaves((params, stats, images))}
        forward = lambda p: jax.tree.leaves(net.apply(p, stats, images, train=True)[0])
        residuals = jax.tree.leaves(jax.vjp(forward, params)[1])
        return list({id(x): x for x in residuals if id(x) not in given}.values())

    return sum(x.size * x.dtype.itemsize for x in jax.eval_shape(kept, params, stats, images))


def _describe(s: Summary, options: Mapping[str, Any]) -> str:
    """The text of a model; `options` are those that differ from the model's defaults."""
    height, width = s.image_size
    rows = [
        ("model", s.model),
        ("image", f"{height} x {width}"),
        ("tokens", "none" if s.tokens is None else f"{s.tokens[0]} x {s.tokens[1]}"),
        ("parameters", f"{s.parameters:,} ({s.parameters / 1e6:.2f} M)"),
        ("MACs", f"{s.macs:,} ({s.macs / 1e9:.2f} G) an image"),
        ("activations", f"{s.activation_bytes / 1e6:.1f} MB an image in training, float32"),
        (
            "published",
            "unknown at this size" if s.top1 is None else f"{s.top1} % top-1 on ImageNet ({s.source})",
        ),
    ]
    lines = [f"{title:<12}{text}" for title, text in rows]
    lines.append("options, set by --config.model.options.NAME=VALUE or create_model(…, NAME=VALUE):")
    for name, value in {**model_options(s.model), **options}.items():
        text = f"{name}={value!r}".replace(" ", "")
        lines.append(f"  {text:<23} {MEANINGS.get(name, '')}".rstrip())
    return "\n".join(textwrap.fill(line, 110, subsequent_indent=" " * 26) for line in lines)


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts t2t_vit_7 before t2t_vit_10."""
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", name)]


def _sizes(name: str, requested: tuple[int, int] | None) -> list[int | tuple[int, int]]:
    """The requested size; by default all sizes with a published accuracy, or the model's own size."""
    if requested is not None:
        return [requested]
    return [*published.sides(name)] or [published_image_size(name)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = "Prints parameters, multiply-adds, activation memory and published accuracy of models."
    parser = command.parser("summary", text, EXAMPLES)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="names of models")
    add("--all", action="store_true", help="all models, as a Markdown table")
    add("--markdown", action="store_true", help='with --all: the tables of the page "Model zoo"')
    add(
        "--checkpoint",
        metavar="PATH",
        help="a workdir, a model folder, or a .pth, .pt, .pth.tar or .safetensors file",
    )
    add("--model", metavar="NAME", help="with --checkpoint: architecture, if several have its tensors")
    add("--image-size", type=command.parsed(parse_image_size), metavar="SIZE",
        help="height and width in pixels, 224 or 384x256 (default: the published size, or the "
        "checkpoint's)")  # fmt: skip
    add("--num-classes", type=command.integer(1, 1_000_000), default=1000, metavar="N",
        help="number of classes of named models")  # fmt: skip
    options = parser.parse_args(arguments)
    if bool(options.names) + options.all + bool(options.checkpoint) != 1:
        parser.error("give names of models, --checkpoint or --all")
    if options.markdown and (not options.all or options.image_size or options.num_classes != 1000):
        parser.error("--markdown goes with --all alone: the page has the published sizes and 1,000 classes")
    return options


if __name__ == "__main__":
    sys.exit(main())
