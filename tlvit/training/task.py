"""`Task`: what differs between classification and segmentation, as plain functions.

There is one training loop, one training step and one evaluation. They call these functions.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.config import Config
from tlvit.models.functional import Net
from tlvit.types import Array, Batch, PyTree

if TYPE_CHECKING:  # the module imports TensorFlow
    from tlvit.data.sources.source import Source

Objective = Callable[..., tuple[Array, PyTree]]
EvalStep = Callable[[PyTree, PyTree, Batch], dict[str, Array]]


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


@dataclasses.dataclass(frozen=True)
class Task:
    """The functions of one kind of training.

    Attributes:
      open_source: (settings, split) -> the images of a split with their labels.
      eval_batches: (source, settings, model, mesh) -> the batches of this process, every image of the source
        once.
      objective: (net, mesh, settings, model, teacher, shards) -> a function (forward, images, batch, key,
        arrays of the teacher) -> (loss, new statistics). `forward` runs the model in training, `images` are
        normalized.
      eval_step: (net, mesh, preprocessing, settings of segmentation) -> a function (params, stats, batch) ->
        sums over the images of a batch, among them `loss`. Sums of several batches are added.
      means: the sums of all batches, on the host -> values: the metrics in percent, `loss`, and `count`, the
        number of images.
      score: the metric by which the best weights and the best checkpoint are chosen. Higher is better.
      describe: values -> the metrics as text for the log.
    """

    open_source: Callable[[Config, str], "Source"]
    eval_batches: Callable[["Source", Config, ModelInfo, Mesh], Iterator[Batch]]
    objective: Callable[[Net, Mesh, Config, ModelInfo, Teacher | None, int], Objective]
    eval_step: Callable[..., EvalStep]
    means: Callable[[Mapping[str, Any]], dict[str, float]]
    score: str
    describe: Callable[[Mapping[str, float]], str]
