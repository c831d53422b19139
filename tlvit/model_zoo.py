"""The page "Model zoo": the size of each model, its published accuracy and where its weights are."""

import dataclasses
import functools
from collections.abc import Sequence

from flax import nnx

from tlvit import published
from tlvit.checkpoints.model_info import ModelInfo, published_preprocessing
from tlvit.models.functional import count_parameters, functionalize
from tlvit.models.layers import Buffer
from tlvit.models.macs import model_macs
from tlvit.models.table import list_models, published_image_size


@dataclasses.dataclass(frozen=True)
class Family:
    """A section of the page.

    Attributes:
      title: heading.
      prefixes: the names of its models begin with one of these.
    """

    title: str
    prefixes: tuple[str, ...]


FAMILIES = (
    Family("LV-ViT", ("lvvit", "vit")),
    Family("T2T-ViT", ("t2t_",)),
    Family("DeiT", ("deit_",)),
    Family("UperNet over LV-ViT", ("upernet_",)),
    Family("RegNetY, annotators and teachers", ("regnety_",)),
    Family("NFNet, annotators", ("dm_nfnet_",)),
)
CLASSES = {"upernet": 150}  # of the published task, by prefix; all others have the 1,000 of ImageNet


def tables(names: Sequence[str] | None = None) -> str:
    """The Markdown of the page, one section for each family.

    Args:
      names: models to list. None: all except the generic `upernet`.

    Example:
      >>> print(tables(["deit_tiny_patch16_224"]).splitlines()[0])
      ## DeiT
    """
    names = list_models() if names is None else names
    sections = []
    for family in FAMILIES:
        members = [name for name in names if name.startswith(family.prefixes)]
        entries = [(name, side) for name in members for side in published.sides(name) or [_own_side(name)]]
        if entries:
            entries.sort(key=lambda entry: _parameters_and_macs(*entry))
            sections.append("\n\n".join((f"## {family.title}", *_sources(entries), _table(entries))))
    return "\n\n".join(sections)


def _sources(entries: Sequence[tuple[str, int]]) -> list[str]:
    """Paragraphs: sources of the accuracies and weights of a family, and the command that loads a file."""
    found = [entry for entry in (published.find(*entry) for entry in entries) if entry]
    papers = dict.fromkeys(entry.source for entry in found)
    places = dict.fromkeys(entry.release[0] for entry in found)
    if not found:
        return []
    paragraphs = [f"Accuracies: {'; '.join(papers)}. Weights: {'; '.join(places)}."]
    files = [entry for entry in found if entry.file]
    if files:
        first = files[0]
        command = f"tlvit convert --checkpoint={first.file} --model={first.model} --image-size={first.side}"
        paragraphs.append(f"```bash\n{command} --out={first.model}\n```")
    return paragraphs


def _table(entries: Sequence[tuple[str, int]]) -> str:
    lines = [
        "| model | image | parameters | MACs | weights | logits | crop | top-1, % | file of the weights |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, side in entries:
        parameters, macs = _parameters_and_macs(name, side)
        found = published.find(name, side)
        cells = (
            f"`{name}`",
            str(side),
            f"{parameters / 1e6:.1f} M",
            f"{macs / 1e9:.1f} G",
            f"{4 * parameters / 1e6:.0f} MB",
            _rule(name),
            f"{published_preprocessing(name).crop_pct:g}",
            f"{found.top1:.1f}" if found and found.top1 is not None else "",
            _file(found),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@functools.cache
def _parameters_and_macs(name: str, side: int) -> tuple[int, int]:
    """Parameters as PyTorch counts them, and multiply-adds of an image."""
    info = _info(name, side)
    model = nnx.eval_shape(info.build)
    net, params, stats = functionalize(model)
    parameters = count_parameters(params) + count_parameters(nnx.state(model, Buffer))
    return parameters, model_macs(net, params, stats, info.image_size)


def _info(name: str, side: int) -> ModelInfo:
    classes = next((count for prefix, count in CLASSES.items() if name.startswith(prefix)), 1000)
    return ModelInfo(name, classes, (side, side))


def _own_side(name: str) -> int:
    size = published_image_size(name)
    return size if isinstance(size, int) else size[0]


def _rule(name: str) -> str:
    """How the logits of the published evaluation are computed; docs/models.md explains the words."""
    if name.startswith("upernet"):
        return "pixels"
    if name.startswith(("regnety_", "dm_nfnet_")):
        return "pool"
    return "mean of two" if "distilled" in name else ModelInfo(name, 1000, (224, 224)).inference_rule


def _file(found: published.Published | None) -> str:
    if found is None:
        return "none"
    name = f"`{found.file}`" if found.file else "linked"
    return f"{name}, release {found.release[1]}" if found.release[1] else name
