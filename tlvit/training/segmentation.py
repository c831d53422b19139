"""Segmentation: the loss of the pixels, and mIoU of whole images from a confusion matrix on the devices."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.config import Config, Segmentation
from tlvit.models.functional import Net
from tlvit.ops.normalize import normalize
from tlvit.ops.segmentation import (
    confusion_matrix,
    iou_summary,
    multi_scale_probs,
    segmentation_loss,
    slide_logits,
)
from tlvit.shapes import Float, Float32
from tlvit.training.mesh import gather, mesh_context, replicated
from tlvit.training.task import EvalStep, Objective, Task, Teacher
from tlvit.types import IGNORE, Array, Batch, PyTree

if TYPE_CHECKING:  # the module imports TensorFlow
    from tlvit.data.sources.source import Source

HALF = 2**16  # counts are summed in two parts, because one of int32 counts to 2 billion pixels only


def open_source(config: Config, split: str) -> "Source":
    """The images of a split with the classes of their pixels.

    Raises:
      ValueError: there are several processes, which would have to evaluate images of the same size at the
        same time; or the images cannot be opened.
    """
    from tlvit.data.sources import open as sources

    if jax.process_count() > 1:
        raise ValueError(
            f'config.task="segmentation" runs in one process on all of its devices, not in '
            f"{jax.process_count()} processes: leave out --multihost."
        )

    data, num_classes = config.data, config.segmentation.num_classes
    where = {"data_dir": data.dir or None, "exif": data.exif}
    return sources.open_annotated_source(data.name, split, num_classes=num_classes, **where)


def eval_batches(source: "Source", config: Config, info: ModelInfo, mesh: Mesh) -> Iterator[Batch]:
    """The images of a split at their own sizes, in groups of one size."""
    del info, mesh
    from tlvit.data import annotated_images, pipeline

    threads = pipeline.thread_count(config.data.threads)
    return annotated_images.annotated_eval_batches(
        source, config, batch_size=config.eval_batch_size, threads=threads
    )


def objective(
    net: Net, mesh: Mesh, config: Config, info: ModelInfo, teacher: Teacher | None, shards: int
) -> Objective:
    """The loss of the decode head and the auxiliary head."""
    del net, mesh, info, teacher, shards
    settings = config.segmentation

    def loss(
        forward: Callable[..., Any], images: Array, batch: Batch, key: jax.Array, arrays: tuple[PyTree, ...]
    ) -> tuple[Array, PyTree]:
        del key, arrays
        output, stats = forward(zero_padding(images, batch.geometry))
        weights = {"aux_weight": settings.aux_weight, "normalize": settings.normalize}
        return segmentation_loss(output, _classes(batch), **weights), stats

    return loss


def zero_padding(
    images: Float[Array, "B H W 3"], geometry: Float32[Array, "B 2 3"]
) -> Float[Array, "B H W 3"]:
    """Sets the normalized pixels to 0 whose points are outside of the annotated image, as published."""
    height, width = images.shape[1:3]
    x, y = (jnp.arange(width) + 0.5) / width, (jnp.arange(height) + 0.5) / height
    x = geometry[:, 0, 0, None] * x[None] + geometry[:, 0, 2, None]  # views are not rotated
    y = geometry[:, 1, 1, None] * y[None] + geometry[:, 1, 2, None]
    inside = ((y >= 0) & (y <= 1))[:, :, None] & ((x >= 0) & (x <= 1))[:, None, :]
    return jnp.where(inside[..., None], images, 0)


def eval_step(net: Net, mesh: Mesh, preprocessing: Preprocessing, settings: Segmentation) -> EvalStep:
    """(params, stats, batch) -> sums over images of one size: the confusion matrix, `loss` and `images`.

    The model is compiled once for each size of the window; the rest, which is small, for each size of images.
    """

    @jax.jit
    def logits_of(params: PyTree, stats: PyTree, images: Array) -> Array:
        with mesh_context(mesh):
            return net.apply(gather(params, mesh), stats, images)[0].logits

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sums(probs: Array, classes: Array, mask: Array) -> dict[str, Array]:
        classes = jnp.where(mask[:, None, None], classes, IGNORE)
        counts = confusion_matrix(probs.argmax(-1), classes, probs.shape[-1])
        own = jnp.take_along_axis(probs, jnp.minimum(classes, probs.shape[-1] - 1)[..., None], axis=-1)
        loss = -jnp.log(jnp.maximum(own[..., 0], jnp.finfo(jnp.float32).tiny))
        return {
            "low": counts % HALF,
            "high": counts // HALF,
            "loss": jnp.sum(jnp.where(classes != IGNORE, loss, 0.0)),
            "images": jnp.sum(mask),
        }

    to_input = jax.jit(lambda images: normalize(images, preprocessing.mean, preprocessing.std))

    def step(params: PyTree, stats: PyTree, batch: Batch) -> dict[str, Array]:
        predict = window_predictor(functools.partial(logits_of, params, stats), preprocessing)
        probs = multi_scale_probs(
            predict,
            to_input(batch.image),
            ratios=settings.ratios,
            scale=image_scale(batch.image.shape[1:3], preprocessing),
            flip=settings.flip,
        )
        return sums(probs, _classes(batch), batch.mask)

    return step


def window_predictor(
    apply: Callable[[Array], Array], preprocessing: Preprocessing
) -> Callable[[Array], Array]:
    """The function images -> logits of a model: of the whole images, or in windows."""
    if not preprocessing.window:
        return apply
    return functools.partial(slide_logits, apply, crop=preprocessing.window, stride=preprocessing.stride)


def image_scale(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Limits of the longer and the shorter side that images are resized within, pixels."""
    longer, shorter = preprocessing.scale or size
    return longer, shorter


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """mIoU, mAcc and aAcc in percent, the mean loss of the labeled pixels, and the number of images."""
    counts = np.asarray(sums["high"], np.int64) * HALF + np.asarray(sums["low"], np.int64)
    summary = iou_summary(counts)
    values = {name: 100 * float(summary[name]) for name in ("miou", "macc", "aacc")}
    pixels = max(int(counts.sum()), 1)
    return {**values, "loss": float(sums["loss"]) / pixels, "count": int(sums["images"])}


def describe(values: Mapping[str, float]) -> str:
    """The metrics as text."""
    return f"mIoU {values['miou']:.2f}%, mAcc {values['macc']:.2f}%, aAcc {values['aacc']:.2f}%"


def _classes(batch: Batch) -> Array:
    """The class of every pixel, int32 [B, H, W]."""
    if batch.segmentation is None:
        raise ValueError("Segmentation needs the class of every pixel, but batch.segmentation is None.")
    return jnp.asarray(batch.segmentation, jnp.int32)


SEGMENTATION = Task(
    open_source=open_source,
    eval_batches=eval_batches,
    objective=objective,
    eval_step=eval_step,
    means=means,
    score="miou",
    describe=describe,
)
