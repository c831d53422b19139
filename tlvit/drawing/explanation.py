"""Draws what vision transformers see in images: attention, relevance for classes, classes of tokens."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlvit.checkpoints.load import Opened
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.drawing.panels import Panel, draw_panels, namer
from tlvit.images import printable
from tlvit.models.functional import functionalize
from tlvit.models.relevance import check_attention, relevance_map, rollout_map
from tlvit.ops.normalize import normalize
from tlvit.predict import read_view
from tlvit.types import Array, PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("relevance", "attention", "tokens")
TITLES = {
    "attention": "attention rollout of the class token",
    "relevance": "relevance of the patches for a class",
    "tokens": "classes of the tokens",
}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a model says about one image.

    Attributes:
      probability: float [L], of the classes.
      classes: int [K], the classes that are explained: those of `maps` if they are relevance.
      maps: float [K, h, w], relevance; [1, h, w], attention; or [1, h, w, L], class probabilities of the
        tokens.
    """

    probability: np.ndarray
    classes: np.ndarray
    maps: np.ndarray


def draw_explanations(
    kind: str,
    models: Sequence[Opened],
    paths: Sequence[pathlib.Path],
    *,
    classes: Sequence[str] = (),
    top: int = 2,
    exif: bool = True,
) -> "Figure":
    """Draws one row for each image: the image as the first model sees it, then the panels of each model.

    Args:
      kind: "attention", "relevance" or "tokens".
      models: opened checkpoints; with more than one their names are in the titles.
      paths: image files.
      classes: names or indices of the classes whose relevance is drawn. Empty: each model's most probable.
      top: number of most probable classes.
      exif: turn images as their EXIF orientation says.

    Returns:
      A matplotlib Figure.

    Raises:
      ValueError: a model has no attention or no classes of tokens, a class is unknown, or an image cannot be
        read.
    """
    chosen = [[class_index(text, opened.info) for text in classes] for opened in models]
    runs = [
        explainer(opened.model, opened.info, kind, classes=wanted, top=top)
        for opened, wanted in zip(models, chosen, strict=True)
    ]
    rows = []
    for path in paths:
        row = [Panel(_pixels(path, models[0].info, exif), title=printable(path.name)[-28:])]
        for opened, run in zip(models, runs, strict=True):
            image = _pixels(path, opened.info, exif)
            name = f"{opened.info.model}\n" if len(models) > 1 else ""
            row += _panels(kind, image, run(image), namer(opened.info.class_names), name)
        rows.append(row)
    names = models[0].info.class_names if kind == "tokens" else None
    title = TITLES[kind] if len(models) > 1 else f"{models[0].info.model}: {TITLES[kind]}"
    return draw_panels(rows, class_names=names, title=title)


def explainer(
    model: nnx.Module, info: ModelInfo, kind: str, *, classes: Sequence[int] = (), top: int = 1
) -> Callable[[np.ndarray], Explanation]:
    """Compiles a model for one kind of picture, as a function of an image, uint8 [H, W, 3].

    Args:
      model, info: as returned by `tlvit.load`.
      kind: "attention", "relevance" or "tokens".
      classes: the classes that are explained. Empty: the `top` most probable ones.
      top: at least 1. More than L gives all L.

    Raises:
      ValueError: the model has no attention, or for "tokens" no classes of tokens.
    """
    if getattr(model, "task", "") != "classification":
        raise ValueError(f"{info.model} is a segmentation model; pictures are drawn of classifiers.")
    if kind != "tokens":
        check_attention(model)
    elif not model.has_token_head and model.grid is not None:  # the classifier is not trained on its tokens
        raise ValueError(f"This {info.model} has no token head, so its tokens have no classes.")
    net, params, stats = functionalize(model)

    @jax.jit
    def run(params: PyTree, stats: PyTree, image: Array) -> tuple[Array, Array, Array]:
        images = normalize(image[None], info.preprocessing.mean, info.preprocessing.std)
        bound = net.bind(params, stats)
        logits = net.apply(params, stats, images)[0].logits[0]
        chosen = jnp.asarray(classes, jnp.int32)
        if not len(classes):
            chosen = jax.lax.top_k(logits, min(top, info.num_classes))[1]
        if kind == "tokens":
            maps = jax.nn.softmax(bound.dense_logits(images), axis=-1)
        elif kind == "attention":
            maps = rollout_map(bound, images)
        else:
            maps = relevance_map(bound, images, chosen[None])[0]
        return jax.nn.softmax(logits), chosen, maps

    return lambda image: Explanation(*jax.device_get(run(params, stats, image)))


def class_index(text: str, info: ModelInfo) -> int:
    """The index of a class that is given by its name or its index.

    Raises:
      ValueError: there is no such class.
    """
    names = info.class_names or ()
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < info.num_classes:
        return int(text)
    raise ValueError(
        f"{info.model} has no class {text!r}: give one of its names or an index below {info.num_classes}."
    )


def _panels(
    kind: str, image: np.ndarray, found: Explanation, named: Callable[[int], str], model: str
) -> list[Panel]:
    """The panels of a model for one image. `model` is the first line of their titles."""
    name = lambda k: named(int(k))[:24]
    percent = lambda k: f"{100 * found.probability[k]:.0f} %"
    if kind == "relevance":
        pairs = zip(found.classes, found.maps, strict=True)
        return [
            Panel(image, f"{model}relevance for {name(k)}", f"probability {percent(k)}", heat=heat)
            for k, heat in pairs
        ]
    best = found.probability.argmax()
    best = f"whole image: {name(best)} ({percent(best)})"
    if kind == "tokens":
        return [Panel(image, f"{model}classes of the tokens", best, probability=found.maps[0])]
    return [Panel(image, f"{model}attention", best, heat=found.maps[0])]


def _pixels(path: pathlib.Path, info: ModelInfo, exif: bool) -> np.ndarray:
    """The part of an image file that a model sees, uint8 [H, W, 3]."""
    try:
        return np.asarray(read_view(path, info, exif=exif))
    except ValueError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error}.") from error
