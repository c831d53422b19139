"""Turns image files into pixels: the one definition of how every kind of image becomes uint8 RGB.

`tlvit predict` reads images with it. The input pipeline decodes JPEG and PNG files with TensorFlow, which
gives the same pixels, and everything else with it (`tlvit.data.transforms.decode`).

- Gray and palette images get the colors that they show. Transparency is dropped: a transparent pixel has the
  color that is stored for it.
- 16 bits become 8 by dropping the lower half. 32-bit and floating-point pixels are refused, because the file
  does not say which value is white.
- CMYK becomes (255 - C) (255 - K) / 255, and so on. Color profiles are not applied.
- Of an animation the first frame is read.
- The EXIF orientation of JPEG, PNG and WebP files is applied or ignored, as the caller asks. The orientation
  of a TIFF file is a part of that format and always applied.
- Images above MAX_PIXELS or MAX_SIDE are refused before they are decoded.
"""

import io
import os
import stat
import warnings

import numpy as np
from PIL import Image

SUFFIXES = (  # of image files, in any case
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # Pillow's other decoders are not run
MAX_PIXELS = 178_956_970  # Pillow's limit; 0.5 GiB as RGB
MAX_SIDE = 65_535  # pixels, the limit of JPEG
ORIENTATION = 0x0112  # EXIF tag

# Pillow warns from half of MAX_PIXELS on and raises an error above it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(content: bytes, *, exif: bool) -> np.ndarray:
    """The pixels of an image file, uint8 [H, W, 3].

    Args:
      content: bytes of the file.
      exif: whether to turn the image as its EXIF orientation says.

    Raises:
      ValueError: the image is damaged, too large, of an unknown format, or of a refused kind.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_size(image.width, image.height)
            pixels = _to_rgb(image)
            return _turn(pixels, _orientation(image)) if exif else pixels
    except Image.UnidentifiedImageError:
        raise ValueError(f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error).partition(", could")[0]) from None
    except Exception as error:  # a damaged image can raise any exception in Pillow's decoders
        raise ValueError(str(error) or f"it cannot be decoded ({type(error).__name__})") from error


def read_image(path: str | os.PathLike, *, exif: bool = True) -> np.ndarray:
    """The pixels of an image file, uint8 [H, W, 3].

    Args:
      path: the file.
      exif: whether to turn the image as its EXIF orientation says.

    Raises:
      ValueError: there is no such file, it is a folder or a pipe, it cannot be read, or as `decode_image`.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    return decode_image(content, exif=exif)


def decode_annotation(content: bytes) -> np.ndarray:
    """The indices in an annotation of segmentation, uint16 [H, W].

    Args:
      content: bytes of an image file: gray with up to 16 bits, or a palette, whose indices are taken. Of RGB
        pixels the red value is the index.

    Raises:
      ValueError: the image is damaged, too large, of an unknown format, or of a refused kind.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "TIFF", "BMP")) as image:
            check_size(image.width, image.height)
            if image.mode not in ("1", "L", "P", "RGB", "RGBA") and not image.mode.startswith("I;16"):
                raise ValueError(f"its pixels are of the mode {image.mode}, not gray, palette or RGB")
            if image.mode in ("RGB", "RGBA") and ";16" in str(image.tile):  # Pillow keeps the high byte only
                raise ValueError("its colors have 16 bits, of which 8 can be read: use gray of 16 bits")
            bits = image.tile[0][3] if image.mode == "L" and image.tile else "L"
            if bits in ("L;2", "L;4"):  # Pillow spreads these values over 0..255
                return (np.asarray(image) // (255 // (2 ** int(bits[2]) - 1))).astype(np.uint16)
            pixels = np.asarray(image)
    except Image.UnidentifiedImageError:
        raise ValueError("it is not a PNG, TIFF or BMP image") from None
    except Exception as error:  # a damaged image can raise any exception in Pillow's decoders
        raise ValueError(str(error) or f"it cannot be decoded ({type(error).__name__})") from error
    return (pixels if pixels.ndim == 2 else pixels[:, :, 0]).astype(np.uint16)


def is_upright_jpeg(content: bytes) -> bool:
    """Whether a file is a JPEG that `decode_image` accepts and does not turn. Only its header is read."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            check_size(image.width, image.height)
            return _orientation(image) == 1
    except Exception:  # as in `decode_image`, which raises the error
        return False


def check_size(width: int, height: int) -> None:
    """Raises ValueError if an image is too large to decode."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"it has {width} x {height} pixels, above the limit of {MAX_PIXELS:,} or of {MAX_SIDE:,} a side"
        )


def printable(path: str | bytes | os.PathLike) -> str:
    """A path as text for messages. Bytes of its name that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of Pillow's image, uint8 [H, W, 3]."""
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("F", "I") and not wide:
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise ValueError(f"it has {kind} pixels, whose range is not defined; convert it to 8 or 16 bits")
    if wide:
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # BitsPerSample of TIFF
        gray = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns if this goes directly to RGB
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, if there is none."""
    data = None if image.format == "TIFF" else image.info.get("exif")
    if not data:
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        value = exif.get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data do not make an image unreadable
        return 1
    return value if value in range(1, 9) else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors an image upright."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
