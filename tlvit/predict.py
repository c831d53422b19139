"""Classifies image files with a trained model.

python -m tlvit.predict WORKDIR photo.jpg                                   # a run, or a model folder
python -m tlvit.predict weights.pth --model=lvvit_s photos/ 'more/*.png'    # a PyTorch file, many images
python -m tlvit.predict MODEL photo.jpg --json --tokens=tokens.png          # and what every token says
"""

import argparse
import colorsys
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
from PIL import Image, ImageDraw

from tlvit.checkpoints.load import load
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing, image_size_pair
from tlvit.models.functional import functionalize

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """A class, its name (its index where names are unknown) and its probability."""

    index: int
    name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Attributes:
    path: of the image.
    top: the most probable classes, best first; empty where the image could not be read.
    tokens: float32 [h, w, L], class probabilities of every token, if they were asked for.
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
    """Classifies image files, a batch at a time, in their order.

    Args:
      model, info: as from `tlvit.load`.
      paths: of images; unreadable ones give a Prediction with an error.
      top: classes a prediction names, at most L.
      batch_size: images the model sees at once.
      tokens: also the probabilities of every token.

    Raises:
      ValueError: tokens of a model that classifies none.
    """
    if tokens and not _has_tokens(model, info):
        raise ValueError(f"This {info.model} has no token head, so its tokens have no classes.")
    net, params, stats = functionalize(model)

    @jax.jit
    def run(params, stats, images):
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
        if good:  # filled up with zeros, so that all batches have one shape and the program is compiled once
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
    """Image files of files, folders (with all below them) and glob patterns, in order; a file that does not
    exist stays in the list, to be reported when it is read.

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
      ValueError: the file is no image or a broken one.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def crop(image: Image.Image, *, image_size: tuple[int, int], crop_pct: float) -> Image.Image:
    """The part that the model sees: resized (bicubic) to cover image_size / crop_pct, then the center.

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop do, and as in tlvit's evaluation.

    Args:
      image: of any size.
      image_size: (height, width) of the result.
    """
    size = (image.height, image.width)
    target = [math.floor(s / crop_pct) for s in image_size]
    zoom = [t / s for t, s in zip(target, size, strict=True)]
    scaled = [
        t if z >= max(zoom) else math.floor(max(zoom) * s + 1e-4)
        for t, z, s in zip(target, zoom, size, strict=True)
    ]
    top, left = (round((s - i) / 2) for s, i in zip(scaled, image_size, strict=True))
    resized = image.resize((scaled[1], scaled[0]), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + image_size[1], top + image_size[0]))


def normalize(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """RGB image -> float32 [H, W, 3], the model's input."""
    pixels = np.asarray(image, np.float32) / 255
    return (pixels - np.asarray(preprocessing.mean, np.float32)) / np.asarray(preprocessing.std, np.float32)


def draw_tokens(image: Image.Image, tokens: np.ndarray, names: Sequence[str] | None = None) -> Image.Image:
    """The image beside itself under the classes of its tokens: the color is the class, its strength the
    probability; the classes that most tokens have are named below.

    Args:
      image: as the model saw it.
      tokens: [h, w, L] probabilities.
      names: of the classes; their indices if not given.
    """
    zoom = max(1, round(384 / max(image.size)))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
    classes, strength = tokens.argmax(-1), tokens.max(-1)
    order, counts = np.unique(classes, return_counts=True)
    order = order[np.argsort(-counts, kind="stable")]
    color = {int(c): _color(i) for i, c in enumerate(order)}
    colors = np.array([[color[int(c)] for c in row] for row in classes], np.uint8)
    enlarge = lambda cells: Image.fromarray(cells).resize(image.size, Image.Resampling.NEAREST)
    flat, alpha = enlarge(colors), enlarge((70 + 130 * strength).astype(np.uint8))
    shown = [int(c) for c in order[:8]]
    canvas = Image.new("RGB", (2 * image.width + 8, image.height + 8 + 16 * len(shown)), "white")
    canvas.paste(image, (0, 0))
    canvas.paste(Image.composite(flat, image, alpha), (image.width + 8, 0))
    draw = ImageDraw.Draw(canvas)
    for i, c in enumerate(shown):
        y, cells = image.height + 8 + 16 * i, int((classes == c).sum())
        draw.rectangle((4, y, 16, y + 12), fill=color[c])
        draw.text((22, y), f"{names[c] if names else c}: {cells} of {classes.size} tokens", fill="black")
    return canvas


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 1 if the model cannot be opened or no image could be read."""
    options = _parse(arguments)
    try:
        paths = list_images(options.images)
        ema = {"auto": None, "ema": True, "raw": False}[options.weights]
        model, info = load(options.checkpoint, model=options.model, ema=ema, image_size=options.image_size)
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
    """The model's input, or what is wrong with the file."""
    try:
        return normalize(_view(path, info), info.preprocessing)
    except ValueError as error:
        return str(error)


def _view(path: pathlib.Path, info: ModelInfo) -> Image.Image:
    image = read_image(path)
    return crop(image, image_size=info.image_size, crop_pct=info.preprocessing.crop_pct)


def _has_tokens(model: nnx.Module, info: ModelInfo) -> bool:
    """Whether the model gives logits for every cell; convolutional models always do."""
    if not hasattr(model, "dense_logits"):
        return False
    images = jax.ShapeDtypeStruct((1, *info.image_size, 3), np.float32)
    net, params, stats = functionalize(model)
    try:
        jax.eval_shape(lambda p, s, x: net.bind(p, s).dense_logits(x), params, stats, images)
    except ValueError:
        return False
    return True


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
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_tokens(_view(result.path, info), result.tokens, info.class_names).save(path)


def _token_path(wanted: str, image: pathlib.Path, number: int, count: int) -> pathlib.Path:
    """As asked for one image; with number and name of the image put in between for several."""
    path = pathlib.Path(wanted)
    return (
        path
        if count == 1
        else path.with_name(f"{path.stem}_{number:04d}_{image.stem}{path.suffix or '.png'}")
    )


def _color(i: int) -> tuple[int, int, int]:
    """Colors far apart from each other: the hue turns by the golden ratio."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb((0.02 + 0.618034 * i) % 1, 0.85, 0.95))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "tlvit.predict", description="Classifies image files with a trained model."
    )
    parser.add_argument(
        "checkpoint", metavar="MODEL", help="a workdir, a model folder, a .pth or .safetensors file"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or glob patterns")
    parser.add_argument("--model", help="name of a PyTorch file's model, where its tensors do not tell")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="auto: EMA where there is one"
    )
    parser.add_argument("--image-size", type=image_size_pair, help="384 or 384x256, to use the model at")
    parser.add_argument("--classes", metavar="FILE", help="class names, one a line")
    parser.add_argument("--top", type=int, default=5, help="classes to print an image")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print a list of all results instead")
    parser.add_argument("--tokens", metavar="PNG", help="draw the class of every token over the image")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
