"""From files to batches: alignment, order, restarts, processes, padding and errors."""

import dataclasses
import itertools
import logging
import os
import re
import types

import image_kinds
import jax
import numpy as np
import pytest
import tiny_images

from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.data import corruption, pipeline, shuffle
from tlvit.data.score_maps.reader import open_score_maps
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.sources.open import open_source
from tlvit.images import read_image
from tlvit.predict import read_view

HEIGHT, WIDTH, GRID, COUNT = 72, 96, (6, 8), 30
ONE_WINDOW = {"shuffle_gib": 2.0}


@pytest.fixture(autouse=True)
def _small_streams(monkeypatch):
    """The small shuffle buffer has several streams only if a stream needs no memory besides its windows."""
    monkeypatch.setattr(shuffle, "STREAM_BYTES", 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_images.prepare(path, [tiny_images.position_image(i, HEIGHT, WIDTH) for i in range(COUNT)])
    return open_source("tiny_images", "train", data_dir=str(path))


@pytest.fixture(scope="module")
def maps(source, tmp_path_factory):
    return tiny_images.write_maps(tmp_path_factory.mktemp("maps"), source, grid=GRID)


def train(
    source, maps=None, steps=4, *, first_step=0, process_index=0, process_count=1, device_shards=1, **settings
):
    """The first training batches; `settings` are those of `tiny_images.train_config`."""
    position = {"first_step": first_step, "process_index": process_index, "process_count": process_count}
    config = tiny_images.train_config(**settings)
    batches = pipeline.train_batches(source, maps, config, **position, device_shards=device_shards)
    return list(itertools.islice(batches, steps))


def numbers(batch):
    """The number of every image, from its blue channel."""
    return batch.image[:, :, :, 2].mean((1, 2)).round().astype(int)


def arrays(batch):
    maps = () if batch.maps is None else (batch.maps.value, batch.maps.index)
    return (batch.image, batch.label, batch.mask, batch.geometry, *maps)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(arrays(a), arrays(b), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def sample(field, x, y):
    """Bilinear value of a map [h, w] at points in [0, 1], the center of cell i at (i + 0.5) / n."""
    h, w = field.shape
    x, y = np.clip(x * w - 0.5, 0, w - 1), np.clip(y * h - 0.5, 0, h - 1)
    x0, y0 = np.minimum(x.astype(int), w - 2), np.minimum(y.astype(int), h - 2)
    fx, fy = x - x0, y - y0
    top = field[y0, x0] * (1 - fx) + field[y0, x0 + 1] * fx
    return top * (1 - fy) + (field[y0 + 1, x0] * (1 - fx) + field[y0 + 1, x0 + 1] * fx) * fy


def source_points(batch):
    """The points (x, y) of the annotated images that the pixel centers are mapped to, [B, 2, H, W]."""
    return np.einsum("bij,jhw->bihw", batch.geometry, tiny_images.pixel_centers(*batch.image.shape[1:3]))


def test_from_file_to_batch_maps_and_pixels_agree(source, maps):
    """Colors encode the position of pixels, logits the position of cells. The geometry connects them."""
    flips = 0
    for batch in train(source, maps, steps=15, augment={"crop_scale": (0.1, 1.0)}):
        assert (batch.image.shape, batch.image.dtype) == ((6, 32, 40, 3), np.uint8)
        assert (batch.maps.value.shape, batch.maps.value.dtype) == ((6, 3, *GRID), np.float16)
        assert (batch.maps.index.dtype, batch.geometry.dtype) == (np.uint16, np.float32)
        assert batch.mask.all()
        assert batch.label.dtype == np.int32
        found = numbers(batch)
        np.testing.assert_array_equal(batch.label, found % 5)
        np.testing.assert_array_equal(batch.maps.value[:, 2, 0, 0], found)
        np.testing.assert_array_equal(batch.maps.index[:, :, 3, 4], (found[:, None] + np.arange(3)) % 5)
        points = source_points(batch)
        for image, value, (x, y) in zip(
            batch.image, batch.maps.value.astype(np.float64), points, strict=True
        ):
            seen_x, seen_y = image[1:-1, 1:-1, 0] / 255, image[1:-1, 1:-1, 1] / 255
            x, y = x[1:-1, 1:-1], y[1:-1, 1:-1]
            assert np.abs(seen_x - x).max() < 1 / WIDTH
            assert np.abs(seen_y - y).max() < 1 / HEIGHT
            column, row = sample(value[0], x, y), sample(value[1], x, y)
            expected_column = np.clip(seen_x * GRID[1] - 0.5, 0, GRID[1] - 1)
            expected_row = np.clip(seen_y * GRID[0] - 0.5, 0, GRID[0] - 1)
            assert np.abs(column - expected_column).max() < GRID[1] / WIDTH
            assert np.abs(row - expected_row).max() < GRID[0] / HEIGHT
        flips += (batch.geometry[:, 0, 0] < 0).sum()
    assert 25 < flips < 65


def test_the_published_label_crop_is_the_transposed_one(source, maps):
    aligned = train(source, maps)
    published = train(source, maps, data={"label_crop": "published"})
    for ours, theirs in zip(aligned, published, strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)
        for (x, y), (tx, ty) in zip(ours.geometry, theirs.geometry, strict=True):
            flip = x[0] < 0
            left, top = (1 - x[2] if flip else x[2]), y[2]
            width, height = abs(x[0]), y[1]
            swapped = [-height, 0, 1 - top] if flip else [height, 0, top]
            np.testing.assert_allclose(tx, swapped, atol=1e-6)
            np.testing.assert_allclose(ty, [0, width, left], atol=1e-6)
    assert any(np.abs(a.geometry - b.geometry).max() > 0.1 for a, b in zip(aligned, published, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [pytest.param(1.0, marks=pytest.mark.slow), 0.875])
def test_maps_of_the_center_square(source, tmp_path, fraction):
    centered = tiny_images.write_maps(
        tmp_path, source, grid=GRID, geometry="center", center_fraction=fraction
    )
    assert (centered.info.geometry, centered.info.center_fraction) == ("center", fraction)
    for plain, batch in zip(train(source), train(source, centered), strict=True):
        np.testing.assert_array_equal(plain.image, batch.image)
        side = fraction * min(HEIGHT, WIDTH)
        points, expected = (
            source_points(batch),
            source_points(plain) * np.reshape([WIDTH, HEIGHT], (1, 2, 1, 1)),
        )
        expected = (expected - np.reshape([WIDTH - side, HEIGHT - side], (1, 2, 1, 1)) / 2) / side
        np.testing.assert_allclose(points, expected, atol=1e-5)
    square = np.abs(points - 0.5) <= 0.5
    assert 0.05 < square.all(axis=1).mean() < 0.95  # some of the crops are partly outside of the map


@pytest.mark.slow
def test_the_published_label_crop_reads_a_map_as_one_of_the_entire_image(source, maps, tmp_path):
    centered = tiny_images.write_maps(tmp_path, source, grid=GRID, geometry="center")
    for whole, center in zip(
        *(train(source, m, steps=1, data={"label_crop": "published"}) for m in (maps, centered)), strict=True
    ):
        np.testing.assert_array_equal(whole.geometry, center.geometry)


def test_label_data_of_the_published_maps_stay_below_8_kb(source, tmp_path):
    """K = 5, 18 x 18 cells: the size of the published maps."""
    value = np.zeros((1, 5, 18, 18), np.float16)
    batch = train(source, tiny_images.write_maps(tmp_path, source, grid=(18, 18)), steps=1)[0]
    cell = batch.maps.value.dtype.itemsize + batch.maps.index.dtype.itemsize
    assert value.size * cell + batch.geometry[0].nbytes + batch.label[0].nbytes <= 8192


@pytest.mark.parametrize(
    ("data", "starts"),
    [
        ({}, (5, 8)),
        pytest.param({}, (1, 4, 11), marks=pytest.mark.slow),
        pytest.param(ONE_WINDOW, (1, 4, 5, 8, 11), marks=pytest.mark.slow),
    ],
)
def test_a_restart_gives_the_same_batches(source, maps, data, starts):
    """30 images in batches of 6 are 5 steps an epoch. Restarts are within and between epochs."""
    complete = train(source, maps, steps=13, data=data)
    for first in starts:
        assert_same(train(source, maps, 13 - first, first_step=first, data=data), complete[first:])


@pytest.mark.slow
def test_threads_do_not_change_the_batches(source, maps):
    assert_same(train(source, maps, data={"threads": 1}), train(source, maps, data={"threads": 4}))


def test_the_augmentation_of_an_image_differs_between_epochs(source):
    batches = train(source, steps=10)
    by_number = {}
    for batch in batches:
        for number, geometry in zip(numbers(batch), batch.geometry, strict=True):
            by_number.setdefault(number, []).append(geometry)
    assert {len(v) for v in by_number.values()} == {2}
    assert all(np.abs(a - b).max() > 1e-3 for a, b in by_number.values())
    for first, second in zip(batches[:5], batches[5:], strict=True):  # nor does an index of the batch repeat
        assert (np.abs(first.geometry - second.geometry).max((1, 2)) > 1e-3).all()


@pytest.mark.slow
def test_repeats_are_different_views_of_an_image(source, maps):
    three = {"repeats": 3}
    for batch in train(source, maps, steps=5, augment=three):
        found = numbers(batch)
        assert len(set(found)) == 2
        np.testing.assert_array_equal(batch.label, found % 5)
        np.testing.assert_array_equal(batch.maps.value[:, 2, 0, 0], found)
        for i, j in itertools.combinations(range(6), 2):
            assert np.abs(batch.geometry[i] - batch.geometry[j]).max() > 1e-3
    complete = train(source, maps, steps=9, augment=three)
    assert_same(train(source, maps, 5, augment=three, first_step=4), complete[4:])
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        train(source, augment={"repeats": 0})


@pytest.mark.slow
def test_views_are_on_different_devices(source, maps):
    """Three devices with two images each: the same views as on one device, each image once a device."""
    options = {"steps": 2, "augment": {"repeats": 3}}
    spread = train(source, maps, device_shards=3, **options)
    for batch, alone in zip(spread, train(source, maps, **options), strict=True):
        assert all(len(set(part)) == 2 for part in numbers(batch).reshape(3, 2))
        order = [0, 3, 1, 4, 2, 5]  # image a on all three devices, then image b
        assert_same([jax.tree.map(lambda x, order=order: x[order], alone)], [batch])
    parts = [
        train(source, maps, device_shards=3, process_index=p, process_count=3, **options) for p in range(3)
    ]
    for step, batch in enumerate(spread):
        assert_same([batch], [jax.tree.map(lambda *x: np.concatenate(x), *(part[step] for part in parts))])


def test_maps_do_not_change_order_or_augmentation(source, maps):
    for a, b in zip(train(source), train(source, maps), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        assert a.maps is None


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_partition_the_global_batches(source, maps, count):
    complete = train(source, maps, steps=7, first_step=2)
    parts = [train(source, maps, 7, first_step=2, process_index=p, process_count=count) for p in range(count)]
    for step, batch in enumerate(complete):
        for i, x in enumerate(arrays(batch)):
            np.testing.assert_array_equal(np.concatenate([arrays(part[step])[i] for part in parts]), x)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_sees_every_image_once(source, count):
    info = ModelInfo("lvvit_s", 5, (24, 24))
    options = dict(batch_size=8, process_count=count, threads=2)
    runs = [list(pipeline.eval_batches(source, info, process_index=p, **options)) for p in range(count)]
    assert len({len(run) for run in runs}) == 1
    seen = []
    for batch in itertools.chain(*runs):
        assert batch.image.shape == (8 // count, 24, 24, 3)
        assert batch.label.shape == batch.mask.shape == (8 // count,)
        np.testing.assert_array_equal(batch.label[batch.mask], numbers(batch)[batch.mask] % 5)
        seen += numbers(batch)[batch.mask].tolist()
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.slow
def test_more_processes_than_images_get_empty_batches(source):
    part = open_source("tiny_images", "train[:3]", data_dir=source.files[0].split("/tiny_images/")[0])
    info = ModelInfo("lvvit_s", 5, (8, 8))
    options = dict(batch_size=8, process_count=8, threads=1)
    runs = [list(pipeline.eval_batches(part, info, process_index=p, **options)) for p in range(8)]
    assert [sum(b.mask.sum() for b in run) for run in runs] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert {len(run) for run in runs} == {1}


def test_annotation_reads_a_shard_in_the_order_of_its_records(source):
    for shard, length in enumerate(source.shard_lengths):
        items = list(pipeline.annotation_batches(source, shard, batch_size=4, image_size=(20, 20), threads=2))
        keys = [key for item in items for key in item.keys]
        assert keys == [r["key"].decode() for r in source.read(shard).as_numpy_iterator()]
        mask = np.concatenate([item.batch.mask for item in items])
        assert (mask.sum(), len(mask) % 4) == (length, 0)
        found = np.concatenate([numbers(item.batch)[item.batch.mask] for item in items])
        assert [f"img_{n}.png" for n in found] == keys
    # The image is complete: the colors at its edges are the ends of the scale.
    image = items[0].batch.image[0].astype(int)
    assert image[:, 0, 0].max() < 10
    assert image[:, -1, 0].min() > 245
    np.testing.assert_array_equal(items[0].batch.geometry[0], np.eye(3)[:2])


def test_steps_per_epoch_drops_the_remainder(source):
    assert (pipeline.steps_per_epoch(source, 6), pipeline.steps_per_epoch(source, 7)) == (5, 4)


def test_the_map_of_another_image_is_an_error_that_names_both(source, tmp_path):
    swapped = tiny_images.write_maps(
        tmp_path, source, change=lambda shard, keys: [keys[1], keys[0], *keys[2:]]
    )
    with pytest.raises(
        ValueError, match=r"the image is img_\d+.png but its map in .* belongs to img_\d+.png"
    ):
        train(source, swapped, steps=5)


def test_a_restart_logs_how_long_it_took(source, caplog):
    with caplog.at_level(logging.INFO, "tlvit"):
        train(source, steps=2, first_step=7)
    assert re.search(r"resumed at batch 2 of 5 in epoch 1 after \d+\.\d s", caplog.text)


@pytest.mark.slow
def test_missing_maps_are_an_error_unless_allowed(source, tmp_path):
    incomplete = tiny_images.write_maps(tmp_path, source, missing=(3, 11))
    with pytest.raises(ValueError, match="2 of 30 images have no score map"):
        train(source, incomplete)
    with pytest.raises(ValueError, match=r"more than data.max_missing_maps = 0.05 allows"):
        train(source, incomplete, data={"max_missing_maps": 0.05})
    seen = set()
    for batch in train(source, incomplete, steps=5, data={"max_missing_maps": 0.1}):
        for number, label, value, index in zip(
            numbers(batch), batch.label, batch.maps.value, batch.maps.index, strict=True
        ):
            if number in (3, 11):
                assert (index[0] == label).all()
                assert (value[0] == 20).all()
                assert (value[1:] == 0).all()
            else:
                assert (value[2] == number).all()
            seen.add(number)
    assert {3, 11} <= seen


def test_maps_of_other_data_are_refused_at_the_start(source, tmp_path):
    tiny_images.prepare(tmp_path, [tiny_images.position_image(i, 8, 8) for i in range(12)], num_classes=4)
    other = open_source("tiny_images", "train", data_dir=str(tmp_path))
    their_maps = tiny_images.write_maps(tmp_path / "m", other)
    with pytest.raises(ValueError, match=r"have 4 classes, tiny_images/1.0.0:train has 5"):
        pipeline.train_batches(source, their_maps, tiny_images.train_config())


def flip_byte(path, index):
    with open(path, "rb") as file:
        data = bytearray(file.read())
    data[index] ^= 255
    with open(path, "wb") as file:
        file.write(data)


def test_a_damaged_map_shard_is_named(source, tmp_path):
    reader = tiny_images.write_maps(tmp_path, source)
    flip_byte(reader.files[1], 100)
    with pytest.raises(ValueError, match=f"score-map shard {reader.files[1]} is damaged"):
        train(source, reader, steps=6)


def test_a_truncated_map_shard_is_found_at_the_start(source, tmp_path):
    reader = tiny_images.write_maps(tmp_path, source)
    os.truncate(reader.files[0], 50)
    with pytest.raises(ValueError, match="it has 50 bytes instead of"):
        open_score_maps(str(tmp_path))


@pytest.mark.slow
def test_damaged_and_lost_image_shards_are_named(tmp_path, monkeypatch):
    tiny_images.prepare(tmp_path, [tiny_images.position_image(i, 12, 12) for i in range(20)])
    source = open_source("tiny_images", "train", data_dir=str(tmp_path))
    flip_byte(source.files[2], 40)
    with pytest.raises(ValueError, match=f"image shard {source.files[2]} is damaged"):
        train(source, steps=10)
    with pytest.raises(ValueError, match=f"image shard {source.files[2]} is damaged"):
        list(pipeline.eval_batches(source, ModelInfo("lvvit_s", 5, (8, 8)), batch_size=4))
    monkeypatch.setattr(corruption, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    os.remove(source.files[2])
    with pytest.raises(ValueError, match=f"reading images failed: {source.files[2]}; No such file"):
        train(source, steps=10)


def test_a_batch_that_cannot_be_filled_or_divided_is_an_error(source):
    with pytest.raises(ValueError, match="30 images do not fill one batch of 31"):
        train(source, batch_size=31)
    with pytest.raises(ValueError, match="A batch of 8 images cannot be divided among 3 processes"):
        train(source, batch_size=8, process_count=3)
    with pytest.raises(ValueError, match="A batch of 8 images cannot be divided among 3 processes"):
        pipeline.eval_batches(source, ModelInfo("lvvit_s", 5, (8, 8)), batch_size=8, process_count=3)


def test_what_the_host_cannot_hold_is_refused_at_once(source, monkeypatch):
    info = ModelInfo("lvvit_s", 5, (224, 224))
    with pytest.raises(ValueError, match=r"4 batches of 1000000 images of 224 x 224 pixels take 560.8 GiB"):
        pipeline.eval_batches(source, info, batch_size=1_000_000)
    with pytest.raises(ValueError, match=r"4 batches of 64 images of 80000 x 80000 pixels take"):
        pipeline.annotation_batches(source, 0, batch_size=64, image_size=(80_000, 80_000))
    with pytest.raises(ValueError, match="100000 threads are too many to read images; at most 1024"):
        pipeline.eval_batches(source, info, batch_size=8, threads=100_000)
    with pytest.raises(ValueError, match=r"config.data.threads must be at most 1024, not 100000"):
        train(source, data={"threads": 100_000})
    train(source, steps=1, data={"shuffle_gib": 1000})  # the images are small
    huge = dataclasses.replace(source, record_bytes=2.0**40)
    message = r"data.shuffle_gib=1000 lets the shuffle buffer take 1000.0 GiB, and this host has"
    with pytest.raises(ValueError, match=message):
        train(huge, data={"shuffle_gib": 1000})


def test_a_map_of_another_size_is_named_and_does_not_count_as_a_corrupt_image(source, maps):
    wrong = dataclasses.replace(maps, info=dataclasses.replace(maps.info, top_k=2))
    message = (
        r"the score map of img_\d+.png in .* has 288 bytes of logits and 288 of classes, but score_maps.json"
    )
    with pytest.raises(ValueError, match=message):
        train(source, wrong)


def test_a_map_that_is_missing_against_the_description_is_named(source, tmp_path, monkeypatch):
    maps = tiny_images.write_maps(tmp_path, source, missing=(3,))
    shards = tuple(dataclasses.replace(shard, missing=0) for shard in maps.info.shards)
    wrong = dataclasses.replace(maps, info=dataclasses.replace(maps.info, shards=shards))
    monkeypatch.setattr(pipeline, "verified", lambda batches, *arguments, **options: batches)
    with pytest.raises(ValueError, match=r"the score map of img_3.png in .* has 0 bytes of logits and 0 of"):
        train(source, wrong, steps=5)


@pytest.mark.slow
def test_maps_with_wrong_contents_end_the_run_before_its_second_epoch(source, tmp_path, monkeypatch):
    """A class index of 60000: the checksum is that of the shard, so another program wrote it."""

    def unchecked(self, shard_index, keys, values, indices, missing):
        values, indices = values.astype("<f2"), indices.astype("<u2")
        indices[0, 1, 0, 2] = 60_000
        return values, indices

    monkeypatch.setattr(ScoreMapWriter, "_checked", unchecked)
    maps = tiny_images.write_maps(tmp_path, source)
    batches = pipeline.train_batches(source, maps, tiny_images.train_config())
    with pytest.raises(
        ValueError, match=r"the map of 'img_\d+.png' in .* has a class that is not in \[0, 5\)"
    ):
        list(itertools.islice(batches, 6))  # an epoch has 5


def test_predict_and_the_pipeline_see_the_same_pixels(tmp_path):
    """Every kind of image in class folders, at its own size: evaluation against `tlvit predict`."""
    for number, kind in enumerate(image_kinds.KINDS):
        suffix = {"jpegs": "jpg"}.get(kind.split()[-1], kind.split()[-1])
        path = tmp_path / f"train/class/{number:02}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_kinds.image_file(kind))
    preprocessing = Preprocessing(crop_pct=1.0)
    for exif in ("apply", "ignore"):
        source = open_source(str(tmp_path), "train", exif=exif)
        for size in ((20, 30), (30, 20)):
            info = ModelInfo("lvvit_s", 1, size, preprocessing=preprocessing)
            (batch,) = pipeline.eval_batches(source, info, batch_size=len(image_kinds.KINDS), threads=2)
            files = [os.fsdecode(r["key"]) for s in range(1) for r in source.read(s).as_numpy_iterator()]
            compared = 0
            for key, pixels in zip(files, batch.image, strict=True):
                (path,) = tmp_path.glob(f"train/{key}.*")
                seen = np.asarray(read_view(path, info, exif=exif == "apply"), int)
                if read_image(path, exif=exif == "apply").shape[:2] == size:  # no interpolation
                    assert np.abs(pixels - seen).max() <= 1, path
                    compared += 1
            turned = sum("exif" in kind for kind in image_kinds.KINDS) if exif == "apply" else 1
            assert compared == (turned if size == (30, 20) else len(files) - turned)


def test_evaluation_uses_the_preprocessing_of_the_model(tmp_path):
    """crop_pct changes the part of the image that is shown, interpolation changes the pixels only."""
    tiny_images.prepare(tmp_path, [tiny_images.wavy_image(48, 64, seed=i) for i in range(4)])
    source = open_source("tiny_images", "train", data_dir=str(tmp_path))

    def evaluate(**preprocessing):
        info = ModelInfo("lvvit_s", 5, (24, 32), preprocessing=Preprocessing(**preprocessing))
        return next(pipeline.eval_batches(source, info, batch_size=4))

    for crop_pct in (0.5, 1.0):
        bicubic = evaluate(crop_pct=crop_pct)
        bilinear = evaluate(crop_pct=crop_pct, interpolation="bilinear")
        margin = (1 - crop_pct) / 2
        expected = [[crop_pct, 0, margin], [0, crop_pct, margin]]
        np.testing.assert_allclose(bicubic.geometry[0], expected)
        np.testing.assert_array_equal(bicubic.geometry, bilinear.geometry)
        difference = np.abs(bicubic.image.astype(int) - bilinear.image).mean()
        assert difference == 0 if crop_pct == 0.5 else difference > 1  # at 0.5 the resize keeps the size


@pytest.mark.slow
def test_the_augmentation_settings_reach_the_images(tmp_path):
    tiny_images.prepare(tmp_path, [tiny_images.position_image(i, 50, 60) for i in range(12)])
    source = open_source("tiny_images", "train", data_dir=str(tmp_path))
    batch = lambda **settings: train(source, steps=1, batch_size=12, seed=3, **settings)[0]
    policy = {"randaugment": "rand-m9-n3-mstd0.5-inc1"}
    plain, moved = batch(), batch(augment=policy)
    again = batch(augment=policy, data={"threads": 1})
    np.testing.assert_array_equal(moved.image, again.image)
    np.testing.assert_array_equal(moved.geometry, again.geometry)
    changed = (plain.image != moved.image).any((1, 2, 3))
    turned = (plain.geometry != moved.geometry).any((1, 2))
    assert 6 < changed.sum() <= 12
    assert 1 < turned.sum() < 11
    assert not (turned & ~changed).any()
    for augment in ({"three_augment": True}, {"color_jitter": 0.3}):
        other = batch(augment=augment)
        assert (plain.image != other.image).any((1, 2, 3)).sum() > 6
        np.testing.assert_array_equal(plain.geometry, other.geometry)
    assert_same([batch(augment=policy | {"randaugment_on": "device"})], [plain])
    with pytest.raises(ValueError, match="'q9'"):
        batch(augment={"randaugment": "rand-q9"})
