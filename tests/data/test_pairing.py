"""Images are read together with their own score maps."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tiny_images

from tlvit.data.pairing import check_pair, pair_with_maps
from tlvit.data.sources.open import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_images.prepare(path, [tiny_images.position_image(i, 12, 16) for i in range(10)])
    return open_source("tiny_images", "train", data_dir=str(path))


def test_every_image_has_its_own_map(source, tmp_path):
    maps = tiny_images.write_maps(tmp_path, source, missing=(4,))
    records, parse = pair_with_maps(source, maps, max_missing=0.1)
    seen = set()
    for shard, length in enumerate(source.shard_lengths):
        for offset in (0, length - 1):
            examples = list(records(shard, offset).map(parse).as_numpy_iterator())
            assert len(examples) == length - offset
            for example in examples:
                assert example["key"] == example["map_key"]
                number = int(example["key"].decode().partition("_")[2].split(".")[0])
                wanted = {20.0} if number == 4 else set(range(6))  # logit 0: of the label, or the column
                assert set(np.unique(example["value"][0])) == wanted
                assert (example["index"][0] == example["label"]).all()
                seen.add(number)
    assert seen == set(range(10))


def test_too_many_missing_maps_are_an_error(source, tmp_path):
    maps = tiny_images.write_maps(tmp_path, source, missing=(4, 5))
    message = r"2 of 10 images have no score map in .*, more than data.max_missing_maps = 0.1 allows"
    with pytest.raises(ValueError, match=message):
        pair_with_maps(source, maps, max_missing=0.1)


def test_maps_of_turned_images_are_for_turned_images(source, tmp_path):
    """Otherwise the map of a turned image lies across it."""
    turned = dataclasses.replace(source, exif=True)
    maps = tiny_images.write_maps(tmp_path / "upright", source)
    with pytest.raises(ValueError, match=r"were not turned as their EXIF .* Set config.data.exif=ignore"):
        pair_with_maps(turned, maps, max_missing=0)
    maps = tiny_images.write_maps(tmp_path / "turned", turned)
    with pytest.raises(ValueError, match=r"were turned as their EXIF .* Set config.data.exif=apply"):
        pair_with_maps(source, maps, max_missing=0)


def test_check_pair_names_both_keys_and_removes_them():
    fields = {"value": tf.constant([1.0]), "label": tf.constant(3), "map_folder": tf.constant("/maps")}
    fields["map_problem"] = tf.constant("")
    found = check_pair(fields | {"key": tf.constant("a.png"), "map_key": tf.constant("a.png")})
    assert set(found) == {"value", "label"}
    assert set(check_pair({"key": tf.constant("a.png"), "label": tf.constant(3)})) == {"label"}
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"a\.png(.|\n)*b\.png"):
        check_pair(fields | {"key": tf.constant("a.png"), "map_key": tf.constant("b.png")})
    fields["map_problem"] = tf.constant("has 3 bytes")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"a\.png(.|\n)*has 3 bytes"):
        check_pair(fields | {"key": tf.constant("a.png"), "map_key": tf.constant("a.png")})
