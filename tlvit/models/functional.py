"""Splits a model into a pure function and nested dicts of arrays, and puts them together again."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from tlvit.models.batch_norm import BatchNorm
from tlvit.models.model import Model
from tlvit.shapes import Float
from tlvit.types import Array, MixTokenMask, ModelOutput, PyTree, SegmentationOutput


@dataclasses.dataclass(frozen=True)
class Net:
    """The computation of a model without its arrays. It is hashable, so functions under `jax.jit` may use it.

    Attributes:
      train_graph, eval_graph: NNX's description of the module in training and in evaluation mode.
      task, grid, has_token_head, has_distillation_token, has_dense_logits: capabilities, as in `Model`.

    Example:
      >>> net, params, stats = tlvit.functionalize(tlvit.create_model("lvvit_t"))
      >>> output, _ = jax.jit(net.apply)(params, stats, images)  # float32 [B, 224, 224, 3], normalized
    """

    train_graph: nnx.GraphDef
    eval_graph: nnx.GraphDef
    task: str = "classification"
    grid: tuple[int, int] | None = None
    has_token_head: bool = False
    has_distillation_token: bool = False
    has_dense_logits: bool = False

    def apply(
        self,
        params: PyTree,
        stats: PyTree,
        images: Float[Array, "B H W 3"],
        *,
        mix: MixTokenMask | None = None,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> tuple[ModelOutput | SegmentationOutput, PyTree]:
        """Runs the model. A pure function.

        Args:
          params: trained arrays, as from `functionalize`.
          stats: running statistics and buffers, as from `functionalize`.
          images: normalized images.
          mix: MixToken mask. The model mixes the patch tokens with it and puts the token logits back.
          train: uses the statistics of the batch instead of the running ones, and updates the running ones.
            Dropout and drop-path act if there is a key.
          key: PRNG key of dropout and drop-path.

        Returns:
          The ModelOutput (of an UperNet the SegmentationOutput), and the new stats (the same arrays if not
          `train`).

        Raises:
          ValueError: a mask for a model without a token grid, or images that do not fit the grid.

        Example:
          >>> import jax.numpy as jnp
          >>> import tlvit
          >>> model = tlvit.create_model("vit", dim=32, depth=1, num_heads=2, image_size=32, num_classes=7)
          >>> net, params, stats = tlvit.functionalize(model)
          >>> output, stats = net.apply(params, stats, jnp.zeros((4, 32, 32, 3)))
          >>> output.logits.shape
          (4, 7)
        """
        model = self.bind(params, stats, train=train)
        options: dict[str, Any] = {"key": key if train else None}
        if mix is not None:
            if self.grid is None:
                raise ValueError(f"{type(model).__name__} has no token grid, so mix must be None.")
            options["mix"] = mix
        output = model(images, **options)
        return output, (_arrays(model)[1] if train else stats)

    def bind(self, params: PyTree, stats: PyTree, *, train: bool = False) -> nnx.Module:
        """The module with these arrays. Call it inside a function under `jax.jit`, where it costs nothing."""
        graph = self.train_graph if train else self.eval_graph
        return nnx.merge(graph, _list_keys(params), _list_keys(stats))


def functionalize(model: nnx.Module) -> tuple[Net, PyTree, PyTree]:
    """Splits a model into its computation, its parameters and its statistics.

    Args:
      model: a model, a single layer, or an abstract one from `nnx.eval_shape`.

    Returns:
      (net, params, stats). params holds the trained arrays. stats holds the other arrays of a checkpoint:
      running statistics of BatchNorm and buffers. Both are nested dicts with string keys.

    Example:
      >>> import tlvit
      >>> model = tlvit.create_model("vit", dim=32, depth=1, num_heads=2, image_size=32, num_classes=7)
      >>> net, params, stats = tlvit.functionalize(model)
      >>> net.grid
      (2, 2)
      >>> params["head"]["kernel"].shape
      (32, 7)
    """
    graphs = {}
    for train in (False, True):
        view = model
        if any(isinstance(module, BatchNorm) for _, module in nnx.iter_graph(model)):
            view = nnx.view(model, use_running_average=not train)
        graphs[train] = nnx.split(view, nnx.Param, nnx.BatchStat)[0]
    params, stats = _arrays(model)
    net = Net(train_graph=graphs[True], eval_graph=graphs[False])
    if isinstance(model, Model):  # a single layer has none of the capabilities
        net = dataclasses.replace(
            net,
            task=model.task,
            grid=model.grid,
            has_token_head=model.has_token_head,
            has_distillation_token=model.has_distillation_token,
            has_dense_logits=model.has_dense_logits,
        )
    return net, params, stats


def update(model: nnx.Module, params: PyTree, stats: PyTree) -> None:
    """Writes nested dicts of arrays into a model."""
    nnx.update(model, _list_keys(params), _list_keys(stats))


def count_parameters(params: PyTree) -> int:
    """The number of trained scalars."""
    return sum(int(p.size) for p in jax.tree.leaves(params))


def _arrays(model: nnx.Module) -> tuple[PyTree, PyTree]:
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return _string_keys(nnx.to_pure_dict(params)), _string_keys(nnx.to_pure_dict(stats))


def _string_keys(tree: PyTree) -> PyTree:
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _list_keys(tree: PyTree) -> PyTree:
    """Makes integers of the keys that are digits: NNX numbers the members of a list with integers."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _list_keys(v) for k, v in tree.items()}
