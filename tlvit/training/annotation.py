"""Annotates a data set: an annotator scores every cell of every image once."""

import concurrent.futures
import logging
import os
import time
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from tlvit.annotators.dense import DenseAnnotator
from tlvit.annotators.host_scorer import HostScorer
from tlvit.annotators.scoring import Scoring
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.training.annotation_batch import CPU_BATCH
from tlvit.training.annotation_stream import DeviceClock, ShardParts, ShardScores, scored_batches
from tlvit.training.device_scorer import Annotator, DeviceScorer
from tlvit.training.run_log import duration

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow
    from tlvit.data.score_maps.format import ScoreMapInfo
    from tlvit.data.score_maps.writer import ScoreMapWriter
    from tlvit.data.sources.source import Source

MAX_CORRUPT = "max_corrupt (--max-missing)"  # the argument and the flag, for messages

log = logging.getLogger("tlvit")


def annotate(
    annotator: Annotator | tuple[nnx.Module, ModelInfo] | DenseAnnotator,
    source: "Source",
    out: str | os.PathLike,
    *,
    scoring: Scoring | None = None,
    top_k: int = 5,
    batch_size: int | None = None,
    max_corrupt: float = 0.0,
    threads: int = 0,
) -> "ScoreMapInfo | None":
    """Writes the score maps of a source, shard by shard. A second call continues an interrupted one.

    Every image is resized to the annotator's image size without keeping its aspect ratio, so a map covers the
    entire image (`Scoring` has other ways). In a run of several processes each writes some of the shards.

    Example:
      >>> source = tlvit.open_source("imagenet2012", "train")
      >>> tlvit.annotate(tlvit.load("nfnet_f6.pth"), source, "/data/score_maps")

    Args:
      annotator: an `Annotator`, the pair (model, info) that `tlvit.load` returns, or a `DenseAnnotator`.
      source: the images, with the annotator's number of classes or those of the classes map.
      out: folder of the score maps.
      scoring: crops, mirror images, classes and geometry. None: those of `Scoring()`.
      top_k: K, number of classes kept for each cell; at most the number of classes.
      batch_size: images in a batch of this process; for models of tlvit, a multiple of its devices. None: for
        them what the memory of the devices holds, at most 128 each; 64 on CPUs and for other annotators.
      max_corrupt: largest fraction of corrupt images, in [0, 1]. They get no map.
      threads: threads that decode images. 0: one for each core.

    Returns:
      The description of the finished folder; None on all processes but the first.

    Raises:
      OSError: a shard cannot be written. Finished shards are kept.
      ValueError: the batch cannot be split over the devices, the annotator and the source differ in their
        number of classes, the annotator returns another shape or logits that are not finite, the folder has
        other maps, or too many images are corrupt.
    """
    if isinstance(annotator, tuple):
        annotator = Annotator(*annotator)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    _wait_for_processes("annotation starts")  # JAX connects them at the first wait, within 30 seconds
    scoring = Scoring() if scoring is None else scoring
    scorer: DeviceScorer | HostScorer
    if isinstance(annotator, Annotator):
        scorer = DeviceScorer(annotator, scoring, top_k=top_k, batch_size=batch_size)
    else:
        scorer = HostScorer(annotator, scoring, top_k=top_k, batch_size=batch_size or CPU_BATCH)
    scoring.check_classes(scorer.num_annotator_classes, source.num_classes)
    writer = open_writer(scorer, source, out)
    try:
        write_shards(writer, scorer, max_corrupt=max_corrupt, threads=threads)
    except KeyboardInterrupt:
        done = f"{len(writer.done_shards())} of {len(source.shard_lengths)} shards"
        message = f"interrupted: {writer.path} has {done}, and the same command continues"
        raise KeyboardInterrupt(message) from None
    _wait_for_processes("score maps written")
    if jax.process_index() > 0:
        return None
    # The limit again: corrupt images of an earlier run and of other processes count too.
    return writer.finalize(max_missing=max_corrupt, setting=MAX_CORRUPT)


def _wait_for_processes(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def open_writer(
    scorer: DeviceScorer | HostScorer, source: "Source", out: str | os.PathLike
) -> "ScoreMapWriter":
    """The writer of the maps, which knows the shards that an interrupted run has written."""
    from tlvit.data.score_maps.format import MapDescription
    from tlvit.data.score_maps.writer import ScoreMapWriter

    description = MapDescription(
        annotator=scorer.name,
        annotator_hash=scorer.version,
        top_k=scorer.top_k,
        grid=scorer.grid,
        num_classes=scorer.num_classes,
        geometry="full" if scorer.center_fraction is None else "center",
        center_fraction=1.0 if scorer.center_fraction is None else scorer.center_fraction,
    )
    return ScoreMapWriter(out, source, description)


def write_shards(
    writer: "ScoreMapWriter", scorer: DeviceScorer | HostScorer, *, max_corrupt: float, threads: int
) -> DeviceClock:
    """Scores and writes this process's shards that are not written yet, and says how long devices waited.

    A shard is written in a thread while the next one is scored.
    """
    from tlvit.data.corruption import CorruptImages
    from tlvit.data.pipeline import annotation_batches

    source, info, done = writer.source, writer.info, writer.done_shards()
    # Each process has fixed shards. The set `done` may differ between processes, so it cannot be divided.
    own = range(jax.process_index(), len(source.shard_lengths), jax.process_count())
    todo = [shard for shard in own if shard not in done]
    log.info(
        "%s scores %d images of %s at %dx%d: maps of %dx%d cells with the top %d of %d classes; %d of %d "
        "shards are already written",
        info.annotator, source.num_examples, source.identity, *scorer.image_size, *info.grid, info.top_k,
        info.num_classes, len(done), len(source.shard_lengths),
    )  # fmt: skip
    if not todo:
        return DeviceClock()
    batch_size = scorer.batch_size
    corrupt = CorruptImages(source, max_corrupt=max_corrupt, setting=MAX_CORRUPT, replaced=False)
    open_shard = lambda shard: annotation_batches(
        source,
        shard,
        batch_size=batch_size,
        image_size=scorer.image_size,
        center_fraction=scorer.center_fraction,
        corrupt=corrupt,
        threads=threads,
    )
    progress, clock, parts = _Progress(len(todo)), DeviceClock(), ShardParts()

    def write(shard: int, scores: ShardScores) -> None:
        writer.write_shard(shard, scores.keys, scores.value, scores.index, scores.missing)
        progress.add(scores)

    with concurrent.futures.ThreadPoolExecutor(1, "write") as executor:
        writing = executor.submit(lambda: None)
        for shard, item, scores in scored_batches(todo, open_shard, scorer.score, clock):
            parts.add(item, scores)
            if len(parts.keys) == source.shard_lengths[shard]:
                writing.result()  # one shard is written at a time; an error in it ends the annotation
                writing, parts = executor.submit(write, shard, parts.joined()), ShardParts()
        writing.result()
    log.info("the devices waited for images in %.1f%% of the time", 100 * clock.idle_fraction)
    progress.warn_near_chance(info.num_classes)
    return clock


class _Progress:
    """Counts the images of the shards that are written, and those whose mean map agrees with the label."""

    def __init__(self, num_shards: int):
        self._num_shards, self._start = num_shards, time.perf_counter()
        self._shards = self._images = self._agreed = 0

    def add(self, scores: ShardScores) -> None:
        """Counts a shard and logs the progress."""
        self._shards += 1
        self._images += int(np.sum(~scores.missing))
        self._agreed += scores.agreed
        elapsed = time.perf_counter() - self._start
        log.info(
            "shard %d/%d  %.0f images/s  mean map agrees with the label on %.1f%% of %d images  ETA %s",
            self._shards, self._num_shards, self._images / elapsed,
            100 * self._agreed / max(self._images, 1), self._images,
            duration(elapsed / self._shards * (self._num_shards - self._shards)),
        )  # fmt: skip

    def warn_near_chance(self, num_classes: int) -> None:
        """Warns about score maps from which a student learns little."""
        if near_chance(self._agreed, self._images, num_classes):
            log.warning(
                "The mean map agrees with the label on %.1f%% of %d images, and chance is %.1f%%: a student "
                "learns little from such score maps. Train the annotator further, or check that its classes "
                "are those of the images, in the same order.",
                100 * self._agreed / self._images, self._images, 100 / num_classes,
            )  # fmt: skip


def near_chance(agreed: int, images: int, num_classes: int) -> bool:
    """Whether an accuracy is less than a tenth of the way from chance to 100 %, for 20 images or more."""
    chance = 1 / num_classes
    return images >= 20 and agreed / images < chance + 0.1 * (1 - chance)
