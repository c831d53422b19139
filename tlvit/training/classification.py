"""Classification: the loss of token labels or image labels, and accuracy on the images of a split."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.config import Config, Segmentation
from tlvit.models.functional import Net
from tlvit.ops.losses import (
    binary_cross_entropy,
    class_target,
    distillation_loss,
    soft_cross_entropy,
    token_label_loss,
)
from tlvit.ops.metrics import classification_sums
from tlvit.ops.mixing import draw_image_mix, draw_mixtoken_mask, mix_by_area, mix_images
from tlvit.ops.normalize import normalize
from tlvit.ops.random_erasing import random_erasing
from tlvit.ops.targets import make_online_targets, make_targets, smooth_one_hot
from tlvit.training.mesh import batch_part, gather, mesh_context, replicated
from tlvit.training.online_annotator import online_logits
from tlvit.training.task import EvalStep, Objective, Task, Teacher
from tlvit.types import Array, Batch, PyTree, TokenTargets

if TYPE_CHECKING:  # the module imports TensorFlow
    from tlvit.data.sources.source import Source


def open_source(config: Config, split: str) -> "Source":
    """The labeled images of a split."""
    from tlvit.data.sources import open as sources

    data = config.data
    return sources.open_source(data.name, split, data_dir=data.dir or None, exif=data.exif)


def eval_batches(source: "Source", config: Config, info: ModelInfo, mesh: Mesh) -> Iterator[Batch]:
    """The images of a split, resized and center-cropped."""
    from tlvit.data import pipeline

    part, parts = batch_part(mesh)
    return pipeline.eval_batches(
        source,
        info,
        batch_size=config.eval_batch_size,
        max_corrupt=config.eval.max_corrupt,
        threads=config.data.threads,
        process_index=part,
        process_count=parts,
    )


def objective(
    net: Net, mesh: Mesh, config: Config, info: ModelInfo, teacher: Teacher | None, shards: int
) -> Objective:
    """The loss of token labels, or of the class token alone and distillation."""
    if config.learns_patches:
        return _token_label_objective(net, mesh, config, info, teacher, shards)
    return _class_token_objective(net, mesh, config, info, teacher, shards)


def eval_step(net: Net, mesh: Mesh, preprocessing: Preprocessing, settings: Segmentation) -> EvalStep:
    """The jitted (params, stats, batch) -> `classification_sums` of the model's inference logits."""
    del settings

    def step(params: PyTree, stats: PyTree, batch: Batch) -> dict[str, Array]:
        images = normalize(batch.image, preprocessing.mean, preprocessing.std)
        with mesh_context(mesh):
            output, _ = net.apply(gather(params, mesh), stats, images)
        return classification_sums(output.logits, batch.label, batch.mask, batch.real_labels)

    return jax.jit(step, out_shardings=replicated(mesh))


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy in percent and the mean loss."""
    count = float(sums["count"])
    means = {k: 100 * float(sums[k]) / count for k in ("top1", "top5")}
    if "real" in sums:  # ReaL leaves out images without a correct label
        means["real"] = 100 * float(sums["real"]) / max(float(sums["real_count"]), 1.0)
    return {**means, "loss": float(sums["loss"]) / count, "count": int(count)}


def describe(values: Mapping[str, float]) -> str:
    """The accuracy as text."""
    real = f", ReaL {values['real']:.2f}%" if "real" in values else ""
    return f"top-1 {values['top1']:.2f}%, top-5 {values['top5']:.2f}%{real}"


def _token_targets(
    grid: tuple[int, int], mesh: Mesh, config: Config, info: ModelInfo, annotator: Teacher | None
) -> Callable[[Batch, tuple[PyTree, ...]], TokenTargets]:
    """(batch, the annotator's arrays) -> targets from the batch's score maps or the annotator's logits."""
    smoothing = config.loss.label_smoothing

    def from_maps(batch: Batch, annotator_arrays: tuple[PyTree, ...]) -> TokenTargets:
        del annotator_arrays
        if batch.maps is None:
            raise ValueError("Training with token labels needs score maps, but batch.maps is None.")
        sizes = {"grid": grid, "num_classes": info.num_classes}
        return make_targets(batch.maps, batch.label, batch.geometry, smoothing=smoothing, **sizes)

    if annotator is None:
        return from_maps
    if annotator.info is None:
        raise ValueError("An annotator inside the step needs the ModelInfo of its checkpoint.")
    logits_of = functools.partial(online_logits, annotator.net, annotator.info, mesh=mesh)

    def from_annotator(batch: Batch, annotator_arrays: tuple[PyTree, ...]) -> TokenTargets:
        logits = logits_of(annotator_arrays, batch.image)
        return make_online_targets(logits, batch.label, batch.geometry, grid=grid, smoothing=smoothing)

    return from_annotator


def _token_label_objective(
    net: Net, mesh: Mesh, config: Config, info: ModelInfo, annotator: Teacher | None, shards: int
) -> Callable[..., tuple[Array, PyTree]]:
    """Every token learns its target; MixToken mixes the tokens of a shard."""
    loss, grid = config.loss, net.grid
    if grid is None:
        raise ValueError("Token labels need a model with a token grid.")
    targets_of = _token_targets(grid, mesh, config, info, annotator)

    def objective(
        forward: Callable[..., Any], images: Array, batch: Batch, key: jax.Array, arrays: tuple[PyTree, ...]
    ) -> tuple[Array, PyTree]:
        targets = targets_of(batch, arrays)
        mix = None
        if loss.mixtoken:
            mix = _on_every_device(draw_mixtoken_mask(key, grid, shards), mesh)
        output, stats = forward(images, mix=mix)
        weights = {"dense_weight": loss.dense_weight, "cls_weight": loss.cls_weight}
        return token_label_loss(output, targets, mix, cls_target=loss.cls_target, **weights), stats

    return objective


def _class_targets(
    mesh: Mesh, config: Config, info: ModelInfo, annotator: Teacher | None
) -> Callable[[Batch, tuple[PyTree, ...]], Array]:
    """(batch, the annotator's arrays) -> targets [B, L] of the images: labels, or pooled score maps."""
    if not config.needs_maps:
        smoothing = config.loss.label_smoothing
        return lambda batch, arrays: smooth_one_hot(batch.label, info.num_classes, smoothing)
    targets_of = _token_targets((1, 1), mesh, config, info, annotator)
    return lambda batch, arrays: class_target(targets_of(batch, arrays), config.loss.cls_target)


def _class_token_objective(
    net: Net, mesh: Mesh, config: Config, info: ModelInfo, teacher: Teacher | None, shards: int
) -> Callable[..., tuple[Array, PyTree]]:
    """The class token learns the (mixed) targets of the images, and a distillation token the teacher's
    logits."""
    mixup, cutmix = config.augment.mixup, config.augment.cutmix
    grid = net.grid if config.token_labels and config.loss.mixtoken else None  # of MixToken
    erasing = config.augment.random_erasing if config.augment.erase_mixed else 0.0
    distilling = teacher is not None and not config.token_labels  # else it is an annotator, or there is none
    targets_of = _class_targets(mesh, config, info, teacher)
    distill = {"kind": config.distill.kind, "alpha": config.distill.alpha, "tau": config.distill.tau}
    entropy = soft_cross_entropy
    if config.loss.kind == "bce":
        entropy = functools.partial(binary_cross_entropy, threshold=config.loss.bce_threshold)

    def objective(
        forward: Callable[..., Any], images: Array, batch: Batch, key: jax.Array, arrays: tuple[PyTree, ...]
    ) -> tuple[Array, PyTree]:
        labels, options = targets_of(batch, arrays), {}
        if mixup or cutmix:
            mix = draw_image_mix(key, (images.shape[1], images.shape[2]), shards, mixup=mixup, cutmix=cutmix)
            mix = _on_every_device(mix, mesh)
            images, labels = mix_images(images, mix), mix_by_area(labels, mix)
        elif grid is not None:
            mix = _on_every_device(draw_mixtoken_mask(key, grid, shards), mesh)
            labels, options = mix_by_area(labels, mix), {"mix": mix}
        if erasing:
            images = random_erasing(jax.random.fold_in(key, 1), images, probability=erasing)
        output, stats = forward(images, **options)
        if not distilling:
            return config.loss.cls_weight * jnp.mean(entropy(output.cls, labels)), stats
        teacher_params, teacher_stats = arrays
        logits = teacher.net.apply(gather(teacher_params, mesh), teacher_stats, images)[0].logits
        return distillation_loss(output, labels, logits, **distill), stats

    return objective


def _on_every_device(mask: PyTree, mesh: Mesh) -> PyTree:
    """Makes every device draw all masks; otherwise XLA splits the drawing and the devices synchronize."""
    return jax.lax.with_sharding_constraint(mask, replicated(mesh))


CLASSIFICATION = Task(
    open_source=open_source,
    eval_batches=eval_batches,
    objective=objective,
    eval_step=eval_step,
    means=means,
    score="top1",
    describe=describe,
)
