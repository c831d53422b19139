"""A small TFDS data set made on the spot, and score maps for it: what the tests of tlvit.data read."""

import numpy as np
import tensorflow_datasets as tfds

from tlvit.data.score_maps import reader as score_maps
from tlvit.data.score_maps.writer import ScoreMapWriter


class TinyImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images given as arrays; record i has the key img_i.png and the label i % num_classes."""

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
    """Write the data set `tiny_images` under data_dir: its train split has the images."""
    builder = TinyImages(
        images=images, num_classes=num_classes, encoding=encoding, named=named, data_dir=str(data_dir)
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=num_shards, try_download_gcs=False)
    )


def position_image(number, height, width):
    """uint8 [H, W, 3]: red is the column, green the row (0-255, edge to edge), blue the image's number."""
    x, y = (np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255
    image = np.stack(np.broadcast_arrays(x[None, :], y[:, None], np.float64(number)), axis=-1)
    return np.rint(image).astype(np.uint8)


def write_maps(path, source, *, top_k=3, grid=(6, 6), num_classes=None, missing=(), change=None, **options):
    """Score maps: logit 0 is the cell's column, 1 its row, 2 the image's number; classes label + k."""
    num_classes = num_classes or source.num_classes
    writer = ScoreMapWriter(
        str(path),
        source=source,
        annotator="test",
        annotator_hash="0123",
        top_k=top_k,
        grid=grid,
        num_classes=num_classes,
        **options,
    )
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    for shard in range(len(source.shard_lengths)):
        keys = [record["key"].decode() for record in source.read(shard).as_numpy_iterator()]
        if change:
            keys = change(shard, keys)
        numbers = [int(key.partition("_")[2].split(".")[0]) for key in keys]
        values = np.stack([np.stack([column, row, np.full(grid, n)]) for n in numbers]).astype(np.float32)
        classes = (np.array(numbers)[:, None] + np.arange(top_k)) % num_classes
        indices = np.broadcast_to(classes[:, :, None, None], values.shape)
        writer.write_shard(shard, keys, values, indices, np.array([n in missing for n in numbers]))
    writer.finalize()
    return score_maps.open_score_maps(str(path))
