"""Small versions of ImageNet, ImageNet ReaL and ImageNet-V2, prepared by TFDS's own builders."""

import io
import json
import tarfile
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SYNSETS = ("n01440764", "n01443537", "n01484850")  # classes 0, 1, 2 of a thousand


def jpeg(red, size=(40, 30), image_format="JPEG"):
    """An encoded image of one color with the given red."""
    buffer = io.BytesIO()
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :, 0] = red
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def pack(entries):
    """The bytes of a tar file of the entries, name -> bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def class_archives(images=4):
    """Archives of the classes. The name of image i of class c has both, and its red is 60 c + 10 i."""
    return {
        f"{synset}.tar": pack({f"{synset}_{i}.JPEG": jpeg(60 * c + 10 * i) for i in range(images)})
        for c, synset in enumerate(SYNSETS)
    }


def write_archives(folder, train=None, val=None):
    """Writes both archives: by default, 12 training and 5 validation images."""
    folder.mkdir(parents=True, exist_ok=True)
    val = val or {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(40 * i) for i in range(5)}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(pack(train or class_archives()))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(pack(val))


def prepare(data_dir):
    """Writes imagenet2012 to data_dir: 12 training and 5 validation images."""
    write_archives(data_dir / "manual")
    _prepare("imagenet2012", data_dir, num_shards=2)


def prepare_real(data_dir, sets):
    """Writes imagenet2012_real to data_dir: five validation images with these sets of correct labels."""
    write_archives(data_dir / "manual")
    (data_dir / "real.json").write_text(json.dumps(sets))
    with mock.patch.object(tfds.download.DownloadManager, "download", return_value=data_dir / "real.json"):
        _prepare("imagenet2012_real", data_dir)


def prepare_v2(data_dir, classes):
    """Writes imagenet_v2/matched-frequency to data_dir: an image of each of these classes."""
    folder = data_dir / "extracted"
    for i, label in enumerate(classes):
        path = folder / "imagenetv2-matched-frequency-format-val" / str(label) / f"{i}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(20 * i))
    unpacked = mock.patch.object(tfds.download.DownloadManager, "download_and_extract", return_value=folder)
    with unpacked:
        _prepare("imagenet_v2/matched-frequency", data_dir)


def _prepare(name, data_dir, **options):
    """Runs TFDS's builder without a download."""
    config = tfds.download.DownloadConfig(manual_dir=data_dir / "manual", try_download_gcs=False, **options)
    tfds.builder(name, data_dir=data_dir, try_gcs=False).download_and_prepare(download_config=config)
