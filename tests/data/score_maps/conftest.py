"""Fixtures of the tests of score maps."""

import shutil

import pytest
import tiny_images

from tlvit.data.score_maps.reader import open_score_maps
from tlvit.data.sources.tfds import open_tfds


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """20 images in 3 shards, 5 classes."""
    path = tmp_path_factory.mktemp("data")
    tiny_images.prepare(path, [tiny_images.position_image(i, 6, 8) for i in range(20)])
    return open_tfds("tiny_images", "train", data_dir=str(path))


@pytest.fixture(scope="session")
def maps_folder(source, tmp_path_factory):
    """The folder of finished score maps of the source."""
    return tiny_images.write_maps(tmp_path_factory.mktemp("data") / "maps", source).path


@pytest.fixture
def maps(maps_folder, tmp_path):
    """A copy of the finished score maps, opened."""
    return open_score_maps(shutil.copytree(maps_folder, tmp_path / "maps"))
