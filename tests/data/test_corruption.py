"""Corrupt images are replaced, lost files are retried, and damaged files are named. Nothing hangs."""

import concurrent.futures
import io
import itertools
import logging
import os
import types
from unittest import mock

import image_kinds
import numpy as np
import pytest
import tiny_images

import tlvit
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.data import corruption, pipeline, shuffle
from tlvit.data.shuffle import ordered_records
from tlvit.data.sources.open import open_source

COUNT = 30
CORRUPT = {4: "truncated", 11: "garbage", 17: "truncated", 23: "empty"}
ONE_WINDOW = {"shuffle_gib": 2.0}
SEVERAL_WINDOWS = {"shuffle_gib": tiny_images.SMALL_SHUFFLE}
HANGS = 600  # seconds after which a test fails instead of hanging


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Retries do not wait. The pauses they asked for are collected."""
    found = []
    monkeypatch.setattr(shuffle, "STREAM_BYTES", 0)
    monkeypatch.setattr(corruption, "time", types.SimpleNamespace(sleep=found.append))
    return found


def jpeg(number, damage=""):
    """A JPEG whose blue is 8 times its number; or one that ends early, or no image at all."""
    complete = tiny_images.encode_jpeg(tiny_images.position_image(8 * number, 96, 96), quality=95)
    truncated = complete[: len(complete) * 3 // 4]
    return {"": complete, "truncated": truncated, "garbage": b"GIF or what?", "empty": b""}[damage]


@pytest.fixture(params=["records", pytest.param("files", marks=pytest.mark.slow)])
def make_source(request, tmp_path_factory):
    """Makes the images of a source, some of them damaged: in a TFDS data set or in class folders."""

    def make(damage):
        path = tmp_path_factory.mktemp("data")
        images = [jpeg(i, damage.get(i, "")) for i in range(COUNT)]
        if request.param == "records":
            tiny_images.prepare(path, [io.BytesIO(image) for image in images], encoding="jpeg", num_shards=4)
            return open_source("tiny_images", "train", data_dir=str(path))
        for i, image in enumerate(images):
            file = path / f"train/class{i % 5}/img_{i}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)
        return open_source(str(path), "train")

    return make


def without_hanging(function):
    """The function's result, or a failed test if it hangs."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(HANGS)


def train(source, maps=None, steps=10, *, data=None, **position):
    """The first training batches, in lists; `position` has first_step, process_index and process_count."""
    data = {"max_corrupt": 0.2} | (data or {})
    config = tiny_images.train_config(image_size=(32, 32), data=data)
    batches = lambda: pipeline.train_batches(source, maps, config, **position)
    return without_hanging(lambda: list(itertools.islice(batches(), steps)))


def numbers(batches):
    """The number of every image of all batches, from its blue channel."""
    return np.concatenate([(b.image[:, :, :, 2].mean((1, 2)) / 8).round().astype(int) for b in batches])


@pytest.mark.parametrize(
    ("data", "window"),
    [
        (SEVERAL_WINDOWS, 1),
        pytest.param(ONE_WINDOW, 1, marks=pytest.mark.slow),
        pytest.param(ONE_WINDOW, corruption.FALLBACK_BATCHES, marks=pytest.mark.slow),
    ],
)
def test_the_next_image_replaces_a_corrupt_one(make_source, data, window, caplog, monkeypatch):
    monkeypatch.setattr(corruption, "FALLBACK_BATCHES", window)
    sound = train(make_source({}), data=data)
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = train(make_source(CORRUPT), data=data)
    expected, actual = numbers(sound), numbers(found)
    assert set(expected) == set(range(COUNT))
    for i, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        assert got not in CORRUPT
        if wanted not in CORRUPT:
            assert got == wanted
        elif data is ONE_WINDOW and i % COUNT < COUNT - 2 and expected[i + 1] not in CORRUPT:
            assert got == expected[i + 1]
    kept = np.isin(expected, list(CORRUPT), invert=True).reshape(-1, 6)
    for ours, theirs, keep in zip(found, sound, kept, strict=True):
        np.testing.assert_array_equal(ours.image[keep], theirs.image[keep])
        np.testing.assert_array_equal(ours.label, (numbers([ours]) % 5))
    for number in CORRUPT:
        named = [r.getMessage() for r in caplog.records if f"img_{number}" in r.getMessage()]
        assert len(named) == 1, named  # once, although it occurs in two epochs
        assert "cannot be read and is replaced by the next one" in named[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_source", "data", "starts"),
    [
        ("records", SEVERAL_WINDOWS, (1, 5, 7)),
        ("records", ONE_WINDOW, (1, 5, 7)),
        ("files", SEVERAL_WINDOWS, (1, 5, 7)),
        ("files", ONE_WINDOW, (1, 5, 7)),
    ],
    indirect=["make_source"],
)
def test_replacements_do_not_depend_on_restarts_threads_or_processes(make_source, data, starts, monkeypatch):
    monkeypatch.setattr(corruption, "FALLBACK_BATCHES", 1)
    source = make_source(CORRUPT)
    complete = train(source, data=data)
    for first in starts:
        later = train(source, steps=10 - first, first_step=first, data=data)
        for a, b in zip(later, complete[first:], strict=True):
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.label, b.label)
    parts = [train(source, process_index=p, process_count=3, data=data | {"threads": 1}) for p in range(3)]
    for step, batch in enumerate(complete):
        np.testing.assert_array_equal(np.concatenate([part[step].image for part in parts]), batch.image)


@pytest.mark.slow
def test_fallback_mode_ends_and_known_images_are_skipped(make_source, caplog, monkeypatch):
    """Every window in fallback mode ends. Once all corrupt images are known, none begins."""
    monkeypatch.setattr(corruption, "FALLBACK_BATCHES", 1)
    replacements = []
    ordered = ordered_records
    monkeypatch.setattr(corruption, "replace_corrupt", spy := mock.Mock(wraps=corruption.replace_corrupt))
    monkeypatch.setattr(
        pipeline,
        "ordered_records",
        lambda *a, **k: replacements.append(k["replacements"]) or ordered(*a, **k),
    )
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = numbers(train(make_source(CORRUPT), steps=40))
    assert not set(found) & set(CORRUPT)
    windows = sum("batches in fallback mode" in r.getMessage() for r in caplog.records)
    assert 1 <= windows == spy.call_count <= len(CORRUPT)
    assert len(replacements) == 1 + 2 * windows  # at full speed, then in fallback mode and at full speed
    assert replacements == [0] + [corruption.REPLACEMENTS] * 2 * windows


@pytest.mark.slow
def test_a_replacement_has_its_own_map(make_source, tmp_path):
    sound, source = make_source({}), make_source({4: "truncated", 11: "garbage"})
    maps = tiny_images.write_maps(tmp_path, sound)
    for batch in train(source, maps):
        np.testing.assert_array_equal(batch.maps.value[:, 2, 0, 0], numbers([batch]))


@pytest.mark.slow
def test_the_map_of_another_image_does_not_count_as_a_corrupt_image(make_source, tmp_path):
    source = make_source({4: "garbage"})
    last = len(source.shard_lengths) - 1
    swap = lambda shard, keys: [keys[1], keys[0], *keys[2:]] if shard == last else keys
    maps = tiny_images.write_maps(tmp_path, make_source({}), change=swap)
    message = r"the image is \S*img_\d+\S* but its map in .* belongs to \S*img_\d+"
    with pytest.raises(ValueError, match=message):
        train(source, maps, steps=30)


@pytest.mark.slow
def test_too_many_corrupt_images_are_an_error_that_names_one(make_source):
    message = (
        r"1 of 30 images of .* cannot be read, more than data.max_corrupt = 0.001 allows. The last one is "
    )
    with pytest.raises(ValueError, match=message):
        train(make_source({7: "truncated"}), data={"max_corrupt": 0.001})
    with pytest.raises(ValueError, match=r"3 of 30 images .* The last one is \S*img_\d+"):
        train(make_source({i: "garbage" for i in range(20)}), data={"max_corrupt": 0.08})
    with pytest.raises(ValueError, match=r"5 images in a row of .* cannot be read: \S*img_\d+"):
        train(make_source({i: "garbage" for i in range(28)}), data={"max_corrupt": 1.0})


def test_a_fraction_of_corrupt_images_out_of_range_is_an_error(make_source):
    source, info = make_source({}), ModelInfo("lvvit_s", 5, (24, 24))
    with pytest.raises(ValueError, match=r"data.max_corrupt must be at most 1, not 3"):
        train(source, data={"max_corrupt": 3})
    with pytest.raises(ValueError, match=r"eval.max_corrupt must be in \[0, 1\], not -0.1"):
        pipeline.eval_batches(source, info, batch_size=6, max_corrupt=-0.1)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_evaluation_names_a_corrupt_image_or_leaves_it_out(make_source, count, caplog):
    source, info = make_source(CORRUPT), ModelInfo("lvvit_s", 5, (24, 24))

    def evaluate(process_index, **options):
        options |= {"batch_size": 9, "threads": 2, "process_index": process_index, "process_count": count}
        return list(pipeline.eval_batches(source, info, **options))

    message = r"1 of 30 images .* more than eval.max_corrupt = 0 allows. The last .*img_"
    with pytest.raises(ValueError, match=message):
        without_hanging(lambda: [evaluate(p) for p in range(count)])
    runs = [without_hanging(lambda p=p: evaluate(p, max_corrupt=0.2)) for p in range(count)]
    assert len({len(run) for run in runs}) == 1
    seen = []
    for batch in itertools.chain(*runs):
        found = numbers([batch])[batch.mask]
        np.testing.assert_array_equal(batch.label[batch.mask], found % 5)
        seen += found.tolist()
    assert sorted(seen) == [n for n in range(COUNT) if n not in CORRUPT]
    assert "and is left out" in caplog.text


def test_annotation_keeps_the_index_of_a_corrupt_image(make_source):
    source = make_source(CORRUPT)
    corrupt = corruption.CorruptImages(source, max_corrupt=0.2, setting="max_corrupt", replaced=False)
    options = {"batch_size": 4, "image_size": (16, 16), "corrupt": corrupt, "threads": 2}
    for shard, length in enumerate(source.shard_lengths):
        batches = lambda shard=shard: list(pipeline.annotation_batches(source, shard, **options))
        items = without_hanging(batches)
        keys = [key for item in items for key in item.keys]
        mask = np.concatenate([item.batch.mask[: len(item.keys)] for item in items])
        assert len(keys) == length
        sound = [int(key.split("img_")[1].split(".")[0]) not in CORRUPT for key in keys]
        assert mask.tolist() == sound


class OneCell:
    """An annotator whose maps have one cell."""

    num_classes, image_size, version = 5, (16, 16), "1"

    def dense_logits(self, images):
        return np.ones((len(images), 1, 1, 5), np.float32)


def test_the_limit_of_annotation_counts_the_images_of_all_shards(make_source, tmp_path):
    """Each of the four shards of the TFDS data set has one. A call that resumes counts those of the first."""
    source = make_source(CORRUPT)
    annotate = lambda limit: tlvit.annotate(
        OneCell(), source, tmp_path / "maps", batch_size=4, max_corrupt=limit, threads=2
    )
    with pytest.raises(ValueError, match=r"4 of 30 .* more than max_corrupt \(--max-missing\) = 0.1 allows"):
        without_hanging(lambda: annotate(0.1))
    with pytest.raises(ValueError, match=r"4 of 30 .* more than max_corrupt \(--max-missing\) = 0.1 allows"):
        without_hanging(lambda: annotate(0.1))
    assert not (tmp_path / "maps/score_maps.json").exists()
    assert without_hanging(lambda: annotate(0.2)).num_missing == 4


@pytest.mark.slow
def test_a_lost_shard_is_tried_again(make_source, tmp_path, caplog, monkeypatch, pauses):
    """The shard comes back during the second pause."""
    source = make_source({})
    expected = train(source, steps=15)
    lost = source.files[-1]
    os.rename(lost, tmp_path / "away")

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            os.rename(tmp_path / "away", lost)

    monkeypatch.setattr(corruption, "time", types.SimpleNamespace(sleep=sleep))
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = train(source, steps=15)
    assert pauses == [1.0, 5.0]
    assert "trying again in 1 s" in caplog.text
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.image, b.image)


@pytest.mark.slow
def test_a_shard_that_stays_lost_is_an_error(make_source, tmp_path):
    source = make_source({})
    batches = pipeline.train_batches(source, None, tiny_images.train_config(image_size=(8, 8), seed=0))
    without_hanging(lambda: next(batches))
    os.rename(source.files[0], tmp_path / "away")
    message = "more than data.max_corrupt = 0.001 allows" if source.is_folder else "No such file or directory"
    with pytest.raises(ValueError, match=message):
        without_hanging(lambda: list(itertools.islice(batches, 40)))


@pytest.mark.slow
@pytest.mark.parametrize("make_source", ["files"], indirect=True)
def test_the_reason_and_names_that_are_not_utf_8_are_shown(make_source, caplog):
    source = make_source({})
    os.rename(
        os.path.join(source.files[0], "class3/img_8.JPEG"),
        os.fsencode(source.files[0]) + b"/class3/\xff.JPEG",
    )
    large = os.path.join(source.files[0], "class4/img_9.JPEG")
    with open(large, "wb") as file:
        file.write(image_kinds.png(8, 2, np.zeros((1, 1, 3), np.uint8), (22_000, 22_000)))
    source = open_source(source.name, "train")
    with caplog.at_level(logging.WARNING, "tlvit"):
        assert 8 in numbers(train(source, steps=8))
    message = "img_9.JPEG cannot be read and is replaced by the next one (1 so far, 6 allowed): "
    assert message + "Image size (484000000 pixels) exceeds limit of 178956970 pixels" in caplog.text
    with open(os.fsencode(source.files[0]) + b"/class3/\xff.JPEG", "wb") as file:
        file.write(b"")
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = numbers(train(source, steps=12))
    assert not {8, 9} & set(found)
    assert "class3/\\xff.JPEG cannot be read and is replaced" in caplog.text
    assert ": the file is empty" in caplog.text
    os.remove(os.fsencode(source.files[0]) + b"/class3/\xff.JPEG")
    train(source, steps=8)
    info = ModelInfo("lvvit_s", 5, (24, 24))
    with pytest.raises(ValueError, match=r"cannot be read, more than eval.max_corrupt = 0 allows"):
        list(pipeline.eval_batches(source, info, batch_size=6))


@pytest.mark.slow
@pytest.mark.parametrize("make_source", ["files"], indirect=True)  # a record is never lost alone
def test_a_single_lost_file_counts_as_a_corrupt_image(make_source, caplog, monkeypatch, pauses):
    monkeypatch.setattr(corruption, "FALLBACK_BATCHES", 1)  # afterwards it is skipped without reading it
    source = make_source({})
    os.remove(os.path.join(source.files[0], "class3/img_8.JPEG"))
    with caplog.at_level(logging.WARNING, "tlvit"):
        found = numbers(train(source, steps=20))
    assert caplog.text.count("trying again") == 3  # the first time only
    assert pauses == list(corruption.RETRY_SECONDS)
    assert set(found) == set(range(COUNT)) - {8}
    message = "class3/img_8 cannot be read and is replaced by the next one (1 so far, 6 allowed)"
    assert message in caplog.text


def test_a_corrupt_image_of_a_short_last_window_is_replaced(tmp_path):
    """9 images in windows of 8."""
    for i in range(9):
        file = tmp_path / f"train/class{i % 2}/img_{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(i, "garbage" if i == 4 else ""))
    settings = {"max_corrupt": 0.2, "shuffle_gib": 1e-4}
    config = tiny_images.train_config(image_size=(32, 32), batch_size=1, data=settings)
    source = open_source(str(tmp_path), "train")
    assert pipeline.train_order(source, config).window == 8
    batches = pipeline.train_batches(source, None, config)
    found = without_hanging(lambda: list(itertools.islice(batches, 90)))
    assert set(numbers(found)) == set(range(9)) - {4}
