"""Statistics of score maps: their confidence, their classes, and how they agree with the labels."""

import dataclasses
import heapq
import itertools
import os
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tlvit.data.score_maps.reader import ScoreMapReader
from tlvit.data.sources.source import Source
from tlvit.images import printable

BINS = 10  # of the histograms of confidence
VALUES = 4_000_000  # class probabilities of mean maps that are held at once


@dataclasses.dataclass(frozen=True)
class ScoredImage:
    """An image whose score map contradicts its label.

    Attributes:
      key: key of the image.
      shard, offset: its place in the source.
      label: its class index.
      label_probability: probability of the label in the mean map.
      best: the class with the highest probability in the mean map.
      best_probability: its probability.
    """

    key: str
    shard: int
    offset: int
    label: int
    label_probability: float
    best: int
    best_probability: float


@dataclasses.dataclass(frozen=True)
class MapStatistics:
    """Statistics of score maps. A map's probabilities are those that training uses: softmax over all classes,
    where a class that is not among the K of a cell has logit 0. The mean map is the softmax of the mean of
    the logits over the cells, the class token's target of an entire image without smoothing.

    Attributes:
      images: images with a map.
      bytes_per_image: size of the files divided by the number of their records.
      cells: int [10], cells whose best kept class has a probability in [0, 0.1), …, [0.9, 1].
      mean_maps: int [10], images whose mean map's best class has such a probability.
      never_best: classes that no cell has as its best class.
      never_kept: classes that are not among the K of any cell.
      agreement: fraction of the images whose label is the best class of their mean map; None without labels.
      least_plausible: the images whose mean map gives their label the lowest probability, lowest first.
    """

    images: int
    bytes_per_image: float
    cells: np.ndarray
    mean_maps: np.ndarray
    never_best: tuple[int, ...]
    never_kept: tuple[int, ...]
    agreement: float | None = None
    least_plausible: tuple[ScoredImage, ...] = ()


def map_statistics(
    reader: ScoreMapReader, source: Source | None = None, *, least_plausible: int = 20
) -> MapStatistics:
    """Reads all maps once.

    Args:
      reader: the maps.
      source: the images that the maps were made for, or a part of them; then only their maps are read. It
        gives the labels. None: there is no agreement and no list of images.
      least_plausible: length of the list of images.

    Raises:
      ValueError: the maps were made for other images, no image has a map, or a map belongs to another image.
    """
    info = reader.info
    if source is not None:
        reader.check_against(source)
    images = agreed = 0
    cells, mean_maps = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    best_in, kept_in = np.zeros(info.num_classes, bool), np.zeros(info.num_classes, bool)
    worst: list[tuple[float, int, ScoredImage]] = []  # a heap, the most plausible image first
    order = itertools.count()  # of equal images the first one counts as less plausible
    for shard, start, maps in _batches(reader, source):
        present = np.flatnonzero(~maps["missing"])
        value, index = maps["value"][present].astype(np.float64), maps["index"][present].astype(np.int64)
        probability, mean = _probabilities(value, index, info.num_classes)
        top = probability.argmax(1)
        best_in[np.take_along_axis(index, top[:, None], 1)] = True
        kept_in[index] = True
        cells += _histogram(probability.max(1))
        mean_maps += _histogram(mean.max(-1))
        images += len(present)
        if source is None:
            continue
        best, label = mean.argmax(-1), maps["label"][present]
        agreed += int(np.sum(best == label))
        of_label = np.take_along_axis(mean, label[:, None], 1)[:, 0]
        for row in np.argsort(of_label, kind="stable")[:least_plausible]:
            image = ScoredImage(
                os.fsdecode(maps["key"][present[row]]), shard, start + int(present[row]), int(label[row]),
                float(of_label[row]), int(best[row]), float(mean[row, best[row]]),
            )  # fmt: skip
            heapq.heappush(worst, (-image.label_probability, -next(order), image))
            if len(worst) > least_plausible:
                heapq.heappop(worst)
    if not images:
        raise ValueError(f"No image of {reader.path} has a score map.")
    return MapStatistics(
        images=images,
        bytes_per_image=sum(shard.bytes for shard in info.shards) / info.num_images,
        cells=cells,
        mean_maps=mean_maps,
        never_best=tuple(np.flatnonzero(~best_in).tolist()),
        never_kept=tuple(np.flatnonzero(~kept_in).tolist()),
        agreement=None if source is None else agreed / images,
        least_plausible=tuple(image for _, _, image in sorted(worst, reverse=True)),
    )


def _batches(
    reader: ScoreMapReader, source: Source | None
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """(shard, first offset, arrays of some maps); with a source also "label"."""
    size = max(1, min(256, VALUES // reader.info.num_classes))
    lengths = [shard.records for shard in reader.info.shards] if source is None else source.shard_lengths
    for shard, length in enumerate(lengths):
        data = _shard(reader, source, shard, length)
        for number, arrays in enumerate(data.batch(size).prefetch(2).as_numpy_iterator()):
            if source is not None and (arrays["key"] != arrays["image_key"]).any():
                wrong = int(np.argmax(arrays["key"] != arrays["image_key"]))
                raise ValueError(
                    f"score map of another image: the image is {printable(arrays['image_key'][wrong])} but "
                    f"its map in {reader.path} belongs to {printable(arrays['key'][wrong])}"
                )
            yield shard, number * size, arrays


def _shard(reader: ScoreMapReader, source: Source | None, shard: int, length: int) -> tf.data.Dataset:
    """The parsed maps of a shard; with a source, of its images, with their keys and labels."""
    if source is None:
        return reader.read(shard)

    def parse(raw: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor]:
        example = source.parse(raw)
        return reader.parse(record) | {"image_key": example["key"], "label": example["label"]}

    pairs = tf.data.Dataset.zip(source.records(shard, 0), reader.records_of(source)(shard, 0).take(length))
    return pairs.map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _probabilities(value: np.ndarray, index: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over all classes, where those that are not kept have logit 0.

    Args:
      value: logits [B, K, h, w].
      index: their classes.
      num_classes: L.

    Returns:
      The probabilities of the K classes of each cell [B, K, h, w], and the mean map [B, L].
    """
    images, kept = value.shape[:2]
    largest = np.maximum(value.max(1, keepdims=True, initial=0), 0)
    exponentials = np.exp(value - largest)
    total = exponentials.sum(1, keepdims=True) + (num_classes - kept) * np.exp(-largest)
    place = index + num_classes * np.arange(images)[:, None, None, None]
    sums = np.bincount(place.ravel(), value.ravel(), images * num_classes)  # integers without an image
    logits = sums.reshape(images, num_classes) / (value.shape[2] * value.shape[3])
    mean = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / total, mean / mean.sum(-1, keepdims=True)


def _histogram(probability: np.ndarray) -> np.ndarray:
    """Counts in the BINS bins of [0, 1]."""
    return np.histogram(probability, bins=BINS, range=(0, 1))[0]
