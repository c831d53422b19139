"""tlvit.images: the pixels of every kind of image, the EXIF orientation, limits, and what is refused."""

import os
import warnings

import image_kinds
import numpy as np
import pytest
from PIL import Image

from tlvit.images import MAX_PIXELS, decode_image, is_upright_jpeg, printable, read_image

COLORS = image_kinds.colors()[:, :, :3].astype(int)
LOSSY = {"jpeg": 30, "jpegs": 30, "palette": 64, "gif": 64}  # largest difference; small palettes are coarse


@pytest.mark.parametrize("kind", image_kinds.KINDS)
def test_every_kind_has_the_colors_that_were_saved(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_image(image_kinds.image_file(kind), exif=False)
    assert (found.dtype, found.flags.c_contiguous) == (np.uint8, True)
    if kind == "exif tiff":  # a part of the format, so it is not ignored
        found = np.rot90(found)
    assert found.shape == (20, 30, 3)
    expected = COLORS
    if kind in ("16-bit gray png", "16-bit tiff", "16-bit ppm"):
        expected = COLORS[:, :, :1]
    elif "gray" in kind:
        expected = np.asarray(Image.fromarray(COLORS.astype(np.uint8)).convert("L"), int)[:, :, None]
    if kind.startswith("1-bit"):
        assert set(np.unique(found)) == {0, 255}
        return
    limit = max([v for k, v in LOSSY.items() if k in kind], default=0)
    assert np.abs(found - expected).max() <= limit
    assert np.abs(found - expected).mean() <= limit / 4


def test_cmyk_is_the_product_of_ink_and_black():
    ink = np.zeros((8, 8, 4), np.uint8) + np.array([40, 100, 0, 51], np.uint8)
    content = image_kinds.save(Image.fromarray(ink, "CMYK"), "TIFF")
    found = decode_image(content, exif=True)[0, 0]
    np.testing.assert_allclose(found, (215 * 0.8, 155 * 0.8, 255 * 0.8), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied(format, orientation):
    """The corners, read clockwise from the top left, are 0, 1, 2, 3 in the upright image."""
    corner = lambda image: [int(image[y, x].mean()) // 60 for y, x in ((3, 3), (3, -3), (-3, -3), (-3, 3))]
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, 12:], upright[8:, 12:], upright[8:, :12] = 70, 140, 210
    stored = {  # how a camera stores it, by the definition of the tag: where row 0 and column 0 are
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright[::-1]),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[format]
    image = Image.fromarray(np.ascontiguousarray(stored))
    content = image_kinds.save(image, format, exif=image_kinds.exif(orientation), **options)
    assert corner(decode_image(content, exif=True)) == [0, 1, 2, 3]
    assert decode_image(content, exif=False).shape == stored.shape
    assert is_upright_jpeg(content) == (format == "JPEG" and orientation == 1)


def test_damaged_exif_data_are_no_orientation():
    image = Image.fromarray(image_kinds.colors()[:, :, :3])
    for data in (b"Exif\0\0garbage", b"Exif\0\0", image_kinds.exif(6)[:14], image_kinds.exif(77)):
        content = image_kinds.save(image, "JPEG", exif=data)
        assert decode_image(content, exif=True).shape == (20, 30, 3)


def test_kinds_without_a_defined_white_are_refused():
    for array, kind in (
        (np.ones((4, 4), np.float32), "floating-point"),
        (np.ones((4, 4), np.int32), "32-bit"),
    ):
        content = image_kinds.save(Image.fromarray(array), "TIFF")
        with pytest.raises(ValueError, match=f"it has {kind} .*pixels, whose range is not defined"):
            decode_image(content, exif=True)


@pytest.mark.parametrize("size", [(22_000, 22_000), (65_536, 1), (1, 100_000), (12_000, 15_000)])
def test_large_images_are_refused_by_their_header(size):
    """The file has no pixels: the size is enough."""
    content = image_kinds.png(8, 2, np.zeros((1, 1, 3), np.uint8), size)
    with pytest.raises(ValueError, match=r"pixels.*limit|limit.*pixels") as raised:
        decode_image(content, exif=True)
    assert str(size[0] * size[1]) in str(raised.value) or f"{size[0]} x {size[1]}" in str(raised.value)
    assert size[0] * size[1] > MAX_PIXELS or max(size) > 65_535


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"what?", "it is not a JPEG, PNG, BMP, GIF, WEBP, TIFF or PPM image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "it is not a JPEG"),
        (image_kinds.image_file("rgb jpeg")[:-100], "truncated"),
        (image_kinds.image_file("rgb png")[:120], "."),
        (image_kinds.image_file("webp")[:60], "."),
    ],
)
def test_damaged_and_other_files_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        decode_image(content, exif=True)


def test_what_is_not_a_file_is_refused(tmp_path):
    """Nothing waits for a pipe, and no link is followed forever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "image.png").write_bytes(image_kinds.image_file("exif png"))
    (tmp_path / "link.png").symlink_to(tmp_path / "image.png")
    for name, message in (
        ("pipe.jpg", "not a regular file"), (".", "not a regular file"), ("loop.jpg", "symbolic links"),
        ("none.jpg", "No such file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name)
    assert read_image(tmp_path / "link.png").shape == (30, 20, 3)
    assert read_image(tmp_path / "link.png", exif=False).shape == (20, 30, 3)


def test_a_path_that_is_not_utf_8_is_printable():
    assert printable(os.fsdecode(b"a\xff/\xc3\xa4.jpg")) == "a\\xff/ä.jpg" == printable(b"a\xff/\xc3\xa4.jpg")
