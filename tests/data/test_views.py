"""Chosen images and their augmented views: pixels, geometry and maps are those of the input pipeline."""

import numpy as np
import pytest
import tiny_images

from tlvit.data import views
from tlvit.data.sources.tfds import open_tfds

HEIGHT, WIDTH = 24, 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """19 images in 3 shards, whose colors are their positions."""
    folder = tmp_path_factory.mktemp("data")
    tiny_images.prepare(folder, [tiny_images.position_image(i, HEIGHT, WIDTH) for i in range(19)])
    return open_tfds("tiny_images", "train", data_dir=str(folder))


def keys_of(source):
    shards = range(len(source.shard_lengths))
    return [record["key"].decode() for shard in shards for record in source.read(shard).as_numpy_iterator()]


@pytest.mark.slow
def test_photographs_at_places(source):
    keys, ends = keys_of(source), np.cumsum(source.shard_lengths)
    places = [(1, 2), (0, 1)]
    numbers = [
        int(keys[ends[shard] - source.shard_lengths[shard] + offset][4:-4]) for shard, offset in places
    ]
    for image, number in zip(views.photographs(source, places), numbers, strict=True):
        np.testing.assert_array_equal(image, tiny_images.position_image(number, HEIGHT, WIDTH))


GEOMETRIES = [pytest.param("full", marks=pytest.mark.slow), "center"]


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_views_of_images_that_are_spread_over_the_source(source, tmp_path, geometry):
    """Colors are positions: the color in the middle of a view says where in the photograph it is from."""
    maps = tiny_images.write_maps(tmp_path, source, geometry=geometry)
    augment = {"crop_scale": (0.3, 0.6), "hflip": 0.5}
    found = views.training_views(source, maps, tiny_images.train_config(augment=augment), count=6)
    keys = keys_of(source)
    assert [view.key for view in found] == [keys[i] for i in (0, 3, 6, 9, 12, 15)]
    for view in found:
        number = int(view.key[4:-4])
        np.testing.assert_array_equal(view.photograph, tiny_images.position_image(number, HEIGHT, WIDTH))
        assert view.batch.label.tolist() == [number % 5]
        assert view.batch.image.shape == (1, 32, 40, 3)
        np.testing.assert_array_equal(view.batch.maps.value[0, 2], number)  # its own map
        in_map = view.batch.geometry[0] @ (0.5, 0.5, 1.0)
        position = np.linalg.solve(view.to_map[:, :2], in_map - view.to_map[:, 2])
        middle = view.batch.image[0, 15:17, 19:21, :2].mean((0, 1)) / 255
        np.testing.assert_allclose(position, middle, atol=0.03)
    assert any(view.batch.geometry[0][0, 0] < 0 for view in found)  # some are flipped
