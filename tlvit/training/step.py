"""The training step and the evaluation step: pure, jitted, one compiled program each."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tlvit.models.functional import Net
from tlvit.ops.losses import distillation_loss, soft_cross_entropy, token_label_loss
from tlvit.ops.metrics import classification_sums
from tlvit.ops.mixing import draw_image_mix, draw_mixtoken_mask, mix_by_area, mix_images
from tlvit.ops.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from tlvit.ops.randaugment import randaugment
from tlvit.ops.randaugment_policy import AugmentPolicy
from tlvit.ops.random_erasing import random_erasing
from tlvit.ops.targets import make_targets, smooth_one_hot
from tlvit.training.mesh import replicated
from tlvit.training.optimizer import update_ema
from tlvit.training.state import TrainState
from tlvit.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model that a distillation token learns from.

    Attributes:
      net, params, stats: as from `functionalize`, its arrays on every device of the mesh.
      kind, alpha, tau: see `distillation_loss`.
    """

    net: Net
    params: PyTree
    stats: PyTree
    kind: str = "hard"
    alpha: float = 0.5
    tau: float = 1.0


def make_train_step(
    net: Net, tx: optax.GradientTransformation, *, mesh: Mesh, num_classes: int,
    token_grid: tuple[int, int] | None = None, smoothing: float = 0.1, dense_weight: float = 1.0,
    cls_weight: float = 1.0, cls_target: str = "annotator", mixtoken: bool = True, mixup: float = 0.0,
    cutmix: float = 0.0, policy: AugmentPolicy | None = None, erasing: float = 0.0,
    teacher: Teacher | None = None, ema_decay: float = 0.99992, ema_warmup: bool = False, accumulate: int = 1,
    mix_shards: int | None = None, mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:  # fmt: skip
    """Builds the jitted step (state, batch) -> (state, metrics); it takes over (donates) the state it is
    given.

    Args:
      net: from `functionalize` or `init_state`.
      tx: the optimizer.
      mesh: where the batch is split and the state lies.
      num_classes: L.
      token_grid: (h, w) of the model's tokens to train with token labels from `batch.maps`; None trains the
        class token on the labels alone.
      smoothing: of labels and token labels.
      dense_weight, cls_weight, cls_target: see `token_label_loss`.
      mixtoken: mix tokens within each shard of the batch (with token labels only).
      mixup, cutmix: alphas for runs without token labels, 0 is off.
      policy: of RandAugment on the device, or None (then the host augments, or nobody).
      erasing: probability of random erasing, with pixel noise.
      teacher: of a model with a distillation token (without token labels); it sees the images that the model
        sees, mixed and augmented.
      ema_decay, ema_warmup: see `update_ema`; unused if the state holds no average.
      accumulate: number of parts that a batch is run in, their gradients averaged.
      mix_shards: independently mixed parts of a batch; the number of devices by default.
      mean, std: of the image normalization.

    Returns:
      The step. Its metrics are float32 scalars: `loss` (mean over the parts) and `grad_norm` (before
      clipping).

    Raises:
      ValueError: token labels together with mixup or cutmix, whose mixed images have no score maps, or with a
        teacher.
    """
    if token_grid is not None and (mixup or cutmix):
        raise ValueError(
            f"Token labels cannot be combined with mixup ({mixup}) or cutmix ({cutmix}): the mixed image's "
            "tokens would be judged by one image's score map. MixToken takes their place; set both to 0."
        )
    if token_grid is not None and teacher is not None:
        raise ValueError("A teacher's distillation and token labels are two recipes: choose one of them.")
    shards = mix_shards or mesh.devices.size
    # Every device draws all masks; left to itself, XLA splits the drawing and lets devices wait for each
    # other.
    here = lambda mask: jax.lax.with_sharding_constraint(mask, replicated(mesh))

    def loss_fn(params, stats, batch: Batch, key: Array, teacher_arrays):
        key_mix, key_erase, key_net, key_augment = jax.random.split(key, 4)
        images, geometry = batch.image, batch.geometry
        if policy is not None:
            images, geometry = randaugment(key_augment, images, geometry, policy)
        images = normalize(images, mean, std)
        if erasing:
            images = random_erasing(key_erase, images, probability=erasing)
        run = functools.partial(net.apply, params, stats, train=True, key=key_net)
        if token_grid is None:
            truth = smooth_one_hot(batch.label, num_classes, smoothing)
            if mixup or cutmix:
                mix = here(draw_image_mix(key_mix, images.shape[1:3], shards, mixup=mixup, cutmix=cutmix))
                images, truth = mix_images(images, mix), mix_by_area(truth, mix)
            output, stats = run(images)
            if teacher is None:
                return cls_weight * jnp.mean(soft_cross_entropy(output.cls, truth)), stats
            taught = teacher.net.apply(*teacher_arrays, images)[0].logits
            how = {"kind": teacher.kind, "alpha": teacher.alpha, "tau": teacher.tau}
            return distillation_loss(output, truth, taught, **how), stats
        if batch.maps is None:
            raise ValueError(
                "Training with token labels, but the batch carries no score maps (maps is None)."
            )
        targets = make_targets(
            batch.maps,
            batch.label,
            geometry,
            grid=token_grid,
            num_classes=num_classes,
            smoothing=smoothing,
        )
        mix = here(draw_mixtoken_mask(key_mix, token_grid, shards)) if mixtoken else None
        output, stats = run(images, mix=mix)
        loss = token_label_loss(
            output, targets, mix, dense_weight=dense_weight, cls_weight=cls_weight, cls_target=cls_target
        )
        return loss, stats

    def gradients(state: TrainState, batch: Batch, key: Array, teacher_arrays):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return grad_fn(state.params, state.stats, batch, key, teacher_arrays)

        def part(carry, inputs):
            total, grads, stats = carry
            (loss, stats), new = grad_fn(state.params, stats, *inputs, teacher_arrays)
            return (total + loss, jax.tree.map(jnp.add, grads, new), stats), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        parts = jax.tree.map(functools.partial(_parts, count=accumulate), batch)
        keys = jax.random.split(key, accumulate)
        (loss, grads, stats), _ = jax.lax.scan(part, (jnp.zeros(()), zeros, state.stats), (parts, keys))
        return (loss / accumulate, stats), jax.tree.map(lambda g: g / accumulate, grads)

    def step(state: TrainState, batch: Batch, teacher_arrays=()) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, stats), grads = gradients(state, batch, key, teacher_arrays)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            new = {"params": params, "stats": stats}
            ema = update_ema(ema, new, state.step, decay=ema_decay, warmup=ema_warmup)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, stats, opt_state, ema, state.key), metrics

    jitted = jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))
    if teacher is None:
        return jitted
    # The teacher's arrays are an argument of the program: as constants they would be compiled into it.
    return lambda state, batch: jitted(state, batch, (teacher.params, teacher.stats))


def make_eval_step(
    net: Net, *, mesh: Mesh, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Callable[[PyTree, PyTree, Batch], dict[str, Array]]:
    """Builds the jitted (params, stats, batch) -> `classification_sums` by the model's rule of inference."""

    def step(params: PyTree, stats: PyTree, batch: Batch) -> dict[str, Array]:
        output, _ = net.apply(params, stats, normalize(batch.image, mean, std))
        return classification_sums(output.logits, batch.label, batch.mask, batch.real_labels)

    return jax.jit(step, out_shardings=replicated(mesh))


def _parts(x: Array, count: int) -> Array:
    """[B, ...] -> [count, B / count, ...] such that every device's images stay on it: part p holds images p,
    p + count, …"""
    if x.shape[0] % count:
        raise ValueError(f"A batch of {x.shape[0]} images cannot be accumulated in {count} equal parts.")
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
