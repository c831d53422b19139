"""Classifies image files with a trained model, or their pixels with a segmentation model.

tlvit predict --checkpoint=WORKDIR photo.jpg                    # a run or a model folder
tlvit predict --checkpoint=weights.pth photos/ 'more/*.png'     # a PyTorch file, many images
tlvit predict --checkpoint=WORKDIR photos/ --out=photos.csv --tta=flip  # a table of many images
tlvit predict --checkpoint=WORKDIR photo.jpg --json             # machine-readable
tlvit predict --checkpoint=WORKDIR photo.jpg --tokens=out.png   # draw the classes of the tokens
tlvit predict --checkpoint=WORKDIR photos/ --out=FOLDER         # segmentation: class maps and overlays

An image that cannot be read is reported and left out. The exit status is 1 after an error or if no image
could be read.
"""

import argparse
import dataclasses
import functools
import glob
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from tlvit import command
from tlvit.checkpoint_flags import add_flags
from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.class_names import read_class_names
from tlvit.config import MAX_BATCH
from tlvit.draw_tokens import check_token_path, draw_tokens, token_path
from tlvit.host_memory import check_batch
from tlvit.images import SUFFIXES, printable, read_image
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize
from tlvit.prediction_files import check_ending, progress, write_predictions
from tlvit.segment import segment_files
from tlvit.types import Array, PyTree

VIEWS = ("flip", "crops")  # of test-time augmentation
POSITIONS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))  # of crops
LONG = 8  # resized images of more than this many times the crop's pixels are not made completely


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """A class and its probability.

    Attributes:
      index: the class index.
      name: the class name, or the index as text if names are unknown.
      probability: in [0, 1].
    """

    index: int
    name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says about one image file.

    Attributes:
      path: the image file.
      top: the most probable classes, best first; empty if the image could not be read.
      tokens: float32 [h, w, L], class probabilities of every token, if they were requested.
      error: why the image could not be read or classified, or None.
    """

    path: pathlib.Path
    top: tuple[ClassScore, ...] = ()
    tokens: np.ndarray | None = None
    error: str | None = None


def predict(
    model: nnx.Module,
    info: ModelInfo,
    paths: Iterable[str | pathlib.Path],
    *,
    top: int = 5,
    batch_size: int = 32,
    tokens: bool = False,
    exif: bool = True,
    tta: Sequence[str] = (),
) -> Iterator[Prediction]:
    """Classifies image files in their order, one batch at a time.

    Args:
      model, info: the model and its ModelInfo, as returned by `tlvit.load`.
      paths: image files. An unreadable file gives a Prediction with an error.
      top: number of classes in a prediction, at least 1. More than L gives all L.
      batch_size: number of images in a batch, at least 1.
      tokens: also return the class probabilities of every token. They are weaker without a token head, see
        `dense_logits` of the model.
      exif: turn images as their EXIF orientation says.
      tta: test-time augmentation, the views whose probabilities are averaged: "flip" adds the mirrored image,
        "crops" the four corners of the resized image to its center; both together are ten views.

    Returns:
      An iterator with one Prediction for each path.

    Raises:
      ValueError: the model is no classifier, `top` or `batch_size` is below 1, a view is unknown, tokens are
        requested of several views, or the batches do not fit into the memory of this host.

    Example:
      >>> model, info = tlvit.load("runs/lvvit_s")
      >>> for prediction in tlvit.predict(model, info, ["photo.jpg"]):
      ...     print(prediction.top[0].name)
    """
    if getattr(model, "task", "") != "classification":
        raise ValueError(
            f"predict classifies images; {info.model} is a segmentation model: use tlvit.segment."
        )
    for name, value in (("top", top), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be at least 1, and an integer, not {value!r}.")
    if unknown := sorted(set(tta) - set(VIEWS)):
        raise ValueError(f"Views of test-time augmentation are {' and '.join(VIEWS)}, not {unknown[0]!r}.")
    if tta and tokens:
        raise ValueError("Tokens belong to one view of an image: leave out tta or tokens.")
    files = [pathlib.Path(path) for path in paths]
    batch_size = max(1, min(batch_size, len(files)))
    views = (2 if "flip" in tta else 1) * (len(POSITIONS) if "crops" in tta else 1)
    check_batch(batch_size * views, info.image_size, "batch size")
    run = _compile(model, info, tokens=tokens)
    read = functools.partial(_try_read, info=info, exif=exif, tta=frozenset(tta))
    return _predictions(run, read, info, files, top=top, batch_size=batch_size)


def _predictions(
    run: Callable, read: Callable, info: ModelInfo, files: list[pathlib.Path], *, top: int, batch_size: int
) -> Iterator[Prediction]:
    """The predictions of `predict`, for the compiled model `run` and the function that reads an image."""
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        inputs = [read(path) for path in chunk]
        images = [image for image in inputs if not isinstance(image, str)]
        probabilities, maps = np.empty((0, info.num_classes)), None
        if images:  # padded with zeros, so that all batches have one shape and compile once
            padding = [np.zeros_like(images[0])] * (batch_size - len(images))
            views = np.stack(images + padding)  # [B, V, H, W, 3]
            probabilities, maps = run(views.reshape(-1, *views.shape[2:]))
            probabilities = probabilities.reshape(*views.shape[:2], -1).mean(1)
        row = 0
        for path, image in zip(chunk, inputs, strict=True):
            if isinstance(image, str):
                yield Prediction(path, error=image)
            else:
                yield _prediction(path, probabilities[row], None if maps is None else maps[row], info, top)
                row += 1


def _prediction(
    path: pathlib.Path, probabilities: np.ndarray, tokens: np.ndarray | None, info: ModelInfo, top: int
) -> Prediction:
    """What the model says about an image; an error if that is NaN, which JSON does not have."""
    if not np.isfinite(probabilities).all():
        return Prediction(path, error=f"the output of this {info.model} is NaN or infinite")
    return Prediction(path, _best(probabilities, info, top), tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 1 after an error or if no image could be read."""
    options = _parse(arguments)
    return command.run(lambda: _run(options), debug=options.debug)


def _run(options: argparse.Namespace) -> int:
    if options.tokens:
        check_token_path(options.tokens)
        command.check_writable(options.tokens, folder=False)
    paths = list_images(options.images)
    model, info = load(
        options.checkpoint, model=options.model, weights=options.weights, image_size=options.image_size
    )
    if options.classes:
        names = read_class_names(options.classes, info.num_classes)
        info = dataclasses.replace(info, class_names=names)
    results, exif = [], options.exif == "apply"
    if getattr(model, "task", "") == "segmentation":
        return _segment(options, model, info, paths)
    _check_flags(options, info)
    how = {"top": options.top, "batch_size": options.batch_size, "tokens": bool(options.tokens)}
    how["tta"] = options.tta
    if options.out:
        check_ending(options.out)
        command.check_writable(options.out, folder=False)
        records = progress(map(_record, predict(model, info, paths, exif=exif, **how)), len(paths))
        done, errors = write_predictions(options.out, records, top=min(options.top, info.num_classes))
        print(f"{done} images, {errors} of them with an error, written to {options.out}")
        return 0 if errors < done else 1
    for result in predict(model, info, paths, exif=exif, **how):
        results.append(dataclasses.replace(result, tokens=None))
        _print_result(result, as_json=options.json)
        if result.tokens is not None:
            image = read_view(result.path, info, exif=exif)
            file = token_path(options.tokens, result.path, len(results), len(paths))
            file.parent.mkdir(parents=True, exist_ok=True)
            draw_tokens(image, result.tokens, info.class_names).save(file)
            print(f"tokens drawn in {printable(file)}", file=sys.stderr)
    if options.json:
        print(json.dumps([_record(result) for result in results], indent=2))
    return 0 if any(result.error is None for result in results) else 1


def _check_flags(options: argparse.Namespace, info: ModelInfo) -> None:
    """Raises a ValueError for flags that have no effect with a classifier."""
    if options.multi_scale:
        raise ValueError(f"--multi-scale is for segmentation; {info.model} is a classifier.")
    for flag, given in (("--tokens", options.tokens), ("--json", options.json)):
        if options.out and given:
            raise ValueError(f"--out writes only a table of predictions: leave out {flag} or --out.")


def _segment(
    options: argparse.Namespace, model: nnx.Module, info: ModelInfo, paths: list[pathlib.Path]
) -> int:
    """The command for a segmentation model."""
    if options.tokens:
        raise ValueError(f"--tokens is for classifiers; {info.model} writes class maps: --out=FOLDER.")
    if options.tta:
        raise ValueError(f"--tta is for classifiers; {info.model} averages several sizes with --multi-scale.")
    if not options.out:
        raise ValueError(f"{info.model} predicts the class of every pixel: say where to with --out=FOLDER.")
    out, exif = pathlib.Path(options.out), options.exif == "apply"
    command.check_writable(out, folder=True)
    how = {"multi_scale": options.multi_scale, "as_json": options.json}
    return segment_files(model, info, paths, out, exif=exif, **how)


def list_images(sources: Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
    """Lists the image files of files, folders (recursively) and glob patterns, in order.

    A file that does not exist stays in the list; the error is reported when it is read. Pipes and broken
    links in a folder are left out.

    Raises:
      ValueError: a folder or pattern without images.
    """
    found: list[pathlib.Path] = []
    for source in map(pathlib.Path, sources):
        if source.is_dir():
            files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif not source.exists() and glob.has_magic(str(source)):
            matches = map(pathlib.Path, glob.glob(str(source), recursive=True))
            files = sorted(path for path in matches if path.is_file())
        else:
            files = [source]
        if not files:
            raise ValueError(f"No images in {printable(source)}.")
        found += files
    return found


def crop(
    image: Image.Image,
    *,
    image_size: tuple[int, int],
    crop_pct: float,
    interpolation: str = "bicubic",
    position: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """Returns the part that the model sees: resized to cover image_size / crop_pct, then center-cropped.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop and in tlvit's evaluation.

    Args:
      image: an image of any size.
      image_size: (height, width) of the result in pixels.
      crop_pct: in (0, 1].
      interpolation: "bicubic" or "bilinear".
      position: vertical and horizontal place of the crop: 0 is the top or left border, 0.5 the center, 1 the
        other border.
    """
    size = (image.height, image.width)
    target = [math.floor(s / crop_pct) for s in image_size]
    zoom = [t / s for t, s in zip(target, size, strict=True)]
    scaled = [
        t if z >= max(zoom) else math.floor(max(zoom) * s + 1e-4)
        for t, z, s in zip(target, zoom, size, strict=True)
    ]
    top, left = (round((s - i) * p) for s, i, p in zip(scaled, image_size, position, strict=True))
    bottom, right, kernel = top + image_size[0], left + image_size[1], Image.Resampling[interpolation.upper()]
    if scaled[0] * scaled[1] <= LONG * image_size[0] * image_size[1]:
        return image.resize((scaled[1], scaled[0]), kernel).crop((left, top, right, bottom))
    # The resized image would be many times the crop, as for 30000 x 1 pixels: only the crop is resized.
    y, x = size[0] / scaled[0], size[1] / scaled[1]
    box = (max(left * x, 0), max(top * y, 0), min(right * x, size[1]), min(bottom * y, size[0]))
    return image.resize((image_size[1], image_size[0]), kernel, box=box)


def _compile(
    model: nnx.Module, info: ModelInfo, *, tokens: bool
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]:
    """Returns uint8 [B, H, W, 3] -> (probabilities [B, L], probabilities [B, h, w, L] or None)."""
    net, params, stats = functionalize(model)

    @jax.jit
    def run(params: PyTree, stats: PyTree, images: Array) -> tuple[Array, Array | None]:
        images = normalize(images, info.preprocessing.mean, info.preprocessing.std)
        output, _ = net.apply(params, stats, images)
        maps = None
        if tokens:
            maps = jax.nn.softmax(net.bind(params, stats).dense_logits(images), axis=-1)
        return jax.nn.softmax(output.logits, axis=-1), maps

    return lambda images: jax.device_get(run(params, stats, images))


def _try_read(
    path: pathlib.Path, info: ModelInfo, *, exif: bool, tta: frozenset[str] = frozenset()
) -> np.ndarray | str:
    """The views of an image, uint8 [V, H, W, 3], or why the file cannot be read."""
    positions = POSITIONS if "crops" in tta else POSITIONS[:1]
    try:
        views = np.stack([np.asarray(read_view(path, info, exif=exif, position=p)) for p in positions])
    except ValueError as error:
        return str(error)
    return np.concatenate([views, views[:, :, ::-1]]) if "flip" in tta else views


def read_view(
    path: pathlib.Path,
    info: ModelInfo,
    *,
    exif: bool = True,
    position: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """The part of an image file that the model sees, or the one at another position (see `crop`)."""
    rule, image = info.preprocessing, Image.fromarray(read_image(path, exif=exif))
    size, crop_pct = info.image_size, rule.crop_pct
    how = {"interpolation": rule.interpolation, "position": position}
    return crop(image, image_size=size, crop_pct=crop_pct, **how)


def _best(probabilities: np.ndarray, info: ModelInfo, top: int) -> tuple[ClassScore, ...]:
    order = np.argsort(-probabilities, kind="stable")[:top]
    names = info.class_names or range(info.num_classes)
    return tuple(ClassScore(int(i), str(names[i]), float(probabilities[i])) for i in order)


def _print_result(result: Prediction, *, as_json: bool) -> None:
    if result.error is not None:
        print(f"{printable(result.path)}: skipped, {result.error}", file=sys.stderr)
    elif not as_json:
        print(printable(result.path))
        for score in result.top:
            print(f"  {100 * score.probability:5.1f} %  {score.name}")


def _record(result: Prediction) -> dict[str, Any]:
    if result.error is not None:
        return {"image": printable(result.path), "error": result.error}
    top = [{"class": s.index, "name": s.name, "probability": s.probability} for s in result.top]
    return {"image": printable(result.path), "top": top}


def _tta(text: str) -> tuple[str, ...]:
    """("flip", "crops") of "flip,crops"."""
    names = tuple(text.split(","))
    if not set(names) <= set(VIEWS):
        raise ValueError(f"must be {' or '.join(VIEWS)} or both, such as flip,crops, not {text!r}")
    return names


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, examples = __doc__.replace("\ntlvit", "\n  tlvit").split("\n\n", 1)
    parser = command.parser("predict", description, examples)
    add = parser.add_argument
    add_flags(parser, "--checkpoint")
    add("images", nargs="+", metavar="IMAGE", help="image files, folders or glob patterns")
    add_flags(parser, "--model", "--weights", "--classes", "--image-size")
    add("--top", type=command.integer(1, 1_000_000), default=5, metavar="N", help="classes for each image")
    add("--batch-size", type=command.integer(1, MAX_BATCH), default=32, metavar="N", help="images in a batch")
    add("--json", action="store_true",
        help="print all results as one JSON list; with a classifier, not together with --out")  # fmt: skip
    add("--tokens", metavar="PNG",
        help="with a classifier, without --out: draw the classes of the tokens into PNG; with several images "
        "out.png becomes out_0001_NAME.png and so on")  # fmt: skip
    add(
        "--out",
        metavar="PATH",
        help="FILE.csv or FILE.json of a classifier's predictions; or folder of a segmentation model's "
        "NAME_classes.png (indices), NAME_overlay.png and legend.png",
    )
    add("--tta", type=command.parsed(_tta), default=[], metavar="LIST",
        help="with a classifier: average the probabilities of several views: flip, crops (four corners "
        "and center) or both")  # fmt: skip
    add("--multi-scale", action="store_true",
        help="with a segmentation model: average six image sizes, each also mirrored")  # fmt: skip
    add("--exif", choices=("apply", "ignore"), default="apply",
        help="turn images as their EXIF orientation says")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
