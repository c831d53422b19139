"""Predicts the class of every pixel of image files with a trained segmentation model, for `tlvit predict`."""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.draw_classes import class_map_image, legend, overlay, percent
from tlvit.images import printable, read_image
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.ops.segmentation import RATIOS, multi_scale_probs
from tlvit.training.segmentation import image_scale, window_predictor
from tlvit.types import Array, PyTree

# Largest number of probabilities of an image, its pixels times the classes: 1 GiB. Larger images are
# predicted at a lower resolution, and their class maps are enlarged.
MAX_PROBABILITIES = 2**28
SHOWN = 5  # classes of an image that are printed


@dataclasses.dataclass(frozen=True)
class Scene:
    """The classes of an image file's pixels.

    Attributes:
      path: the image file.
      image: its pixels, uint8 [H, W, 3]; None if it could not be read.
      classes: int32 [H, W], the class of every pixel.
      error: why the image could not be read or segmented, or None.
    """

    path: pathlib.Path
    image: np.ndarray | None = None
    classes: np.ndarray | None = None
    error: str | None = None


def segment(
    model: nnx.Module,
    info: ModelInfo,
    paths: Iterable[str | pathlib.Path],
    *,
    multi_scale: bool = False,
    exif: bool = True,
) -> Iterator[Scene]:
    """Predicts the classes of the pixels of image files in their order, at the size of each image.

    An image is resized as info.preprocessing.scale says and predicted as a whole or in sliding windows. The
    model is compiled for every new size of windows.

    Args:
      model, info: a segmentation model and its ModelInfo, as returned by `tlvit.load`.
      paths: image files. An unreadable file gives a Scene with an error.
      multi_scale: average the published six sizes, each also mirrored. Takes more than twelve times as long.
      exif: turn images as their EXIF orientation says.

    Raises:
      ValueError: the model is a classifier.

    Example:
      >>> model, info = tlvit.load("runs/upernet_lvvit_s")
      >>> for scene in segment(model, info, ["photo.jpg"]):
      ...     print(info.class_names[scene.classes[0, 0]])
    """
    if getattr(model, "task", "") != "segmentation":
        raise ValueError(f"segment needs a segmentation model; {info.model} is a classifier.")
    run = _compile(model, info, multi_scale=multi_scale)
    return (_scene(run, info, pathlib.Path(path), exif=exif) for path in paths)


def segment_pixels(
    model: nnx.Module, info: ModelInfo, images: Iterable[np.ndarray], *, multi_scale: bool = False
) -> Iterator[tuple[np.ndarray, bool]]:
    """The classes of the pixels of images, uint8 [H, W, 3] each, and whether the model's output is finite."""
    run = _compile(model, info, multi_scale=multi_scale)
    return (_classes(run, info, image) for image in images)


def segment_files(
    model: nnx.Module,
    info: ModelInfo,
    paths: Sequence[pathlib.Path],
    out: pathlib.Path,
    *,
    multi_scale: bool = False,
    exif: bool = True,
    as_json: bool = False,
) -> int:
    """Writes the class map and the overlay of every image and one legend into a folder, and prints the shares
    of the classes.

    Returns:
      The exit status of `tlvit predict`: 1 if no image could be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    records, totals = [], np.zeros(info.num_classes)
    for number, scene in enumerate(segment(model, info, paths, multi_scale=multi_scale, exif=exif), start=1):
        if scene.image is None or scene.classes is None:
            print(f"{printable(scene.path)}: skipped, {scene.error}", file=sys.stderr)
            records.append({"image": printable(scene.path), "error": scene.error})
            continue
        stem = scene.path.stem if len(paths) == 1 else f"{number:04d}_{scene.path.stem}"
        files = {"classes": out / f"{stem}_classes.png", "overlay": out / f"{stem}_overlay.png"}
        class_map_image(scene.classes).save(files["classes"])
        overlay(scene.image, scene.classes).save(files["overlay"])
        counts = np.bincount(scene.classes.ravel(), minlength=info.num_classes)
        totals += counts
        records.append(_record(scene.path, files, counts / counts.sum(), info))
        if not as_json:
            _print(records[-1])
    if totals.any():
        present = np.flatnonzero(totals)
        shares = {int(index): float(totals[index] / totals.sum()) for index in present}
        legend(shares, info.class_names).save(out / "legend.png")
    if as_json:
        print(json.dumps(records, indent=2))
    return 0 if totals.any() else 1


def _compile(
    model: nnx.Module, info: ModelInfo, *, multi_scale: bool
) -> Callable[[np.ndarray], tuple[Array, Array]]:
    """Returns uint8 [1, H, W, 3] -> (classes [1, H, W], whether all probabilities are finite)."""
    net, params, stats = functionalize(model)
    rule = info.preprocessing

    @jax.jit
    def logits_of(params: PyTree, stats: PyTree, images: Array) -> Array:
        return net.apply(params, stats, images)[0].logits

    @jax.jit
    def best(probs: Array) -> tuple[Array, Array]:
        return probs.argmax(-1).astype(jnp.int32), jnp.isfinite(probs).all()

    predict = window_predictor(functools.partial(logits_of, params, stats), rule)

    def run(images: np.ndarray) -> tuple[Array, Array]:
        probs = multi_scale_probs(
            predict,
            normalize(images, rule.mean, rule.std),
            ratios=RATIOS if multi_scale else (1.0,),
            scale=image_scale(images.shape[1:3], rule),
            flip=multi_scale,
        )
        return best(probs)

    return run


def _scene(run: Callable, info: ModelInfo, path: pathlib.Path, *, exif: bool) -> Scene:
    """The classes of an image file's pixels."""
    try:
        image = read_image(path, exif=exif)
    except ValueError as error:
        return Scene(path, error=str(error))
    classes, finite = _classes(run, info, image)
    if not finite:
        return Scene(path, error=f"the output of this {info.model} is NaN or infinite")
    return Scene(path, image, classes)


def _classes(run: Callable, info: ModelInfo, image: np.ndarray) -> tuple[np.ndarray, bool]:
    """The class of every pixel of an image, int32 [H, W], and whether the model's output is finite."""
    height, width = image.shape[:2]
    shrink = min(1.0, (MAX_PROBABILITIES / (height * width * info.num_classes)) ** 0.5)
    pixels = image
    if shrink < 1:
        size = (max(int(width * shrink), 1), max(int(height * shrink), 1))
        pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    classes, finite = jax.device_get(run(pixels[None]))
    classes = classes[0]
    if shrink < 1:
        classes = np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))
    return classes, bool(finite)


def _record(
    path: pathlib.Path, files: dict[str, pathlib.Path], shares: np.ndarray, info: ModelInfo
) -> dict[str, Any]:
    names = info.class_names or tuple(map(str, range(info.num_classes)))
    order = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] > 0]
    found = [{"class": i, "name": names[i], "fraction": float(shares[i])} for i in order]
    return {"image": printable(path), **{k: printable(v) for k, v in files.items()}, "found": found}


def _print(record: dict[str, Any]) -> None:
    print(f"{record['image']} -> {record['classes']}")
    for item in record["found"][:SHOWN]:
        print(f"  {percent(item['fraction']):>7}  {item['name']}")
