"""Draws the classes of an image's tokens next to the image."""

import colorsys
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "Arial.ttf",
    "arial.ttf",
)  # the first that is installed is used
FONT_SIZE = 12
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
CAPTION = "most probable class of each token; stronger color: higher probability"
FIRST_COLORS = (  # of the classes 0 to 9: Matplotlib's tab10
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
)  # fmt: skip


def draw_tokens(image: Image.Image, tokens: np.ndarray, names: Sequence[str] | None = None) -> Image.Image:
    """Draws an image next to the classes of its tokens; the color is the class, its opacity the probability.

    A class has the same color in every image and in report.png. The most frequent classes are named below.

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
    colors = np.array([[class_color(int(c)) for c in row] for row in classes], np.uint8)
    enlarge = lambda cells: Image.fromarray(cells).resize(image.size, Image.Resampling.NEAREST)
    flat, alpha = enlarge(colors), enlarge((70 + 130 * probability).astype(np.uint8))
    shown = [int(c) for c in order[:8]]
    canvas = Image.new("RGB", (2 * image.width + 8, image.height + 24 + 16 * len(shown)), "white")
    canvas.paste(image, (0, 0))
    gray = image.convert("L").convert("RGB")  # its own colors would change those of the classes
    canvas.paste(Image.composite(flat, gray, alpha), (image.width + 8, 0))
    drawing, font = ImageDraw.Draw(canvas), drawing_font()
    drawing.text((4, image.height + 8), CAPTION, fill="black", font=font)
    for i, c in enumerate(shown):
        y, cells = image.height + 24 + 16 * i, int((classes == c).sum())
        drawing.rectangle((4, y, 16, y + 12), fill=class_color(c))
        text = writable(f"{names[c] if names else c}: {cells} of {classes.size} tokens", font)
        drawing.text((22, y), text, fill="black", font=font)
    return canvas


def check_token_path(requested: str) -> None:
    """Raises ValueError unless the name ends like an image file that can be written."""
    if pathlib.Path(requested).suffix.lower() not in ENDINGS:
        raise ValueError(f"Drawings are written as {' or '.join(ENDINGS)}, not as {requested}.")


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


def class_color(index: int) -> tuple[int, int, int]:
    """The color of a class, (red, green, blue) from 0 to 255.

    The first ten classes have the colors of Matplotlib's tab10. Then the hue moves by the golden ratio, so
    that the colors of successive classes differ strongly, and every seventh class is darker or paler.
    """
    if index < len(FIRST_COLORS):
        return FIRST_COLORS[index]
    saturation, value = ((0.85, 0.95), (0.9, 0.6), (0.5, 0.95))[index // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.69 + 0.618034 * index) % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def drawing_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with the letters of many languages if one is installed, else Pillow's, which has Latin-1."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, FONT_SIZE)
        except OSError:  # it is not installed, or Pillow was built without FreeType
            pass
    return getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()  # Pillow 11.3


def writable(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text with ? in place of letters that Pillow's own font cannot write."""
    if isinstance(font, ImageFont.ImageFont):
        return text.encode("latin-1", "replace").decode("latin-1")
    return text
