"""Pictures of segmentation: class maps as PNG files with a palette, overlays in color, and a legend."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from tlvit.draw_tokens import class_color, drawing_font, writable
from tlvit.types import IGNORE

OPACITY = 0.6  # of the colors of classes over an image
COLUMNS = 4  # of the legend
ROW, COLUMN = 18, 190  # pixels


def class_map_image(classes: np.ndarray) -> Image.Image:
    """The class of every pixel as an image to save as PNG: its values are the indices, its palette shows the
    colors of the classes. More than 256 classes are written as 16 bits without colors.

    Args:
      classes: integers [H, W], at least 0.
    """
    if classes.max(initial=0) > 255:
        return Image.fromarray(classes.astype(np.uint16))
    image = Image.fromarray(classes.astype(np.uint8)).convert("P")
    image.putpalette([value for index in range(256) for value in class_color(index)])
    return image


def overlay(image: np.ndarray, classes: np.ndarray) -> Image.Image:
    """An image in gray under the colors of its classes.

    Args:
      image: uint8 [H, W, 3].
      classes: integers [H, W]; pixels of the class IGNORE stay gray.
    """
    gray = image.mean(-1, keepdims=True)
    table = np.array([class_color(index) for index in range(int(classes.max(initial=0)) + 1)], np.float32)
    mixed = (1 - OPACITY) * gray + OPACITY * table[classes]
    known = (classes != IGNORE)[..., None]
    return Image.fromarray(np.where(known, mixed, gray).round().astype(np.uint8))


def legend(fractions: Mapping[int, float], names: Sequence[str] | None = None) -> Image.Image:
    """The color, name and share of each class.

    Args:
      fractions: class index -> fraction of the pixels.
      names: name of each class; None: class indices are shown.
    """
    order = sorted(fractions, key=lambda index: -fractions[index])
    columns = min(COLUMNS, max(len(order), 1))
    rows = -(-max(len(order), 1) // columns)
    canvas = Image.new("RGB", (COLUMN * columns + 8, ROW * rows + 8), "white")
    drawing, font = ImageDraw.Draw(canvas), drawing_font()
    for place, index in enumerate(order):
        column, row = divmod(place, rows)
        x, y = 6 + COLUMN * column, 5 + ROW * row
        drawing.rectangle((x, y, x + 12, y + 12), fill=class_color(index))
        text = f"{names[index] if names else index}  {percent(fractions[index])}"
        drawing.text((x + 18, y), writable(text, font), fill="black", font=font)
    return canvas


def percent(fraction: float) -> str:
    """A fraction as text, "12.3 %"; "<0.1 %" if it would be rounded to 0."""
    return "<0.1 %" if 0 < fraction < 0.0005 else f"{100 * fraction:.1f} %"
