"""The data of a run: its sources, score maps and batches, and the record of its model."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from tlvit.checkpoints.model_info import ModelInfo, Preprocessing
from tlvit.config import MAX_STEPS, Config
from tlvit.host_memory import check_batch
from tlvit.models.table import published_crop_pct
from tlvit.ops.normalize import IMAGENET_MEAN, IMAGENET_STD
from tlvit.training.mesh import batch_part, batch_shards
from tlvit.training.tasks import TASKS
from tlvit.types import Batch

if TYPE_CHECKING:  # the modules import TensorFlow
    from tlvit.data.score_maps.reader import ScoreMapReader
    from tlvit.data.sources.source import Source


@dataclasses.dataclass(frozen=True)
class RunData:
    """The images of a run.

    Attributes:
      train: the training split.
      eval: the evaluation split.
      maps: score maps of the training split. None without token labels, or if the training step scores the
        images.
    """

    train: "Source"
    eval: "Source"
    maps: "ScoreMapReader | None"


def open_data(config: Config) -> RunData:
    """Opens the images and score maps of a run and checks that they belong together.

    Raises:
      ValueError: they do not exist or do not fit, the splits have different classes, the training images do
        not fill a batch, or batches do not fit into the memory of this host.
    """
    # TensorFlow is imported here, not above, so that the lower layers run without it.
    from tlvit.data.score_maps.reader import open_score_maps
    from tlvit.data.sources.source import check_same_classes

    task = TASKS[config.task]
    source = task.open_source(config, config.data.train_split)
    eval_source = task.open_source(config, config.data.eval_split)
    check_same_classes(source, eval_source)
    maps = None
    if config.needs_maps and not config.data.annotator:
        maps = open_score_maps(config.data.score_maps)
        maps.check_against(source)
    if config.batch_size > source.num_examples:
        raise ValueError(
            f"The {source.num_examples} training images are fewer than a batch of {config.batch_size}."
        )
    processes = jax.process_count()
    check_batch(config.batch_size // processes, config.crop_size, "config.batch_size")
    check_batch(config.eval_batch_size // processes, config.image_size, "config.eval.batch_size")
    return RunData(train=source, eval=eval_source, maps=maps)


def model_info(config: Config, source: "Source") -> ModelInfo:
    """The record that the run's checkpoints keep of their model, for a source's classes."""
    sizes: dict[str, Any] = {}
    if config.task == "segmentation":
        settings = config.segmentation
        sizes = {"scale": settings.scale, "window": settings.window, "stride": settings.stride}
    return ModelInfo(
        model=config.model.name,
        num_classes=source.num_classes,
        image_size=config.image_size,
        options={"dtype": config.model.dtype, **config.model.options},
        class_names=source.class_names,
        preprocessing=Preprocessing(
            mean=_rgb(config.data.mean, IMAGENET_MEAN),
            std=_rgb(config.data.std, IMAGENET_STD),
            crop_pct=config.eval.crop_pct or published_crop_pct(config.model.name),
            interpolation="bicubic" if config.eval.interpolation == "auto" else config.eval.interpolation,
            **sizes,
        ),
    )


def _rgb(values: tuple[float, ...], otherwise: tuple[float, float, float]) -> tuple[float, float, float]:
    """The values of the three channels, or others if there are none."""
    return (values[0], values[1], values[2]) if values else otherwise


def steps_per_epoch(data: RunData, config: Config) -> int:
    """Full training batches in an epoch.

    Raises:
      ValueError: the run has more steps than an int32 counts.
    """
    from tlvit.data import pipeline

    steps = pipeline.steps_per_epoch(data.train, config.batch_size)
    if config.total_steps(steps) > MAX_STEPS:
        raise ValueError(
            f"{config.total_epochs} epochs of {steps} steps are {config.total_epochs * steps} steps, but a "
            f"run has at most {MAX_STEPS}: set a lower config.epochs."
        )
    return steps


def train_batches(data: RunData, config: Config, first_step: int, mesh: Mesh) -> Iterator[Batch]:
    """The augmented batches of this process, from a step on."""
    from tlvit.data import pipeline

    part, parts = batch_part(mesh)
    return pipeline.train_batches(
        data.train,
        data.maps,
        config,
        first_step=first_step,
        process_index=part,
        process_count=parts,
        device_shards=batch_shards(mesh),
    )
