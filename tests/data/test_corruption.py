"""Broken images, lost shards and damaged files during a run: replaced, tried again or named; never a hang."""

import concurrent.futures
import io
import itertools
import logging
import os
import threading
from unittest import mock

import numpy as np
import pytest
import tiny_images
from PIL import Image

from tlvit.data import corruption as faults
from tlvit.data import pipeline
from tlvit.data import shuffle as order
from tlvit.data.shuffle import ordered_records
from tlvit.data.sources.tfds import open_source

COUNT = 30
SMALL = 600_000  # bytes of shuffle: several windows and lanes for so few images
LIMIT = 120  # seconds: nothing may hang


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(order, "LANE_BYTES", 0)
    monkeypatch.setattr(faults, "RETRY_SECONDS", (0.2, 0.2, 0.2))


def jpeg(number, broken=""):
    """A JPEG whose blue is 8 times its number; or one that ends early, or no image at all."""
    image = tiny_images.position_image(8 * number, 96, 96)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    whole = buffer.getvalue()
    return {"": whole, "truncated": whole[: len(whole) * 3 // 4], "garbage": b"GIF or what?", "empty": b""}[
        broken
    ]


@pytest.fixture(params=["records", "files"])
def make_source(request, tmp_path_factory):
    """number -> kind of damage; the same images in a TFDS data set or in class folders."""

    def make(broken):
        path = tmp_path_factory.mktemp("data")
        images = [jpeg(i, broken.get(i, "")) for i in range(COUNT)]
        if request.param == "records":
            tiny_images.prepare(path, [io.BytesIO(image) for image in images], encoding="jpeg", num_shards=4)
            return open_source("tiny_images", "train", data_dir=str(path))
        for i, image in enumerate(images):
            file = path / f"train/class{i % 5}/img_{i}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)
        return open_source(str(path), "train")

    return make


def within(function):
    """The function's result, or a failed test if it takes too long."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(LIMIT)


def train(source, maps=None, steps=10, **changes):
    options = dict(batch_size=6, image_size=(32, 32), seed=5, num_threads=2, max_bad=0.2, shuffle_bytes=SMALL)
    batches = lambda: list(itertools.islice(pipeline.train_batches(source, maps, **options | changes), steps))
    return within(batches)


def numbers(batches):
    """Each image's number, from its blue channel: all places of all batches in a row."""
    return np.concatenate([(b.image[:, :, :, 2].mean((1, 2)) / 8).round().astype(int) for b in batches])


BROKEN = {4: "truncated", 11: "garbage", 17: "truncated", 23: "empty"}


@pytest.mark.parametrize(("shuffle_bytes", "guarded"), [(SMALL, 1), (2 << 30, 1), (2 << 30, 16)])
def test_the_next_image_takes_a_broken_ones_place(make_source, shuffle_bytes, guarded, caplog, monkeypatch):
    monkeypatch.setattr(faults, "GUARDED", guarded)
    sound = train(make_source({}), shuffle_bytes=shuffle_bytes)
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = train(make_source(BROKEN), shuffle_bytes=shuffle_bytes)
    should, are = numbers(sound), numbers(found)
    assert set(should) == set(range(COUNT))
    for place, (wanted, got) in enumerate(zip(should, are, strict=True)):
        assert got not in BROKEN
        if wanted not in BROKEN:
            assert got == wanted
        elif shuffle_bytes > SMALL and place % COUNT < COUNT - 2 and should[place + 1] not in BROKEN:
            assert got == should[place + 1]  # one window: the order's next place
    kept = np.isin(should, list(BROKEN), invert=True).reshape(-1, 6)
    for ours, theirs, keep in zip(found, sound, kept, strict=True):
        np.testing.assert_array_equal(ours.image[keep], theirs.image[keep])
        np.testing.assert_array_equal(ours.label, (numbers([ours]) % 5))
    for number in BROKEN:
        named = [r.getMessage() for r in caplog.records if f"img_{number}" in r.getMessage()]
        assert len(named) == 1, named  # once, though it came in two epochs
        assert "cannot be read; the next one takes its place" in named[0]


@pytest.mark.parametrize("shuffle_bytes", [SMALL, 2 << 30])
def test_replacements_do_not_depend_on_restarts_threads_or_processes(make_source, shuffle_bytes, monkeypatch):
    monkeypatch.setattr(faults, "GUARDED", 1)
    source = make_source(BROKEN)
    whole = train(source, shuffle_bytes=shuffle_bytes)
    for first in (1, 5, 7):
        later = train(source, steps=10 - first, first_step=first, shuffle_bytes=shuffle_bytes)
        for a, b in zip(later, whole[first:], strict=True):
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.label, b.label)
    parts = [
        train(source, process_index=p, process_count=3, num_threads=1, shuffle_bytes=shuffle_bytes)
        for p in range(3)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step].image for part in parts]), batch.image)


def test_the_guard_is_left_again_and_known_images_are_avoided(make_source, caplog, monkeypatch):
    """Every stretch under guard ends; once all broken images are known none begins."""
    monkeypatch.setattr(faults, "GUARDED", 1)
    guarded = []
    ordered = ordered_records
    monkeypatch.setattr(faults, "replace_broken", spy := mock.Mock(wraps=faults.replace_broken))
    monkeypatch.setattr(
        pipeline, "ordered_records", lambda *a, **k: guarded.append(k["spares"]) or ordered(*a, **k)
    )
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = numbers(train(make_source(BROKEN), steps=40))
    assert not set(found) & set(BROKEN)
    stretches = sum("batches are made under guard" in r.getMessage() for r in caplog.records)
    assert 1 <= stretches == spy.call_count <= len(BROKEN)
    assert len(guarded) == 1 + 2 * stretches  # without guard, then with and without in turn
    assert guarded == [0] + [faults.SPARES] * 2 * stretches


def test_a_replacement_has_its_own_map(make_source, tmp_path):
    sound, source = make_source({}), make_source({4: "truncated", 11: "garbage"})
    maps = tiny_images.write_maps(tmp_path, sound)
    for batch in train(source, maps):
        np.testing.assert_array_equal(batch.maps.value[:, 2, 0, 0], numbers([batch]))


def test_the_map_of_another_image_is_not_taken_for_a_broken_image(make_source, tmp_path):
    source = make_source({4: "garbage"})
    last = len(source.shard_lengths) - 1
    swap = lambda shard, keys: [keys[1], keys[0], *keys[2:]] if shard == last else keys
    maps = tiny_images.write_maps(tmp_path, make_source({}), change=swap)
    with pytest.raises(
        ValueError, match=r"the image is \S*img_\d+\S* but its map in .* belongs to \S*img_\d+"
    ):
        train(source, maps, steps=30)


def test_too_many_broken_images_are_an_error_that_names_one(make_source):
    with pytest.raises(
        ValueError, match=r"1 of 30 images of .* cannot be read, more than data.max_bad = 0.001 allows; "
    ):
        train(make_source({7: "truncated"}), max_bad=0.001)
    with pytest.raises(ValueError, match=r"3 of 30 images .* the last one is \S*img_\d+"):
        train(make_source({i: "garbage" for i in range(20)}), max_bad=0.08)
    with pytest.raises(ValueError, match=r"5 images in a row of .* cannot be read: \S*img_\d+"):
        train(make_source({i: "garbage" for i in range(28)}), max_bad=1.0)
    with pytest.raises(ValueError, match=r"data.max_bad is a share"):
        train(make_source({}), max_bad=3)


@pytest.mark.parametrize("count", [1, 3])
def test_evaluation_names_a_broken_image_or_leaves_it_out(make_source, count, caplog):
    source = make_source(BROKEN)
    options = dict(batch_size=9, image_size=(24, 24), num_threads=2, process_count=count)
    evaluate = lambda p, **more: list(pipeline.eval_batches(source, process_index=p, **options | more))
    with pytest.raises(
        ValueError,
        match=r"1 of 30 images .* more than eval.max_bad = 0 allows; the last .*img_",
    ):
        within(lambda: [evaluate(p) for p in range(count)])
    runs = [within(lambda p=p: evaluate(p, max_bad=0.2)) for p in range(count)]
    assert len({len(run) for run in runs}) == 1
    seen = []
    for batch in itertools.chain(*runs):
        found = numbers([batch])[batch.mask]
        np.testing.assert_array_equal(batch.label[batch.mask], found % 5)
        seen += found.tolist()
    assert sorted(seen) == [n for n in range(COUNT) if n not in BROKEN]
    assert "it is left out" in caplog.text


def test_annotation_keeps_the_place_of_a_broken_image(make_source):
    source = make_source(BROKEN)
    for shard, length in enumerate(source.shard_lengths):
        batches = lambda shard=shard: list(
            pipeline.annotation_batches(
                source, shard, batch_size=4, image_size=(16, 16), max_bad=0.2, num_threads=2
            )
        )
        items = within(batches)
        keys = [key for item in items for key in item.keys]
        mask = np.concatenate([item.batch.mask[: len(item.keys)] for item in items])
        assert len(keys) == length
        sound = [int(key.split("img_")[1].split(".")[0]) not in BROKEN for key in keys]
        assert mask.tolist() == sound


def test_a_lost_shard_is_tried_again(make_source, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(faults, "RETRY_SECONDS", (1.0, 1.0, 1.0))
    source = make_source({})
    wanted = train(source, steps=15)
    lost = source.files[-1]
    os.rename(lost, tmp_path / "away")
    back = threading.Timer(1.5, os.rename, (tmp_path / "away", lost))
    back.start()
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = train(source, steps=15)
    back.join()
    assert "trying again in 1 s" in caplog.text
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a.image, b.image)


def test_a_shard_that_stays_away_is_an_error(make_source, tmp_path):
    source = make_source({})
    batches = pipeline.train_batches(
        source, batch_size=6, image_size=(8, 8), seed=0, num_threads=2, shuffle_bytes=SMALL
    )
    within(lambda: next(batches))
    os.rename(source.files[0], tmp_path / "away")
    expected = r"more than data.max_bad = 0.001 allows" if source.is_folder else "No such file or directory"
    with pytest.raises(ValueError, match=expected):
        within(lambda: list(itertools.islice(batches, 40)))


@pytest.mark.parametrize("make_source", ["files"], indirect=True)  # records are not lost alone
def test_a_single_lost_file_counts_as_a_broken_image(make_source, caplog, monkeypatch):
    monkeypatch.setattr(faults, "GUARDED", 1)  # from then on it is avoided, without a look at it
    source = make_source({})
    os.remove(os.path.join(source.files[0], "class3/img_8.JPEG"))
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = numbers(train(source, steps=20))
    assert caplog.text.count("trying again") == 3  # the first time only
    assert set(found) == set(range(COUNT)) - {8}
    assert "class3/img_8 cannot be read; the next one takes its place (1 so far, 6 allowed)" in caplog.text
