"""Draws the classes of an image's tokens next to the image."""

import colorsys
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


def draw_tokens(image: Image.Image, tokens: np.ndarray, names: Sequence[str] | None = None) -> Image.Image:
    """Draws an image next to the classes of its tokens; the color is the class, its opacity the probability.

    The most frequent classes are named below.

    Args:
      image: the image as the model saw it.
      tokens: float [h, w, L], class probabilities.
      names: name of each class; None: class indices are shown.
    """
    zoom = max(1, round(384 / max(image.size)))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
    classes, probability = tokens.argmax(-1), tokens.max(-1)
    order, counts = np.unique(classes, return_counts=True)
    order = order[np.argsort(-counts, kind="stable")]
    color = {int(c): _hue(i) for i, c in enumerate(order)}
    colors = np.array([[color[int(c)] for c in row] for row in classes], np.uint8)
    enlarge = lambda cells: Image.fromarray(cells).resize(image.size, Image.Resampling.NEAREST)
    flat, alpha = enlarge(colors), enlarge((70 + 130 * probability).astype(np.uint8))
    shown = [int(c) for c in order[:8]]
    canvas = Image.new("RGB", (2 * image.width + 8, image.height + 8 + 16 * len(shown)), "white")
    canvas.paste(image, (0, 0))
    canvas.paste(Image.composite(flat, image, alpha), (image.width + 8, 0))
    drawing = ImageDraw.Draw(canvas)
    for i, c in enumerate(shown):
        y, cells = image.height + 8 + 16 * i, int((classes == c).sum())
        drawing.rectangle((4, y, 16, y + 12), fill=color[c])
        drawing.text((22, y), f"{names[c] if names else c}: {cells} of {classes.size} tokens", fill="black")
    return canvas


def token_path(requested: str, image: pathlib.Path, number: int, count: int) -> pathlib.Path:
    """Returns the file of an image's drawing.

    Args:
      requested: the path that the user gave. It is used unchanged for a single image.
      image: the image file. For several images its number and name are inserted into `requested`.
      number: number of the image, from 1.
      count: number of images.
    """
    path = pathlib.Path(requested)
    if count == 1:
        return path
    return path.with_name(f"{path.stem}_{number:04d}_{image.stem}{path.suffix or '.png'}")


def _hue(i: int) -> tuple[int, int, int]:
    """Color number i; the hue moves by the golden ratio, so that successive colors differ strongly."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + 0.618034 * i) % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
