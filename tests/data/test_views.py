"""Chosen images and their augmented views: pixels, geometry and maps are those of the input pipeline."""

import numpy as np
import pytest
import tiny_images

from tlvit.data import views
from tlvit.data.sources.tfds import open_tfds
from tlvit.ops.targets import make_targets

HEIGHT, WIDTH = 24, 40


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """19 images in 3 shards, whose colors are their positions."""
    folder = tmp_path_factory.mktemp("data")
    tiny_images.prepare(folder, [tiny_images.position_image(i, HEIGHT, WIDTH) for i in range(19)])
    return open_tfds("tiny_images", "train", data_dir=str(folder))


def test_images_are_spread_over_the_source(source, tmp_path):
    maps = tiny_images.write_maps(tmp_path, source)
    config = tiny_images.train_config()
    found = views.training_views(source, maps, config, count=4)
    keys = [record["key"].decode() for shard in range(3) for record in source.read(shard).as_numpy_iterator()]
    assert [view.key for view in found] == [keys[i] for i in (0, 4, 9, 14)]
    assert len(views.training_views(source, maps, config, count=50)) == 19
    for view in found:
        number = int(view.key[4:-4])
        np.testing.assert_array_equal(view.photograph, tiny_images.position_image(number, HEIGHT, WIDTH))
        assert view.batch.label.tolist() == [number % 5]
        assert view.batch.image.shape == (1, 32, 40, 3)
        np.testing.assert_array_equal(view.batch.maps.value[0, 2], number)  # its own map
    places = [(1, 2), (0, 1)]
    lengths = np.concatenate([[0], np.cumsum(source.shard_lengths)])
    numbers = [int(keys[lengths[shard] + offset][4:-4]) for shard, offset in places]
    for image, number in zip(views.photographs(source, places), numbers, strict=True):
        np.testing.assert_array_equal(image, tiny_images.position_image(number, HEIGHT, WIDTH))


@pytest.mark.parametrize("geometry", ["full", "center"])
def test_the_geometry_leads_from_the_view_to_the_photograph(source, tmp_path, geometry):
    """Colors are positions: the color in the middle of a view says where in the photograph it is from."""
    maps = tiny_images.write_maps(tmp_path, source, geometry=geometry)
    augment = {"crop_scale": (0.3, 0.6), "hflip": 0.5}
    found = views.training_views(source, maps, tiny_images.train_config(augment=augment), count=6)
    for view in found:
        in_map = view.batch.geometry[0] @ (0.5, 0.5, 1.0)
        position = np.linalg.solve(view.to_map[:, :2], in_map - view.to_map[:, 2])
        middle = view.batch.image[0, 15:17, 19:21, :2].mean((0, 1)) / 255
        np.testing.assert_allclose(position, middle, atol=0.03)
    assert any(view.batch.geometry[0][0, 0] < 0 for view in found)  # some are flipped
    targets = make_targets(
        found[0].batch.maps, found[0].batch.label, found[0].batch.geometry, grid=(2, 2), num_classes=5
    )
    assert targets.tokens.shape == (1, 4, 5)
