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
from tlvit.config import Config, Segmentation
from tlvit.models.functional import Net
from tlvit.ops.normalize import normalize
from tlvit.ops.randaugment import randaugment
from tlvit.ops.randaugment_policy import parse_policy
from tlvit.ops.random_erasing import random_erasing
from tlvit.training.mesh import (
    batch_sharding,
    batch_shards,
    constrain_state,
    gather,
    mesh_context,
    replicated,
    shares_state,
)
from tlvit.training.optimizer import stop_frozen, update_ema
from tlvit.training.state import TrainState
from tlvit.training.task import EvalStep, Teacher
from tlvit.training.tasks import TASKS
from tlvit.types import Array, Batch, PyTree

Metrics = dict[str, Array]


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

    In classification with `config.token_labels` every token learns its target from `batch.maps`, or from the
    annotator's logits of the augmented images, and MixToken mixes the tokens. Otherwise the class token
    learns the (mixup or cutmix) labels, and with a teacher the distillation token learns the teacher's logits
    on the same augmented images. In segmentation every pixel learns its class in `batch.segmentation`.

    Args:
      net: the model's computation, from `functionalize`.
      tx: the optimizer.
      mesh: the devices; the batch and the state are split over them as `tlvit.training.mesh` says.
      config: settings; task, the sections augment, loss, distill, segmentation and ema, optim.accumulate and
        optim.lr_scale count.
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
    net: Net, mesh: Mesh, preprocessing: Preprocessing, settings: Segmentation | None = None
) -> EvalStep:
    """Builds the function (params, stats, batch) -> sums over the images of a batch.

    Args:
      net: the model's computation, from `functionalize`. Its task decides what is summed: in classification
        the `classification_sums` of the inference logits, in segmentation the counts of a confusion matrix.
      mesh: the devices.
      preprocessing: normalization and, in segmentation, size of the images and of the sliding window.
      settings: in segmentation, the image sizes and the flip whose predictions are averaged. None: defaults.
    """
    return TASKS[net.task].eval_step(net, mesh, preprocessing, settings or Segmentation())


def _make_loss(
    net: Net, mesh: Mesh, config: Config, info: ModelInfo, teacher: Teacher | None, shards: int
) -> Callable[..., tuple[Array, PyTree]]:
    """(params, stats, batch, key, teacher_arrays) -> (loss, new stats): augmentation, then the objective."""
    on_device = config.augment.randaugment_on == "device"
    policy = parse_policy(config.augment.randaugment) if on_device else None
    objective = TASKS[config.task].objective(net, mesh, config, info, teacher, shards)

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


def first_part(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """The first of the `count` parts in which a step runs a batch. No image changes its device."""
    return batch if count == 1 else _first_part(batch, count, mesh)


@functools.partial(jax.jit, static_argnames=("count", "mesh"))
def _first_part(batch: Batch, count: int, mesh: Mesh) -> Batch:
    part = jax.tree.map(lambda x: _split_batch(x, count)[0], batch)
    return jax.lax.with_sharding_constraint(part, batch_sharding(mesh))


def _split_batch(x: Array, count: int) -> Array:
    """[B, ...] -> [count, B / count, ...]. Part p holds images p, p + count, …, so that the images of a
    device stay on it."""
    if x.shape[0] % count:
        raise ValueError(f"A batch of {x.shape[0]} images cannot be accumulated in {count} equal parts.")
    return rearrange(x, "(b p) ... -> p b ...", p=count)
