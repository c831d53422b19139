"""Annotates a data set: an annotator scores every cell of every image once."""

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from tlvit.annotators.dense import DenseAnnotator
from tlvit.annotators.host_scorer import HostScorer
from tlvit.annotators.scoring import Scoring, best_logits, merge_classes
from tlvit.annotators.views import Views
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.torch_names import to_torch
from tlvit.config import multiples_near
from tlvit.models.functional import Net, functionalize
from tlvit.ops.normalize import normalize
from tlvit.training.mesh import make_mesh, replicated
from tlvit.training.prefetch import to_global
from tlvit.training.run_log import duration
from tlvit.types import Array, PyTree

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow
    from tlvit.data.pipeline import KeyedBatch
    from tlvit.data.score_maps.format import ScoreMapInfo
    from tlvit.data.score_maps.writer import ScoreMapWriter
    from tlvit.data.sources.source import Source

log = logging.getLogger("tlvit")


@dataclasses.dataclass(frozen=True)
class Annotator:
    """A trained model that scores the cells of images.

    Attributes:
      model: a model with dense logits: a convolutional model or a vision transformer, best with a token head.
      info: the model's description, as `tlvit.load` returns it.
      image_size: (height, width) of the model's input. None: info.image_size. Larger images give finer maps.

    Raises:
      ValueError: the model has no dense logits.

    Example:
      >>> annotator = tlvit.Annotator(*tlvit.load("runs/annotator"))
      >>> tlvit.annotate(annotator, tlvit.open_source("photos", "train"), "photos/score_maps")
    """

    model: nnx.Module
    info: ModelInfo
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.model.has_dense_logits:
            raise ValueError(
                f"{self.info.model} has no dense logits, so it cannot score the cells of an image. An "
                "annotator is a convolutional model or a vision transformer."
            )

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the model's input."""
        return self.info.image_size if self.image_size is None else self.image_size


def annotate(
    annotator: Annotator | tuple[nnx.Module, ModelInfo] | DenseAnnotator,
    source: "Source",
    out: str | os.PathLike,
    *,
    scoring: Scoring | None = None,
    top_k: int = 5,
    batch_size: int = 64,
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
      batch_size: images in a batch of this process; for models of tlvit, a multiple of its devices.
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
    scoring = Scoring() if scoring is None else scoring
    scorer: _Scorer | HostScorer
    if isinstance(annotator, Annotator):
        scorer = _Scorer(annotator, scoring, top_k=top_k, batch_size=batch_size)
    else:
        scorer = HostScorer(annotator, scoring, top_k=top_k, batch_size=batch_size)
    scoring.check_classes(scorer.num_annotator_classes, source.num_classes)
    writer = _open_writer(scorer, source, out)
    try:
        _write_shards(writer, scorer, max_corrupt=max_corrupt, threads=threads)
    except KeyboardInterrupt:
        done = f"{len(writer.done_shards())} of {len(source.shard_lengths)} shards"
        message = f"interrupted: {writer.path} has {done}, and the same command continues"
        raise KeyboardInterrupt(message) from None
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("score maps written")
    return writer.finalize() if jax.process_index() == 0 else None


@dataclasses.dataclass(frozen=True)
class _ShardScores:
    """The scores of a shard's n images: keys, value and index [n, K, h, w], missing bool [n].

    `agreed` is the number of images whose label is the best class of their mean map.
    """

    keys: list[str]
    value: np.ndarray
    index: np.ndarray
    missing: np.ndarray
    agreed: int


class _Scorer:
    """Scores batches of images on the devices of this process. Attributes as of `HostScorer`."""

    def __init__(self, annotator: Annotator, scoring: Scoring, *, top_k: int, batch_size: int):
        self.mesh = make_mesh(jax.local_devices())
        devices = self.mesh.devices.size
        if batch_size < 1 or batch_size % devices:
            raise ValueError(
                f"A batch of {batch_size} images cannot be split over {devices} devices; "
                f"{multiples_near(batch_size, devices)} images can."
            )
        info, own = annotator.info, scoring.num_own_classes
        net, params, stats = functionalize(annotator.model)
        self.batch_size = batch_size
        self._weights = jax.device_put((params, stats), replicated(self.mesh))
        dense = _dense_function(net, info.preprocessing)
        crop = jax.ShapeDtypeStruct((batch_size, *annotator.input_size, 3), jnp.uint8)
        views = scoring.views(annotator.input_size, jax.eval_shape(dense, self._weights, crop).shape[1:3])
        self.image_size, self.grid = views.image_size, views.grid
        self.num_annotator_classes = info.num_classes
        self.num_classes = info.num_classes if own is None else own
        self.top_k = min(top_k, self.num_classes)
        self.center_fraction = scoring.center_fraction("full", info.preprocessing.crop_pct, self.image_size)
        self._score = _score_function(dense, views, scoring, self.top_k)
        self.name = scoring.describe(info.model, foreign=False)
        self.version = _hash_weights(annotator.model)
        if scoring.classes is not None:
            self.version = hashlib.sha256(f"{self.version}{scoring.classes}".encode()).hexdigest()

    def score(self, item: "KeyedBatch") -> tuple[Array, Array, Array]:
        """Scores a batch: value and index [B, K, h, w], and the best class of the mean map [B]."""
        return self._score(self._weights, to_global(item.batch.image, self.mesh))


def _score_shard(scorer: _Scorer | HostScorer, batches: "Iterable[KeyedBatch]") -> _ShardScores:
    """Scores all images of a shard."""
    keys, values, indices, present, agreed = [], [], [], [], 0
    for item in batches:
        count = len(item.keys)
        value, index, best = jax.device_get(scorer.score(item))
        keys += item.keys
        values.append(value[:count])
        indices.append(index[:count])
        present.append(item.batch.mask[:count])
        agreed += int(np.sum((best[:count] == item.batch.label[:count]) & present[-1]))
    missing = ~np.concatenate(present)
    return _ShardScores(keys, np.concatenate(values), np.concatenate(indices), missing, agreed)


def _dense_function(net: Net, preprocessing: Preprocessing) -> Callable[[PyTree, Array], Array]:
    """(weights, uint8 images [B, H, W, 3]) -> logits [B, h, w, L] of one view."""

    def dense(weights: PyTree, images: Array) -> Array:
        return net.bind(*weights).dense_logits(normalize(images, preprocessing.mean, preprocessing.std))

    return dense


def _score_function(
    dense: Callable[[PyTree, Array], Array], views: Views, scoring: Scoring, top_k: int
) -> Callable[[PyTree, Array], tuple[Array, Array, Array]]:
    """(weights, uint8 images) -> value and index [B, K, h, w], best class of the mean map [B]; compiled."""

    @jax.jit
    def score(weights: PyTree, images: Array) -> tuple[Array, Array, Array]:
        own = lambda view: merge_classes(dense(weights, view), scoring.classes)
        cut = views.cut(images)
        parts = [own(cut[0])] if len(cut) == 1 else jax.lax.map(own, jnp.stack(cut))
        logits = views.merge(parts)
        value, index = best_logits(logits, top_k, shifted=scoring.is_shifted(foreign=False))
        best = jnp.argmax(jnp.mean(logits, axis=(1, 2)), axis=-1)
        return rearrange(value, "b h w k -> b k h w"), rearrange(index, "b h w k -> b k h w"), best

    return score


def _open_writer(scorer: _Scorer | HostScorer, source: "Source", out: str | os.PathLike) -> "ScoreMapWriter":
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


def _write_shards(
    writer: "ScoreMapWriter", scorer: _Scorer | HostScorer, *, max_corrupt: float, threads: int
) -> None:
    """Scores and writes this process's shards that are not written yet."""
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
    start, images, agreed = time.perf_counter(), 0, 0
    for position, shard in enumerate(todo):
        batches = annotation_batches(
            source,
            shard,
            batch_size=scorer.batch_size,
            image_size=scorer.image_size,
            center_fraction=scorer.center_fraction,
            max_corrupt=max_corrupt,
            threads=threads,
        )
        scores = _score_shard(scorer, batches)
        writer.write_shard(shard, scores.keys, scores.value, scores.index, scores.missing)
        images, agreed = images + int(np.sum(~scores.missing)), agreed + scores.agreed
        elapsed = time.perf_counter() - start
        log.info(
            "shard %d/%d  %.0f images/s  mean map agrees with the label on %.1f%% of %d images  ETA %s",
            position + 1, len(todo), images / elapsed, 100 * agreed / max(images, 1), images,
            duration(elapsed / (position + 1) * (len(todo) - position - 1)),
        )  # fmt: skip
    if near_chance(agreed, images, info.num_classes):
        log.warning(
            "The mean map agrees with the label on %.1f%% of %d images, and chance is %.1f%%: a student "
            "learns little from such score maps. Train the annotator further, or check that its classes are "
            "those of the images, in the same order.",
            100 * agreed / images, images, 100 / info.num_classes,
        )  # fmt: skip


def near_chance(agreed: int, images: int, num_classes: int) -> bool:
    """Whether an accuracy is less than a tenth of the way from chance to 100 %, for 20 images or more."""
    chance = 1 / num_classes
    return images >= 20 and agreed / images < chance + 0.1 * (1 - chance)


def _hash_weights(model: nnx.Module) -> str:
    """A hash of the weights, which tells two checkpoints of a model apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(to_torch(model).items()):
        digest.update(name.encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
