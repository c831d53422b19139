"""Scores batches with a model of tlvit on the devices of a process."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh

from tlvit.annotators.scoring import Scoring, best_logits, merge_classes
from tlvit.annotators.views import Views
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.checkpoints.torch_names import to_torch
from tlvit.models.functional import Net, functionalize
from tlvit.ops.normalize import normalize
from tlvit.training.annotation_batch import choose_batch
from tlvit.training.annotation_stream import Scores
from tlvit.training.mesh import batch_sharding, make_mesh, map_devices, multiples_near, replicated
from tlvit.training.prefetch import to_global
from tlvit.types import Array, PyTree

if TYPE_CHECKING:  # importing tlvit.data imports TensorFlow
    from tlvit.data.batching import KeyedBatch


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


class DeviceScorer:
    """Scores batches of images on the devices of this process. Attributes as of `HostScorer`."""

    def __init__(self, annotator: Annotator, scoring: Scoring, *, top_k: int, batch_size: int | None):
        self.mesh = make_mesh(jax.local_devices())
        devices = self.mesh.devices.size
        if batch_size is not None and (batch_size < 1 or batch_size % devices):
            raise ValueError(
                f"A batch of {batch_size} images cannot be split over {devices} devices; "
                f"{multiples_near(batch_size, devices)} images can."
            )
        info, own = annotator.info, scoring.num_own_classes
        net, params, stats = functionalize(annotator.model)
        self._weights = jax.device_put((params, stats), replicated(self.mesh))
        dense = dense_function(net, info.preprocessing)
        crop = jax.ShapeDtypeStruct((1, *annotator.input_size, 3), jnp.uint8)
        views = scoring.views(annotator.input_size, jax.eval_shape(dense, self._weights, crop).shape[1:3])
        self.image_size, self.grid = views.image_size, views.grid
        self.num_annotator_classes = info.num_classes
        self.num_classes = info.num_classes if own is None else own
        self.top_k = min(top_k, self.num_classes)
        self.center_fraction = scoring.center_fraction("full", info.preprocessing.crop_pct, self.image_size)
        self._score = score_function(dense, views, scoring, self.top_k, self.mesh)
        self.name = scoring.describe(info.model, foreign=False)
        self.version = _hash_weights(annotator.model)
        if scoring.classes is not None:
            self.version = hashlib.sha256(f"{self.version}{scoring.classes}".encode()).hexdigest()
        self._batch_size = batch_size

    @functools.cached_property
    def _chosen(self) -> tuple[int, jax.stages.Compiled]:
        """The batch size and its compiled program."""
        compiled = lambda count: self._score.lower(self._weights, self._images(count)).compile()
        if self._batch_size is not None:
            return self._batch_size, compiled(self._batch_size)
        return choose_batch(compiled, self.mesh, sum(x.nbytes for x in jax.tree.leaves(self._weights)))

    @property
    def batch_size(self) -> int:
        """Images in a batch. The first access compiles the program."""
        return self._chosen[0]

    @property
    def program(self) -> jax.stages.Compiled:
        """(weights, images of a batch) -> scores."""
        return self._chosen[1]

    def score(self, item: "KeyedBatch") -> Scores:
        """Starts to score a batch."""
        return self.program(self._weights, to_global(item.batch.image, self.mesh))

    def _images(self, count: int) -> jax.ShapeDtypeStruct:
        shape = (count, *self.image_size, 3)
        return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(self.mesh))


def dense_function(net: Net, preprocessing: Preprocessing) -> Callable[[PyTree, Array], Array]:
    """(weights, uint8 images [B, H, W, 3]) -> logits [B, h, w, L] of one view."""

    def dense(weights: PyTree, images: Array) -> Array:
        return net.bind(*weights).dense_logits(normalize(images, preprocessing.mean, preprocessing.std))

    return dense


def score_function(
    dense: Callable[[PyTree, Array], Array], views: Views, scoring: Scoring, top_k: int, mesh: Mesh
) -> jax.stages.Wrapped:
    """(weights, uint8 images) -> value and index [B, K, h, w], best class of the mean map [B]; compiled."""

    def score(weights: PyTree, images: Array) -> tuple[Array, Array, Array]:
        own = lambda view: merge_classes(dense(weights, view), scoring.classes)
        cut = views.cut(images)
        parts = [own(cut[0])] if len(cut) == 1 else jax.lax.map(own, jnp.stack(cut))
        logits = views.merge(parts)
        value, index = best_logits(logits, top_k, shifted=scoring.is_shifted(foreign=False))
        best = jnp.argmax(jnp.mean(logits, axis=(1, 2)), axis=-1)
        return rearrange(value, "b h w k -> b k h w"), rearrange(index, "b h w k -> b k h w"), best

    return jax.jit(map_devices(score, mesh, mesh.axis_names))


def _hash_weights(model: nnx.Module) -> str:
    """A hash of the weights, which tells two checkpoints of a model apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(to_torch(model).items()):
        digest.update(name.encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
