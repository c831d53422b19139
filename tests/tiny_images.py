"""A small TFDS data set and score maps for it, written by the tests of tlvit.data."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from sklearn.datasets import load_sample_images

from tlvit import config
from tlvit.data.score_maps.format import MapDescription
from tlvit.data.score_maps.reader import open_score_maps
from tlvit.data.score_maps.writer import ScoreMapWriter

SMALL_SHUFFLE = 600_000 / 2**30  # GiB: several windows and streams even for a few images


class TinyImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The given images. Image i has the key img_i.png and the label i % num_classes."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, images, num_classes, encoding, named, **kwargs):
        self.images, self.num_classes, self.encoding, self.named = images, num_classes, encoding, named
        super().__init__(**kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format=self.encoding),
            "label": tfds.features.ClassLabel(num_classes=self.num_classes),
        }
        if self.named:
            features["file_name"] = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, image in enumerate(self.images):
            name = {"file_name": f"img_{i}.png"} if self.named else {}
            yield i, {"image": image, "label": i % self.num_classes} | name


def prepare(data_dir, images, *, num_classes=5, num_shards=3, encoding="png", named=True):
    """Writes the data set `tiny_images` to data_dir. Its train split has the images."""
    builder = TinyImages(
        images=images, num_classes=num_classes, encoding=encoding, named=named, data_dir=str(data_dir)
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=num_shards, try_download_gcs=False)
    )


def position_image(number, height, width):
    """uint8 [H, W, 3] whose colors encode the position.

    Red is the column and green the row, from 0 at one edge to 255 at the other; blue is `number`.
    """
    x, y = (np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255
    image = np.stack(np.broadcast_arrays(x[None, :], y[:, None], np.float64(number)), axis=-1)
    return np.rint(image).astype(np.uint8)


def pixel_centers(height, width):
    """The points (x, y, 1) of the pixel centers, float64 [3, H, W]."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([x, y, np.ones_like(x)])


def wavy_image(height, width, seed=0):
    """Waves, an edge and a little noise, away from 0 and 255 (Pillow clips between its two passes)."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = [np.sin(rng.uniform(3, 25) * x + rng.uniform(3, 25) * y + rng.uniform(0, 6)) for _ in range(3)]
    edges = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.05)[:, :, None] * rng.uniform(-40, 40, 3)
    image = 128 + 45 * np.stack(waves, -1) + edges + rng.normal(0, 4, (height, width, 3))
    return np.rint(image).astype(np.uint8)


def photographs():
    """Crops of scikit-learn's two photographs, uint8 [3, 224, 200, 3]; the third is dark."""
    china, flower = load_sample_images().images
    crops = [china[100:324, 200:400], flower[60:284, 300:500]]
    return np.stack([*crops, crops[0] // 3 + 20])


def encode_jpeg(image, quality=100):
    """The bytes of a JPEG without chroma subsampling."""
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def train_config(*, data=None, augment=None, **changes):
    """A Config for `train_batches`: batches of 6 small images, a small shuffle buffer, no RandAugment."""
    data = {"threads": 2, "shuffle_gib": SMALL_SHUFFLE} | (data or {})
    augment = {"randaugment": ""} | (augment or {})
    settings = {"batch_size": 6, "image_size": (32, 40), "seed": 5, "data": data, "augment": augment}
    return config.resolve(settings | changes)


def write_maps(path, source, *, missing=(), change=None, **changes):
    """Score maps of the source's images, opened.

    Logit 0 is the column of the cell, 1 its row, 2 the number of the image; logit k has class label + k.

    Args:
      path: the folder.
      source: the images, from `prepare`.
      missing: numbers of the images without a map.
      change: maps (shard, its keys) to the keys that are written.
      changes: fields of the MapDescription.
    """
    fields = dict(
        annotator="test", annotator_hash="0123", top_k=3, grid=(6, 6), num_classes=source.num_classes
    )
    description = MapDescription(**fields | changes)
    writer = ScoreMapWriter(str(path), source, description)
    grid = description.grid
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    for shard in range(len(source.shard_lengths)):
        keys = [record["key"].decode() for record in source.read(shard).as_numpy_iterator()]
        if change:
            keys = change(shard, keys)
        numbers = [int(key.partition("_")[2].split(".")[0]) for key in keys]
        values = np.stack([np.stack([column, row, np.full(grid, n)]) for n in numbers]).astype(np.float32)
        classes = (np.array(numbers)[:, None] + np.arange(description.top_k)) % description.num_classes
        indices = np.broadcast_to(classes[:, :, None, None], values.shape)
        writer.write_shard(shard, keys, values, indices, np.array([n in missing for n in numbers]))
    writer.finalize()
    return open_score_maps(str(path))
