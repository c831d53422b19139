"""The training step and the evaluation step, each one jitted, sharded program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh

from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.config import Config
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
from tlvit.ops.randaugment import randaugment
from tlvit.ops.randaugment_policy import parse_policy
from tlvit.ops.random_erasing import random_erasing
from tlvit.ops.targets import make_online_targets, make_targets, smooth_one_hot
from tlvit.training.mesh import (
    batch_shards,
    constrain_state,
    gather,
    mesh_context,
    replicated,
    shares_state,
)
from tlvit.training.online_annotator import online_logits
from tlvit.training.optimizer import stop_frozen, update_ema
from tlvit.training.state import TrainState
from tlvit.types import Array, Batch, PyTree, TokenTargets

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model that runs inside the step. It is not trained.

    Without token labels the distillation token learns its logits of the mixed images. With token labels it is
    the annotator: its dense logits take the place of score maps.

    Attributes:
      net: its computation, from `functionalize`.
      params: its parameters, placed as those of a state.
      stats: its BatchNorm statistics and buffers, replicated over the mesh.
      info: the annotator's image size and preprocessing. A distillation teacher gets the model's input.
    """

    net: Net
    params: PyTree
    stats: PyTree
    info: ModelInfo | None = None


def make_train_step(
    net: Net,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    config: Config,
    info: ModelInfo,
    *,
    teacher: Teacher | None = None,
    mix_shards: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the jitted step (state, batch) -> (state, metrics). It donates the state that it is given.

    With `config.token_labels` every token learns its target from `batch.maps`, or from the annotator's logits
    of the augmented images, and MixToken mixes the tokens. Otherwise the class token learns the (mixup or
    cutmix) labels, and with a teacher the distillation token learns the teacher's logits on the same
    augmented images.

    Args:
      net: the model's computation, from `functionalize`.
      tx: the optimizer.
      mesh: the devices; the batch and the state are split over them as `tlvit.training.mesh` says.
      config: settings; the sections augment, loss, distill, ema, optim.accumulate and optim.lr_scale count.
      info: number of classes and normalization of the model.
      teacher: for a model with a distillation token, or the annotator if batches have no score maps.
      mix_shards: number of parts of a batch that are mixed independently; None: one for each device that
        shares the batch.

    Returns:
      The step. Its metrics are float32 scalars: `loss` (mean over accumulated parts) and `grad_norm` (before
      clipping).
    """
    loss_fn = _make_loss(net, mesh, config, info, teacher, mix_shards or batch_shards(mesh))
    gradients = _accumulate(_gradient(loss_fn, mesh), config.optim.accumulate)

    def step(
        state: TrainState, batch: Batch, teacher_arrays: tuple[PyTree, ...] = ()
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, stats), grads = gradients(state.params, state.stats, batch, key, teacher_arrays)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            new = {"params": params, "stats": stats}
            ema = update_ema(ema, new, state.step, decay=config.ema.decay, warmup=config.ema.warmup)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        new_state = TrainState(state.step + 1, params, stats, opt_state, ema, state.key)
        return constrain_state(new_state, mesh), metrics

    # A state that is split is placed inside of the step: None leaves it there.
    state_out = None if shares_state(mesh) else replicated(mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_out, replicated(mesh)))
    if teacher is None:
        return jitted
    # The teacher's arrays are arguments of the program; as constants they would be compiled into it.
    return functools.partial(jitted, teacher_arrays=(teacher.params, teacher.stats))


def make_eval_step(
    net: Net, mesh: Mesh, preprocessing: Preprocessing
) -> Callable[[PyTree, PyTree, Batch], Metrics]:
    """Builds the jitted (params, stats, batch) -> `classification_sums` of the model's inference logits."""

    def step(params: PyTree, stats: PyTree, batch: Batch) -> Metrics:
        images = normalize(batch.image, preprocessing.mean, preprocessing.std)
        with mesh_context(mesh):
            output, _ = net.apply(gather(params, mesh), stats, images)
        return classification_sums(output.logits, batch.label, batch.mask, batch.real_labels)

    return jax.jit(step, out_shardings=replicated(mesh))


def _make_loss(
    net: Net, mesh: Mesh, config: Config, info: ModelInfo, teacher: Teacher | None, shards: int
) -> Callable[..., tuple[Array, PyTree]]:
    """(params, stats, batch, key, teacher_arrays) -> (loss, new stats): augmentation, then the objective."""
    on_device = config.augment.randaugment_on == "device"
    policy = parse_policy(config.augment.randaugment) if on_device else None
    if config.learns_patches:
        objective = _token_label_objective(net, mesh, config, info, teacher, shards)
    else:
        objective = _class_token_objective(net, mesh, config, info, teacher, shards)

    def loss_fn(
        params: PyTree, stats: PyTree, batch: Batch, key: jax.Array, teacher_arrays: tuple[PyTree, ...]
    ) -> tuple[Array, PyTree]:
        params = stop_frozen(params, config.optim.lr_scale)
        key_mix, key_erase, key_net, key_augment = jax.random.split(key, 4)
        images, geometry = batch.image, batch.geometry
        if policy is not None:
            images, geometry = randaugment(key_augment, images, geometry, policy)
        batch = dataclasses.replace(batch, image=images, geometry=geometry)  # what an annotator sees
        images = normalize(images, info.preprocessing.mean, info.preprocessing.std)
        if config.augment.random_erasing and not config.augment.erase_mixed:
            images = random_erasing(key_erase, images, probability=config.augment.random_erasing)
        forward = functools.partial(net.apply, gather(params, mesh), stats, train=True, key=key_net)
        with mesh_context(mesh):
            return objective(forward, images, batch, key_mix, teacher_arrays)

    return loss_fn


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


def _gradient(loss_fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """(params, …) -> ((loss, stats), gradients), the gradients placed as the parameters."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def gradient(params: PyTree, *inputs: Any) -> tuple[tuple[Array, PyTree], PyTree]:
        result, grads = value_and_grad(params, *inputs)
        return result, constrain_state(grads, mesh)

    return gradient


def _accumulate(grad_fn: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Runs `grad_fn` on `count` parts of the batch in turn and averages losses and gradients."""
    if count == 1:
        return grad_fn

    def gradients(
        params: PyTree, stats: PyTree, batch: Batch, key: jax.Array, teacher_arrays: tuple[PyTree, ...]
    ) -> tuple[tuple[Array, PyTree], PyTree]:
        def part(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            total, grads, stats = carry
            (loss, stats), new = grad_fn(params, stats, *inputs, teacher_arrays)
            return (total + loss, jax.tree.map(jnp.add, grads, new), stats), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        parts = jax.tree.map(functools.partial(_split_batch, count=count), batch)
        keys = jax.random.split(key, count)
        (loss, grads, stats), _ = jax.lax.scan(part, (jnp.zeros(()), zeros, stats), (parts, keys))
        return (loss / count, stats), jax.tree.map(lambda g: g / count, grads)

    return gradients


def _split_batch(x: Array, count: int) -> Array:
    """[B, ...] -> [count, B / count, ...]. Part p holds images p, p + count, …, so that the images of a
    device stay on it."""
    if x.shape[0] % count:
        raise ValueError(f"A batch of {x.shape[0]} images cannot be accumulated in {count} equal parts.")
    return rearrange(x, "(b p) ... -> p b ...", p=count)
