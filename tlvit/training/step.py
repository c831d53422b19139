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
from tlvit.ops.losses import distillation_loss, soft_cross_entropy, token_label_loss
from tlvit.ops.metrics import classification_sums
from tlvit.ops.mixing import draw_image_mix, draw_mixtoken_mask, mix_by_area, mix_images
from tlvit.ops.normalize import normalize
from tlvit.ops.randaugment import randaugment
from tlvit.ops.randaugment_policy import parse_policy
from tlvit.ops.random_erasing import random_erasing
from tlvit.ops.targets import make_targets, smooth_one_hot
from tlvit.training.mesh import replicated
from tlvit.training.optimizer import update_ema
from tlvit.training.state import TrainState
from tlvit.types import Array, Batch, PyTree

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model whose logits the distillation token learns.

    Attributes:
      net: its computation, from `functionalize`.
      params: its parameters, replicated over the mesh.
      stats: its BatchNorm statistics and buffers, replicated over the mesh.
    """

    net: Net
    params: PyTree
    stats: PyTree


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

    With `config.token_labels` every token learns its target from `batch.maps` and MixToken mixes the tokens.
    Otherwise the class token learns the (mixup or cutmix) labels, and with a teacher the distillation token
    learns the teacher's logits on the same augmented images.

    Args:
      net: the model's computation, from `functionalize`.
      tx: the optimizer.
      mesh: the devices; the batch is split over them and the state is replicated.
      config: settings; the sections augment, loss, distill, ema and optim.accumulate count.
      info: number of classes and normalization of the model.
      teacher: for a model with a distillation token.
      mix_shards: number of parts of a batch that are mixed independently; None: one for each device.

    Returns:
      The step. Its metrics are float32 scalars: `loss` (mean over accumulated parts) and `grad_norm` (before
      clipping).
    """
    loss_fn = _make_loss(net, mesh, config, info, teacher, mix_shards or mesh.devices.size)
    gradients = _accumulate(jax.value_and_grad(loss_fn, has_aux=True), config.optim.accumulate)

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
        return TrainState(state.step + 1, params, stats, opt_state, ema, state.key), metrics

    jitted = jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
    if teacher is None:
        return jitted
    # The teacher's arrays are arguments of the program; as constants they would be compiled into it.
    return lambda state, batch: jitted(state, batch, (teacher.params, teacher.stats))


def make_eval_step(
    net: Net, mesh: Mesh, preprocessing: Preprocessing
) -> Callable[[PyTree, PyTree, Batch], Metrics]:
    """Builds the jitted (params, stats, batch) -> `classification_sums` of the model's inference logits."""

    def step(params: PyTree, stats: PyTree, batch: Batch) -> Metrics:
        images = normalize(batch.image, preprocessing.mean, preprocessing.std)
        output, _ = net.apply(params, stats, images)
        return classification_sums(output.logits, batch.label, batch.mask, batch.real_labels)

    return jax.jit(step, out_shardings=replicated(mesh))


def _make_loss(
    net: Net, mesh: Mesh, config: Config, info: ModelInfo, teacher: Teacher | None, shards: int
) -> Callable[..., tuple[Array, PyTree]]:
    """(params, stats, batch, key, teacher_arrays) -> (loss, new stats)."""
    on_device = config.augment.randaugment_on == "device"
    policy = parse_policy(config.augment.randaugment) if on_device else None
    # Every device draws all masks. Otherwise XLA splits the drawing, and the devices wait for each other.
    on_every_device = lambda mask: jax.lax.with_sharding_constraint(mask, replicated(mesh))

    def loss_fn(
        params: PyTree, stats: PyTree, batch: Batch, key: Array, teacher_arrays: tuple[PyTree, ...]
    ) -> tuple[Array, PyTree]:
        key_mix, key_erase, key_net, key_augment = jax.random.split(key, 4)
        images, geometry = batch.image, batch.geometry
        if policy is not None:
            images, geometry = randaugment(key_augment, images, geometry, policy)
        images = normalize(images, info.preprocessing.mean, info.preprocessing.std)
        if config.augment.random_erasing:
            images = random_erasing(key_erase, images, probability=config.augment.random_erasing)
        forward = functools.partial(net.apply, params, stats, train=True, key=key_net)
        if config.token_labels:
            return token_labels(forward, images, geometry, batch, key_mix)
        return image_labels(forward, images, batch, key_mix, teacher_arrays)

    def token_labels(
        forward: Callable[..., Any], images: Array, geometry: Array, batch: Batch, key_mix: Array
    ) -> tuple[Array, PyTree]:
        if batch.maps is None:
            raise ValueError("Training with token labels needs score maps, but batch.maps is None.")
        targets = make_targets(
            batch.maps,
            batch.label,
            geometry,
            grid=net.grid,
            num_classes=info.num_classes,
            smoothing=config.loss.label_smoothing,
        )
        mix = None
        if config.loss.mixtoken:
            mix = on_every_device(draw_mixtoken_mask(key_mix, net.grid, shards))
        output, stats = forward(images, mix=mix)
        loss = token_label_loss(
            output,
            targets,
            mix,
            dense_weight=config.loss.dense_weight,
            cls_weight=config.loss.cls_weight,
            cls_target=config.loss.cls_target,
        )
        return loss, stats

    def image_labels(
        forward: Callable[..., Any], images: Array, batch: Batch, key_mix: Array,
        teacher_arrays: tuple[PyTree, ...],
    ) -> tuple[Array, PyTree]:  # fmt: skip
        mixup, cutmix = config.augment.mixup, config.augment.cutmix
        labels = smooth_one_hot(batch.label, info.num_classes, config.loss.label_smoothing)
        if mixup or cutmix:
            mix = draw_image_mix(key_mix, images.shape[1:3], shards, mixup=mixup, cutmix=cutmix)
            mix = on_every_device(mix)
            images, labels = mix_images(images, mix), mix_by_area(labels, mix)
        output, stats = forward(images)
        if teacher is None:
            return config.loss.cls_weight * jnp.mean(soft_cross_entropy(output.cls, labels)), stats
        logits = teacher.net.apply(*teacher_arrays, images)[0].logits
        distill = {"kind": config.distill.kind, "alpha": config.distill.alpha, "tau": config.distill.tau}
        return distillation_loss(output, labels, logits, **distill), stats

    return loss_fn


def _accumulate(grad_fn: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Runs `grad_fn` on `count` parts of the batch in turn and averages losses and gradients."""
    if count == 1:
        return grad_fn

    def gradients(
        params: PyTree, stats: PyTree, batch: Batch, key: Array, teacher_arrays: tuple[PyTree, ...]
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
