"""Statistics of score maps against a dense computation in float64."""

import numpy as np
import pytest
import tiny_images
from conftest import softmax

from tlvit.data.score_maps.format import MapDescription
from tlvit.data.score_maps.reader import open_score_maps
from tlvit.data.score_maps.statistics import map_statistics
from tlvit.data.score_maps.writer import ScoreMapWriter
from tlvit.data.sources.open import open_source

CLASSES, GRID, TOP_K = 5, (2, 3), 2


def write(path, source, missing=()):
    """Random maps in which class 4 is never kept; their dense logits by key, float64 [L, h, w]."""
    fields = {"top_k": TOP_K, "grid": GRID, "num_classes": CLASSES}
    description = MapDescription(annotator="test", annotator_hash="0", **fields)
    writer, logits = ScoreMapWriter(str(path), source, description), {}
    rng = np.random.RandomState(3)
    for shard in range(len(source.shard_lengths)):
        keys = [record["key"].decode() for record in source.read(shard).as_numpy_iterator()]
        dense = (3 * rng.randn(len(keys), CLASSES, *GRID)).astype(np.float16)
        dense[:, 4] = -20
        index = np.argsort(-dense, axis=1)[:, :TOP_K]
        value = np.take_along_axis(dense, index, 1)
        writer.write_shard(shard, keys, value, index, np.array([key in missing for key in keys]))
        for key, row_value, row_index in zip(keys, value, index, strict=True):
            logits[key] = np.zeros((CLASSES, *GRID))
            np.put_along_axis(logits[key], row_index, row_value.astype(np.float64), 0)
    writer.finalize()
    return open_score_maps(path), {key: logits[key] for key in logits if key not in missing}


def labels_of(source):
    shards = range(len(source.shard_lengths))
    records = [record for shard in shards for record in source.read(shard).as_numpy_iterator()]
    return {record["key"].decode(): int(record["label"]) for record in records}


def test_statistics_are_those_of_the_dense_maps(source, tmp_path):
    labels = labels_of(source)
    left_out = sorted(labels)[2]
    reader, logits = write(tmp_path, source, missing=[left_out])
    keys = list(logits)
    dense = np.stack([logits[key] for key in keys]).transpose(0, 2, 3, 1)
    mean, best = softmax(dense.mean((1, 2))), np.stack([best_kept(logits[key]) for key in keys])
    cells = np.take_along_axis(softmax(dense), best[..., None], -1)
    label = np.array([labels[key] for key in keys])
    found = map_statistics(reader, source, least_plausible=4)
    assert found.images == len(keys)
    assert found.bytes_per_image == sum(s.bytes for s in reader.info.shards) / source.num_examples
    np.testing.assert_array_equal(found.cells, np.histogram(cells, 10, (0, 1))[0])
    np.testing.assert_array_equal(found.mean_maps, np.histogram(mean.max(-1), 10, (0, 1))[0])
    assert found.agreement == np.mean(mean.argmax(-1) == label)
    assert found.never_kept == (4,)
    assert found.never_best == tuple(k for k in range(CLASSES) if k not in best)
    of_label = mean[np.arange(len(keys)), label]
    order = np.argsort(of_label)[:4]
    assert [image.key for image in found.least_plausible] == [keys[i] for i in order]
    for image, i in zip(found.least_plausible, order, strict=True):
        assert (image.label, image.best) == (label[i], mean[i].argmax())
        np.testing.assert_allclose(
            (image.label_probability, image.best_probability), (of_label[i], mean[i].max()), rtol=1e-6
        )
        record = next(iter(source.read(image.shard, image.offset).take(1).as_numpy_iterator()))
        assert record["key"].decode() == image.key


def best_kept(logits):
    """The kept class with the highest logit; one that is not kept may be more probable, with logit 0."""
    return np.where(logits == 0, -np.inf, logits).argmax(0)


def test_without_images_there_are_no_labels(source, tmp_path):
    reader, logits = write(tmp_path, source)
    found = map_statistics(reader)
    assert (found.agreement, found.least_plausible) == (None, ())
    assert found.images == len(logits)
    assert found.cells.sum() == len(logits) * GRID[0] * GRID[1]


def test_copies_of_one_image_are_listed_in_their_order(tmp_path):
    """Their probabilities are equal, also those of images in different shards."""
    tiny_images.prepare(tmp_path, [tiny_images.position_image(0, 8, 8)] * 9)
    source = open_source("tiny_images", "train", data_dir=str(tmp_path))
    description = MapDescription(annotator="a", annotator_hash="0", top_k=1, grid=(1, 1), num_classes=CLASSES)
    writer, keys = ScoreMapWriter(tmp_path / "maps", source, description), []
    for shard, count in enumerate(source.shard_lengths):
        own = [record["key"].decode() for record in source.read(shard).as_numpy_iterator()]
        maps = np.zeros((count, 1, 1, 1), np.float32), np.zeros((count, 1, 1, 1), np.int64)
        writer.write_shard(shard, own, *maps)
        keys += own
    writer.finalize()
    found = map_statistics(open_score_maps(tmp_path / "maps"), source, least_plausible=9).least_plausible
    for probability in {image.label_probability for image in found}:
        equal = [image.key for image in found if image.label_probability == probability]
        assert equal == [key for key in keys if key in equal]


@pytest.mark.slow
def test_maps_that_cannot_be_counted(source, tmp_path):
    keys = sorted(labels_of(source))
    reader, _ = write(tmp_path / "none", source, missing=keys)
    with pytest.raises(ValueError, match=r"No image of .* has a score map"):
        map_statistics(reader)
    swap = lambda shard, keys: [keys[1], keys[0], *keys[2:]]
    maps = tiny_images.write_maps(tmp_path / "swapped", source, change=swap)
    with pytest.raises(ValueError, match=r"score map of another image: the image is img_"):
        map_statistics(maps, source)
