"""What a model costs: parameters, multiply-adds, activation memory, image size, and its published accuracy.

    python -m tlvit.summary lvvit_s              # one model; --image-size=384, --num-classes=10
    python -m tlvit.summary --all                # the README's table, as markdown

Nothing is typed in but the published accuracies: multiply-adds are counted in the traced program and memory
in the arrays that its derivative keeps; no weights are made.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.checkpoints.model_info import default_image_size, image_size_pair
from tlvit.models.functional import count_parameters, functionalize
from tlvit.models.layers import Buffer
from tlvit.models.macs import model_macs
from tlvit.models.table import create_model, list_models
from tlvit.types import Array, PyTree

PAPERS = {
    "lvvit": "Jiang et al. 2021, arXiv:2104.10858",
    "vit": "Jiang et al. 2021, arXiv:2104.10858",
    "t2t": "Yuan et al. 2021, arXiv:2101.11986",
    "deit": "Touvron et al. 2021, arXiv:2012.12877",
    "regnety": "Touvron et al. 2021, arXiv:2012.12877 (DeiT's teacher)",
    "dm_nfnet": "Brock et al. 2021, arXiv:2102.06171",
}

# ImageNet top-1 in percent by (model, image side), as the papers above and their repositories state it.
PUBLISHED_TOP1 = {
    ("lvvit_t", 224): 79.1,
    ("lvvit_s", 224): 83.3,
    ("lvvit_s", 384): 84.4,
    ("lvvit_m", 224): 84.0,
    ("lvvit_m", 384): 85.4,
    ("lvvit_m", 448): 85.5,
    ("lvvit_l", 448): 86.2,
    ("lvvit_l", 512): 86.4,
    ("t2t_vit_7", 224): 71.7,
    ("t2t_vit_10", 224): 75.2,
    ("t2t_vit_12", 224): 76.5,
    ("t2t_vit_14", 224): 81.5,
    ("t2t_vit_14", 384): 83.3,
    ("t2t_vit_19", 224): 81.9,
    ("t2t_vit_24", 224): 82.3,
    ("t2t_vit_t_14", 224): 81.7,
    ("t2t_vit_t_19", 224): 82.4,
    ("t2t_vit_t_24", 224): 82.6,
    ("deit_tiny_patch16_224", 224): 72.2,
    ("deit_small_patch16_224", 224): 79.9,
    ("deit_base_patch16_224", 224): 81.8,
    ("deit_base_patch16_384", 384): 82.9,
    ("deit_tiny_distilled_patch16_224", 224): 74.5,
    ("deit_small_distilled_patch16_224", 224): 81.2,
    ("deit_base_distilled_patch16_224", 224): 83.4,
    ("deit_base_distilled_patch16_384", 384): 85.2,
    ("regnety_160", 224): 82.9,
    ("dm_nfnet_f0", 256): 83.6,
    ("dm_nfnet_f1", 320): 84.7,
    ("dm_nfnet_f2", 352): 85.1,
    ("dm_nfnet_f3", 416): 85.7,
    ("dm_nfnet_f4", 512): 85.9,
    ("dm_nfnet_f5", 544): 86.0,
    ("dm_nfnet_f6", 576): 86.5,  # trained with SAM, as its published weights are
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Attributes:
    model: name.
    image_size: (height, width).
    parameters: scalars as PyTorch counts them: T2T-ViT's fixed tables too, not BatchNorm's statistics.
    macs: multiply-adds of the matrix products and convolutions for one image.
    activation_bytes: what the backward pass of one image keeps in float32, without rematerialisation.
    tokens: (h, w) of the token grid, or None.
    top1: published ImageNet accuracy at this size, percent, or None.
    source: of top1.
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
    name: str, *, image_size: int | tuple[int, int] | None = None, num_classes: int = 1000, **overrides
) -> Summary:
    """Counts what a model costs, abstractly: in a second or so and without its weights.

    Args:
      name: one of `list_models()`.
      image_size: int or (height, width); the one of the published evaluation by default.
      num_classes: L.
      **overrides: further options of the model.

    Raises:
      ValueError: an unknown name, or options that do not fit together.
    """
    size = image_size_pair(default_image_size(name) if image_size is None else image_size)
    model = nnx.eval_shape(lambda: create_model(name, num_classes=num_classes, image_size=size, **overrides))
    net, params, stats = functionalize(model)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    top1 = PUBLISHED_TOP1.get((name, size[0])) if size[0] == size[1] and not overrides else None
    papers = [paper for prefix, paper in PAPERS.items() if name.startswith(prefix)]
    return Summary(
        model=name,
        image_size=size,
        parameters=count_parameters(params) + count_parameters(nnx.state(model, Buffer)),
        macs=model_macs(net, params, stats, size),
        activation_bytes=_kept_bytes(net, params, stats, images),
        tokens=getattr(model, "grid", None),
        top1=top1,
        source=papers[0] if top1 is not None else None,
    )


def table(summaries: Sequence[Summary]) -> str:
    """A markdown table, one line a model."""
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
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("tlvit.summary", description="What a model costs.")
    parser.add_argument("model", nargs="*", help="one or more names")
    parser.add_argument("--all", action="store_true", help="every model, as a markdown table")
    parser.add_argument(
        "--image-size", type=image_size_pair, help="224 or 384x256; the published one by default"
    )
    parser.add_argument("--num-classes", type=int, default=1000)
    options = parser.parse_args(arguments)
    if bool(options.model) == options.all:
        parser.error("give model names or --all")
    try:
        if options.all:
            rows = [
                (n, s) for n in sorted(list_models(), key=_natural) for s in _sizes(n, options.image_size)
            ]
            print(table([summarize(n, image_size=s, num_classes=options.num_classes) for n, s in rows]))
        for name in options.model:
            print(_describe(summarize(name, image_size=options.image_size, num_classes=options.num_classes)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _kept_bytes(net, params: PyTree, stats: PyTree, images: Array) -> int:
    """Bytes that the derivative of the training forward pass keeps, parameters and images not counted."""

    def kept(params, stats, images):
        given = {id(x) for x in jax.tree.leaves((params, stats, images))}
        forward = lambda p: jax.tree.leaves(net.apply(p, stats, images, train=True)[0])
        residuals = jax.tree.leaves(jax.vjp(forward, params)[1])
        return list({id(x): x for x in residuals if id(x) not in given}.values())

    return sum(x.size * x.dtype.itemsize for x in jax.eval_shape(kept, params, stats, images))


def _describe(s: Summary) -> str:
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
    return "\n".join(f"{title:<12}{text}" for title, text in rows)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key by which t2t_vit_7 comes before t2t_vit_10."""
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", name)]


def _sizes(name: str, wanted: tuple[int, int] | None) -> list[int | tuple[int, int]]:
    """The size asked for, or all that an accuracy is published for, or the default one."""
    if wanted is not None:
        return [wanted]
    return [size for model, size in PUBLISHED_TOP1 if model == name] or [default_image_size(name)]


if __name__ == "__main__":
    sys.exit(main())
