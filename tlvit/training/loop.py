"""The training loop of every recipe: straight down, what differs between recipes is passed in by the
config."""

import dataclasses
import json
import logging
import math
import pathlib
import signal
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tlvit.checkpoints.load import HEADS, load
from tlvit.checkpoints.model_info import ModelInfo, Preprocessing, image_size_pair
from tlvit.checkpoints.native import Checkpoints
from tlvit.checkpoints.torch_names import from_torch, to_torch
from tlvit.models.functional import Net, count_parameters, functionalize
from tlvit.models.macs import model_macs
from tlvit.ops.randaugment_policy import parse_policy
from tlvit.training import mesh as sharding
from tlvit.training import optimizer as optim
from tlvit.training import run_log as reporting
from tlvit.training import state
from tlvit.training import step as steps
from tlvit.training.check_config import check_config, check_workdir, has_teacher, score_map_folder
from tlvit.training.evaluation import evaluate
from tlvit.training.prefetch import Prefetch
from tlvit.types import Batch

log = logging.getLogger("tlvit")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Attributes:
    finished: False if the run was asked to stop (Ctrl-C, SIGTERM) and saved its state.
    step: optimizer steps done.
    metrics: of the last evaluation: eval/raw_top1, eval/ema_top1, … in percent.
    """

    finished: bool
    step: int
    metrics: dict[str, float]


def train(config: ConfigDict, workdir: str | pathlib.Path) -> TrainResult:
    """Trains as the config says, or goes on where the workdir's last checkpoint ends.

    Args:
      config: as from `configs/common.py`.
      workdir: holds config.json, classes.txt (one a line, by label), checkpoints/, metrics.jsonl, TensorBoard
        events.

    Raises:
      ValueError: a config that contradicts itself, the data or the workdir, in a sentence with the numbers.
      FloatingPointError: the loss is not finite; the last good checkpoint stays.
    """
    # Data. TensorFlow is imported here and not above, so that layers below run without it.
    from tlvit.data import pipeline
    from tlvit.data.score_maps import reader as score_maps
    from tlvit.data.sources import folders
    from tlvit.data.sources import tfds as sources

    workdir = pathlib.Path(workdir)
    image_size = image_size_pair(config.image_size)
    data_dir = config.data.dir or None
    source = sources.open_source(config.data.name, config.data.train_split, data_dir=data_dir)
    eval_source = sources.open_source(config.data.name, config.data.eval_split, data_dir=data_dir)
    maps = None
    if config.token_labels:
        maps = score_maps.open_score_maps(score_map_folder(config, source))
        maps.check_against(source)

    check_config(config, source)

    # Mesh and model. The model is built abstractly first; its arrays are born where they belong.
    mesh = sharding.make_mesh()
    eval_batch_size = config.eval.batch_size or config.batch_size
    for size in (config.batch_size, eval_batch_size):
        sharding.local_batch_size(size, mesh)
    info = model_info(config, source)
    build = lambda: info.build(seed=config.seed)
    abstract = nnx.eval_shape(build)
    grid = getattr(abstract, "grid", None)
    if maps is not None and grid is None:
        raise ValueError(
            f"{config.model.name} has no patch tokens to train with token labels; set token_labels=False."
        )
    teacher = None
    if has_teacher(config, distilled=getattr(abstract, "dist_token", None) is not None):
        teacher = _load_teacher(config, info, mesh)
    steps_per_epoch = pipeline.steps_per_epoch(source, config.batch_size)
    total_steps = (config.epochs + config.floor_epochs) * steps_per_epoch
    peak = optim.scale_learning_rate(
        config.optim.learning_rate, batch_size=config.batch_size, reference_batch=config.optim.reference_batch
    )
    schedule = optim.warmup_cosine(
        peak=peak,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=config.optim.warmup_epochs,
        warmup_start=config.optim.warmup_start,
        floor=config.optim.floor,
        per=config.optim.schedule_per,
        lag_epochs=config.optim.lag_epochs,
    )
    make_tx = lambda params: optim.make_optimizer(
        params,
        name=config.optim.name,
        learning_rate=schedule,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm or None,
    )
    net, tx, train_state = state.init_state(
        build, make_tx, mesh=mesh, seed=config.seed, ema=config.ema.decay > 0
    )

    # Resume, or start from other weights, or start.
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    if checkpoints.steps():
        check_workdir(workdir, config)
    restored = checkpoints.restore(train_state)
    if restored is not None:
        train_state, _ = restored
    elif config.model.init_from:
        train_state = _start_from(config.model.init_from, build(), info.num_classes, tx, seed=config.seed)
        train_state = jax.device_put(train_state, sharding.replicated(mesh))
    first_step = int(train_state.step)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        reporting.write_whole(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        if source.class_names:
            folders.write_class_names(str(workdir / "classes.txt"), source.class_names)
    _describe(config, source, eval_source, maps, mesh, net, train_state, peak, total_steps)

    # The two compiled programs.
    on_device = config.augment.on == "device"
    train_step = steps.make_train_step(
        net,
        tx,
        mesh=mesh,
        num_classes=source.num_classes,
        token_grid=grid if maps else None,
        smoothing=config.loss.smoothing,
        dense_weight=config.loss.dense_weight,
        cls_weight=config.loss.cls_weight,
        cls_target=config.loss.cls_target,
        mixtoken=config.loss.mixtoken,
        mixup=config.augment.mixup,
        cutmix=config.augment.cutmix,
        policy=parse_policy(config.augment.randaugment) if on_device else None,
        erasing=config.augment.erasing,
        teacher=teacher,
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        accumulate=config.optim.accumulate,
    )
    eval_step = steps.make_eval_step(net, mesh=mesh)

    # The stream of batches, from the step at which this run starts.
    batches = Prefetch(
        pipeline.train_batches(
            source,
            maps,
            batch_size=config.batch_size,
            image_size=image_size,
            seed=config.seed,
            first_step=first_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            scale=tuple(config.augment.crop_scale),
            ratio=tuple(config.augment.crop_ratio),
            hflip=config.augment.flip,
            interpolation=config.augment.interpolation,
            randaugment="" if on_device else config.augment.randaugment,
            three_augment=config.augment.three_augment,
            color_jitter=config.augment.color_jitter,
            exact_resize=config.augment.exact_resize,
            repeats=config.augment.repeats,
            label_crop=config.data.label_crop,
            max_bad=config.data.max_bad,
            allow_missing_maps=config.data.allow_missing_maps,
            shuffle_bytes=int(config.data.shuffle_gib * 2**30),
            num_threads=config.data.threads or None,
        ),
        mesh,
    )
    eval_batches = lambda: Prefetch(
        pipeline.eval_batches(
            eval_source,
            batch_size=eval_batch_size,
            image_size=image_size,
            crop_pct=config.eval.crop_pct,
            interpolation=config.eval.interpolation,
            max_bad=config.eval.max_bad,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.data.threads or None,
        ),
        mesh,
    )

    # The loop.
    journal = reporting.Journal(workdir, first_step)
    progress = reporting.Progress(first_step, total_steps, steps_per_epoch, config.batch_size)
    result: dict[str, float] = {}
    with StopRequest() as stop:
        for step in range(first_step + 1, total_steps + 1):
            batch = next(batches)
            train_state, metrics = train_step(train_state, batch)
            progress.add(metrics)
            if step == first_step + 1:
                batches.wait_s = 0.0  # the first fill of the shuffle belongs to the start
            last = step == total_steps
            evaluating = last or _due(step, config.eval.every_epochs, steps_per_epoch)
            saving = last or _due(step, config.checkpoint.every_epochs, steps_per_epoch)
            # Asked to stop in its last step, a run may as well end.
            stopping = not last and (
                checkpoints.preempted(step) if jax.process_count() > 1 else stop.requested
            )
            if step % config.log_every == 0 or evaluating or saving or stopping:
                line = progress.flush(step, lr=float(schedule(step - 1)), wait_s=batches.wait_s)
                batches.wait_s = 0.0
                journal.write(step, line)
            if evaluating and not stopping:
                try:
                    result = _evaluate_both(eval_step, train_state, eval_batches)
                except ValueError:  # an image or a shard cannot be read: the epoch shall not be lost
                    checkpoints.save(train_state, extra=info.to_json())
                    checkpoints.close()
                    raise
                journal.write(step, result)
                progress.restart()
            if saving or stopping:
                _check_weights(eval_step, train_state, batch)
                score = _score(result) if evaluating and not stopping else None
                checkpoints.save(train_state, score=score, extra=info.to_json())
                progress.restart()
            if stopping:
                break
    if first_step >= total_steps:
        log.info("this run is complete: %d of %d steps", first_step, total_steps)
        result = _evaluate_both(eval_step, train_state, eval_batches)
    checkpoints.close()
    journal.close()
    finished = int(train_state.step) >= total_steps
    if not finished:
        log.info("stopped at step %d and saved: the same command goes on from there", train_state.step)
    return TrainResult(finished=finished, step=int(train_state.step), metrics=result)


class StopRequest:
    """Within it, the first Ctrl-C or SIGTERM only sets `requested`; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # In a job of several processes JAX's own notifier takes SIGTERM, so that all stop at one step.
        for number in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        log.info("%s: finishing this step, then saving", signal.Signals(number).name)
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def model_info(config: ConfigDict, source) -> ModelInfo:
    """What the run's checkpoints say about their model."""
    return ModelInfo(
        model=config.model.name,
        num_classes=source.num_classes,
        image_size=image_size_pair(config.image_size),
        overrides={"dtype": config.model.dtype, **config.model.options.to_dict()},
        class_names=source.class_names,
        preprocessing=Preprocessing(crop_pct=config.eval.crop_pct),
    )


def _start_from(path: str, model: nnx.Module, num_classes: int, tx, *, seed: int) -> state.TrainState:
    """A state at step 0 with the weights of a checkpoint; position embeddings are resized to this run's grid,
    heads for another number of classes start anew, anything else that differs is an error."""
    other, other_info = load(path)
    heads = () if other_info.num_classes == num_classes else HEADS
    tensors = to_torch(other)
    report = from_torch(model, tensors, allow=(*heads, "pos_embed"), pos_grid=getattr(other, "grid", None))
    log.info("starting from %s:\n%s", path, report)
    _, params, stats = functionalize(model)
    return state.state_from(params, stats, tx, seed=seed)


def _load_teacher(config: ConfigDict, info: ModelInfo, mesh: Mesh) -> steps.Teacher:
    """The teacher for images of this run, its arrays on every device."""
    path = config.distill.teacher
    model, found = load(path, image_size=info.image_size, dtype=config.model.dtype)
    if found.num_classes != info.num_classes:
        raise ValueError(
            f"The teacher {path} distinguishes {found.num_classes} classes, the data have {info.num_classes}."
        )
    net, params, stats = functionalize(model)
    params, stats = jax.device_put((params, stats), sharding.replicated(mesh))
    log.info("teacher: %s from %s, %s distillation", found.model, path, config.distill.kind)
    kind, alpha, tau = config.distill.kind, config.distill.alpha, config.distill.tau
    return steps.Teacher(net, params, stats, kind=kind, alpha=alpha, tau=tau)


def _check_weights(eval_step, train_state: state.TrainState, batch: Batch) -> None:
    """Tries the weights before they are saved: the loss of a step is from before its update."""
    loss = float(eval_step(train_state.params, train_state.stats, batch)["loss"])
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The weights after step {int(train_state.step)} give a loss of {loss}: stopped without saving; "
            "the last checkpoint is from before. Try a lower optim.learning_rate or optim.clip_norm=1.0."
        )


def _due(step: int, every_epochs: int, steps_per_epoch: int) -> bool:
    return every_epochs > 0 and step % (every_epochs * steps_per_epoch) == 0


def _evaluate_both(eval_step, train_state, batches: Callable[[], Iterable[Batch]]) -> dict[str, float]:
    """Accuracy of the raw weights and of their average."""
    weights = {"raw": {"params": train_state.params, "stats": train_state.stats}}
    if train_state.ema is not None:
        weights["ema"] = train_state.ema
    found = evaluate(eval_step, weights, batches())
    result = {f"eval/{name}_{k}": v for name, sums in found.items() for k, v in sums.items() if k != "count"}
    result["eval/images"] = found["raw"]["count"]
    top = lambda name, k: result[f"eval/{name}_top{k}"]
    parts = [f"{name} top-1 {top(name, 1):.2f}% top-5 {top(name, 5):.2f}%" for name in weights]
    log.info(
        "step %d  evaluation on %d images: %s", train_state.step, result["eval/images"], ", ".join(parts)
    )
    return result


def _score(result: dict[str, float]) -> float:
    """What "best" means: the better of the raw weights and their average."""
    return max(result.get("eval/ema_top1", 0.0), result["eval/raw_top1"])


def _describe(
    config, source, eval_source, maps, mesh: Mesh, net: Net, train_state, peak: float, total_steps: int
) -> None:
    """The summary at the start."""
    augment, optimizer = config.augment, config.optim
    order = [
        f"crop {augment.crop_scale[0]:g}-{augment.crop_scale[1]:g}",
        f"flip {augment.flip:g}",
        f"{augment.interpolation} resize to {'x'.join(map(str, image_size_pair(config.image_size)))}",
        f"{augment.randaugment} on the {augment.on}" if augment.randaugment else "",
        "3-Augment" if augment.three_augment else "",
        f"color jitter {augment.color_jitter:g}" if augment.color_jitter else "",
        f"{augment.repeats} views of an image" if augment.repeats > 1 else "",
        f"erasing {augment.erasing:g}" if augment.erasing else "",
        f"mixup {augment.mixup:g}" if augment.mixup else "",
        f"cutmix {augment.cutmix:g}" if augment.cutmix else "",
        "MixToken" if maps is not None and config.loss.mixtoken else "",
    ]
    count = f"{config.epochs} + {config.floor_epochs} epochs = {total_steps} steps of {config.batch_size}"
    labels = "OFF: the class token learns the labels"
    if config.distill.teacher:
        labels += ", the distillation token a teacher"
    if maps is not None:
        found, size = maps.info, "x".join(map(str, maps.info.grid))
        labels = (
            f"ON: {found.num_images - found.num_missing} maps of {size} cells, top {found.top_k}, for "
            f"{source.num_examples} images, by {found.annotator}, crop {config.data.label_crop}"
        )
    step = int(train_state.step)
    start = (
        f"with the weights of {config.model.init_from}" if config.model.init_from else "from the beginning"
    )
    millions = count_parameters(train_state.params) / 1e6
    macs = model_macs(net, train_state.params, train_state.stats, image_size_pair(config.image_size)) / 1e9
    reporting.print_table(
        [
            ("devices", reporting.devices_text(mesh)),
            (
                "model",
                f"{config.model.name}, {millions:.2f} M parameters, {macs:.2f} G MACs, {config.model.dtype}",
            ),
            ("train images", f"{source.num_examples} of {source.num_classes} classes, {source.identity}"),
            ("eval images", f"{eval_source.num_examples}, {eval_source.identity}"),
            ("token labels", labels),
            ("augmentation", ", ".join(o for o in order if o)),
            (
                "schedule",
                f"{count} images; peak lr {peak:.2e} ({optimizer.learning_rate:g} for "
                f"{optimizer.reference_batch}), per {optimizer.schedule_per}",
            ),
            ("start", f"resumed at step {step}" if step else start),
        ]
    )
