"""Classifies image files with a trained model.

python -m tlvit.predict --checkpoint=/runs/lvvit_s photo.jpg
python -m tlvit.predict --checkpoint=weights.pth --model=lvvit_s photos/ 'more/*.png' --json
python -m tlvit.predict --checkpoint=/runs/lvvit_s photo.jpg --tokens=tokens.png
"""

import argparse
import dataclasses
import glob
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from PIL import Image

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import parse_image_size
from tlvit.models.functional import functionalize
from tlvit.ops.normalize import normalize

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """A class with its probability.

    Attributes:
      index: of the class.
      name: its name; the index as text where names are unknown.
      probability: in [0, 1].
    """

    index: int
    name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The result for one image.

    Attributes:
      path: of the image.
      top: the most probable classes, best first; empty if the image could not be read.
      tokens: float32 [h, w, L], class probabilities of every token, if they were requested.
      error: why the image could not be read, or None.
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
) -> Iterator[Prediction]:
    """Classifies image files in their order, a batch at a time.

    Args:
      model: from `tlvit.load`.
      info: from `tlvit.load`; its preprocessing is applied.
      paths: image files. One that cannot be read gives a Prediction with an error.
      top: number of classes in a prediction.
      batch_size: images in a batch.
      tokens: also compute the class probabilities of every token.

    Yields:
      A Prediction for each path.

    Raises:
      ValueError: `tokens` for a model that does not classify its tokens.

    Example:
      >>> model, info = tlvit.load("/runs/lvvit_s")
      >>> for result in tlvit.predict(model, info, ["photo.jpg"]):
      ...     print(result.path, result.top[0].name)
    """
    if tokens and not model.has_dense_logits:
        raise ValueError(f"This {info.model} has no token head, so its tokens have no classes.")
    net, params, stats = functionalize(model)

    @jax.jit
    def run(params, stats, images):
        images = normalize(images, info.preprocessing.mean, info.preprocessing.std)
        output = net.apply(params, stats, images)[0]
        maps = None
        if tokens:
            maps = jax.nn.softmax(net.bind(params, stats).dense_logits(images), axis=-1)
        return jax.nn.softmax(output.logits, axis=-1), maps

    paths = [pathlib.Path(p) for p in paths]
    batch_size = max(1, min(batch_size, len(paths)))
    for start in range(0, len(paths), batch_size):
        read = [_try_read(p, info) for p in paths[start : start + batch_size]]
        good = [x for x in read if not isinstance(x, str)]
        if good:  # padded with zeros: all batches have one shape, and the program is compiled once
            batch = np.stack(good + [np.zeros_like(good[0])] * (batch_size - len(good)))
            probabilities, maps = jax.device_get(run(params, stats, batch))
        row = 0
        for path, image in zip(paths[start : start + batch_size], read, strict=True):
            if isinstance(image, str):
                yield Prediction(path, error=image)
            else:
                best = _best(probabilities[row], info, top)
                yield Prediction(path, best, None if maps is None else maps[row])
                row += 1


def list_images(sources: Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
    """The image files of files, folders (recursively) and glob patterns, in order.

    A file that does not exist stays in the list and is reported when it is read.

    Raises:
      ValueError: a folder or pattern without images.
    """
    found: list[pathlib.Path] = []
    for source in map(pathlib.Path, sources):
        if source.is_dir():
            files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif not source.exists() and glob.has_magic(str(source)):
            files = sorted(
                p for p in map(pathlib.Path, glob.glob(str(source), recursive=True)) if p.is_file()
            )
        else:
            files = [source]
        if not files:
            raise ValueError(f"No images in {source}.")
        found += files
    return found


def read_image(path: str | pathlib.Path) -> Image.Image:
    """Opens an image file as RGB.

    Raises:
      ValueError: the file is not an image, or it is corrupt.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def crop(
    image: Image.Image, *, image_size: tuple[int, int], crop_pct: float, interpolation: str = "bicubic"
) -> Image.Image:
    """Resizes an image to cover image_size / crop_pct and crops its center, as tlvit's evaluation does.

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop do.

    Args:
      image: of any size.
      image_size: (height, width) of the result.
      crop_pct: fraction of the resized image that is kept.
      interpolation: "bicubic" or "bilinear".
    """
    size = (image.height, image.width)
    target = [math.floor(s / crop_pct) for s in image_size]
    zoom = [t / s for t, s in zip(target, size, strict=True)]
    scaled = [
        t if z >= max(zoom) else math.floor(max(zoom) * s + 1e-4)
        for t, z, s in zip(target, zoom, size, strict=True)
    ]
    top, left = (round((s - i) / 2) for s, i in zip(scaled, image_size, strict=True))
    resized = image.resize((scaled[1], scaled[0]), Image.Resampling[interpolation.upper()])
    return resized.crop((left, top, left + image_size[1], top + image_size[0]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 1 if the model cannot be opened or no image could be read."""
    options = _parse(arguments)
    try:
        paths = list_images(options.images)
        model, info = load(
            options.checkpoint, model=options.model, weights=options.weights, image_size=options.image_size
        )
        if options.classes:
            names = pathlib.Path(options.classes).read_text().splitlines()
            info = dataclasses.replace(info, class_names=tuple(names))
        results = []
        for result in predict(
            model, info, paths, top=options.top, batch_size=options.batch_size, tokens=bool(options.tokens)
        ):
            results.append(dataclasses.replace(result, tokens=None))
            _show(result, as_json=options.json)
            if options.tokens and result.error is None:
                _write_tokens(
                    result, info, _token_path(options.tokens, result.path, len(results), len(paths))
                )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([_record(r) for r in results], indent=2))
    return 0 if any(r.error is None for r in results) else 1


def _try_read(path: pathlib.Path, info: ModelInfo) -> np.ndarray | str:
    """The pixels of the model's input, uint8 [H, W, 3], or the reason why the file cannot be read."""
    try:
        return np.asarray(_view(path, info))
    except ValueError as error:
        return str(error)


def _view(path: pathlib.Path, info: ModelInfo) -> Image.Image:
    """The image as the model sees it."""
    how = info.preprocessing
    return crop(
        read_image(path),
        image_size=info.image_size,
        crop_pct=how.crop_pct,
        interpolation=how.interpolation,
    )


def _best(probabilities: np.ndarray, info: ModelInfo, top: int) -> tuple[ClassScore, ...]:
    order = np.argsort(-probabilities, kind="stable")[:top]
    names = info.class_names or range(info.num_classes)
    return tuple(ClassScore(int(i), str(names[i]), float(probabilities[i])) for i in order)


def _show(result: Prediction, *, as_json: bool) -> None:
    if result.error is not None:
        print(f"{result.path}: skipped, {result.error}", file=sys.stderr)
    elif not as_json:
        print(result.path)
        for score in result.top:
            print(f"  {100 * score.probability:5.1f} %  {score.name}")


def _record(result: Prediction) -> dict:
    if result.error is not None:
        return {"image": str(result.path), "error": result.error}
    top = [{"class": s.index, "name": s.name, "probability": s.probability} for s in result.top]
    return {"image": str(result.path), "top": top}


def _write_tokens(result: Prediction, info: ModelInfo, path: pathlib.Path) -> None:
    from tlvit.visualize import draw_tokens

    path.parent.mkdir(parents=True, exist_ok=True)
    draw_tokens(_view(result.path, info), result.tokens, info.class_names).save(path)


def _token_path(wanted: str, image: pathlib.Path, number: int, count: int) -> pathlib.Path:
    """The given path for one image; with the number and name of the image inserted for several."""
    path = pathlib.Path(wanted)
    return (
        path
        if count == 1
        else path.with_name(f"{path.stem}_{number:04d}_{image.stem}{path.suffix or '.png'}")
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tlvit predict",
        description="Classify image files with a trained model.",
        epilog="example:\n  tlvit predict --checkpoint=/runs/lvvit_s photo.jpg photos/ --top=3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, folders or glob patterns")
    add("--checkpoint", required=True, help="a workdir, a model folder, or a .pth or .safetensors file")
    add("--model", help="architecture of a PyTorch file, if its tensors do not tell")
    add(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="auto: those that scored best (auto)",
    )
    add("--image-size", type=parse_image_size, help="384 or 384x256; the checkpoint's by default")
    add("--classes", metavar="FILE", help="class names, one a line")
    add("--top", type=int, default=5, help="number of classes to print (5)")
    add("--batch-size", type=int, default=32, help="images in a batch (32)")
    add("--json", action="store_true", help="print all results as a JSON list")
    add("--tokens", metavar="PNG", help="draw the class of every token over the image")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
