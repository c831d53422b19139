"""The two archives of ImageNet in small, laid out as the real ones: what its own TFDS builder reads."""

import io
import tarfile

import numpy as np
from PIL import Image

SYNSETS = ("n01440764", "n01443537", "n01484850")  # classes 0, 1, 2 of a thousand


def jpeg(red, size=(40, 30), image_format="JPEG"):
    """An encoded plain image of some red."""
    buffer = io.BytesIO()
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :, 0] = red
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def pack(entries):
    """name -> bytes, as the bytes of a tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def class_archives(images=4):
    """Archives of the classes: image i of class c is named after both and has red 60 c + 10 i."""
    return {
        f"{synset}.tar": pack({f"{synset}_{i}.JPEG": jpeg(60 * c + 10 * i) for i in range(images)})
        for c, synset in enumerate(SYNSETS)
    }


def write_archives(folder, train=None, val=None):
    """Both archives in a folder: 12 training and 5 validation images unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    val = val or {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(40 * i) for i in range(5)}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(pack(train or class_archives()))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(pack(val))
