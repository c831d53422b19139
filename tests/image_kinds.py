"""Image files of every kind that tlvit reads, small and written in memory."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 20, 30
KINDS = (
    "rgb jpeg", "gray jpeg", "cmyk jpeg", "exif jpeg", "two jpegs", "rgb png", "gray png", "1-bit png",
    "palette png", "alpha png", "gray-alpha png", "transparent palette png", "transparent gray png",
    "16-bit gray png", "16-bit rgb png", "16-bit alpha png", "animated png", "exif png", "late exif png",
    "gif", "transparent gif", "animated gif", "rgb bmp", "palette bmp", "1-bit bmp", "webp", "alpha webp",
    "animated webp", "exif webp", "rgb tiff", "16-bit tiff", "exif tiff", "ppm", "16-bit ppm",
)  # fmt: skip


def colors(height=HEIGHT, width=WIDTH):
    """uint8 [H, W, 4]: ramps in red, green, blue and opacity."""
    y, x = np.mgrid[0:height, 0:width]
    ramps = (x * 255 / (width - 1), y * 255 / (height - 1), (x + y) * 255 / (height + width - 2), 255 - 8 * y)
    return np.stack(ramps, -1).astype(np.uint8)


def image_file(kind):
    """The bytes of an image file of one of KINDS."""
    rgba = Image.fromarray(colors())
    rgb = rgba.convert("RGB")
    turned = [rgb.rotate(180)]
    palette = rgb.quantize(16)
    rgba16 = (256 * colors().astype(np.int32) + 200).astype(">u2")
    gray16 = rgba16[:, :, 0].astype(np.uint16)
    if kind == "16-bit rgb png":
        return png(16, 2, rgba16[:, :, :3])
    if kind == "16-bit alpha png":
        return png(16, 6, rgba16)
    if kind == "late exif png":  # the orientation comes after the pixels
        content = save(rgb, "PNG")
        return content[:-12] + chunk(b"eXIf", exif(6)[6:]) + content[-12:]
    if kind == "16-bit ppm":
        return b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + gray16.astype(">u2").tobytes()
    image, options = {
        "rgb": (rgb, {}), "gray": (rgb.convert("L"), {}), "cmyk": (rgb.convert("CMYK"), {}),
        "exif": (rgb, {"exif": exif(6)}), "1-bit": (rgb.convert("1"), {}), "palette": (palette, {}),
        "alpha": (rgba, {}), "gray-alpha": (rgba.convert("LA"), {}),
        "transparent palette": (palette, {"transparency": bytes(range(16))}),
        "transparent gray": (rgb.convert("L"), {"transparency": 100}),
        "16-bit gray": (Image.fromarray(gray16), {}), "16-bit": (Image.fromarray(gray16), {}),
        "animated": (rgb, {"save_all": True, "append_images": turned}),
        "two": (rgb, {"save_all": True, "append_images": turned}),
        "transparent": (palette, {"transparency": 3}), "": (rgb, {}),
    }[kind.rpartition(" ")[0]]  # fmt: skip
    format = {"jpeg": "JPEG", "jpegs": "MPO"}.get(kind.split()[-1], kind.split()[-1].upper())
    lossless = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    return save(image, format, **lossless, **options)


def save(image, format, **options):
    """The bytes of a file that Pillow writes."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def exif(orientation):
    """EXIF data with an orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def png(depth, color_type, pixels, size=None):
    """A PNG file. `size`, (width, height), replaces that of the pixels [H, W, …] in the header."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", *(size or (width, height)), depth, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name, data):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
