"""All of NNX's split and merge plumbing: a module becomes a pure function over nested dicts of arrays."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from tlvit.models.layers import BatchNorm
from tlvit.models.model import Model
from tlvit.types import Array, MixTokenMask, ModelOutput, PyTree


@dataclasses.dataclass(frozen=True)
class Net:
    """The computation of a model without its arrays: hashable, so that a function under `jax.jit` may use it.

    Attributes:
      train_graph, eval_graph: NNX's description of the module in training and in evaluation mode.
      grid, has_token_head, has_distillation_token, has_dense_logits: what the model can do, as in `Model`.
    """

    train_graph: nnx.GraphDef
    eval_graph: nnx.GraphDef
    grid: tuple[int, int] | None = None
    has_token_head: bool = False
    has_distillation_token: bool = False
    has_dense_logits: bool = False

    def bind(self, params: PyTree, stats: PyTree, *, train: bool = False) -> nnx.Module:
        """The module with these arrays in it; cheap inside a traced function, where it belongs."""
        return nnx.merge(
            self.train_graph if train else self.eval_graph, _list_keys(params), _list_keys(stats)
        )

    def apply(
        self,
        params: PyTree,
        stats: PyTree,
        images: Array,
        *,
        mix: MixTokenMask | None = None,
        train: bool = False,
        key: Array | None = None,
    ) -> tuple[ModelOutput, PyTree]:
        """Runs the model.

        Args:
          params, stats: nested dicts as from `functionalize`.
          images: float32 [B, H, W, 3], normalized.
          mix: MixToken mask; the model mixes its tokens and un-mixes its token logits with it.
          train: batch statistics in place of the running ones, which move; dropout and drop-path if there is
            a key.
          key: PRNG key of dropout and drop-path.

        Returns:
          The ModelOutput and the new stats (the same arrays if not `train`).

        Raises:
          ValueError: a mask for a model that has no token grid.
        """
        model = self.bind(params, stats, train=train)
        options: dict[str, Any] = {"key": key if train else None}
        if mix is not None:
            if self.grid is None:
                raise ValueError(f"{type(model).__name__} has no token grid to mix on: mix must be None.")
            options["mix"] = mix
        output = model(images, **options)
        return output, (_arrays(model)[1] if train else stats)


def functionalize(model: nnx.Module) -> tuple[Net, PyTree, PyTree]:
    """Splits a model (concrete or of `nnx.eval_shape`) into its computation, parameters and statistics.

    Returns:
      (net, params, stats): params are the trained arrays, stats everything else of the checkpoint
      (BatchNorm's running statistics, fixed buffers), both as nested dicts with string keys.
    """
    graphs = {}
    for train in (False, True):
        view = model
        if any(isinstance(module, BatchNorm) for _, module in nnx.iter_graph(model)):
            view = nnx.view(model, use_running_average=not train)
        graphs[train] = nnx.split(view, nnx.Param, nnx.BatchStat)[0]
    params, stats = _arrays(model)
    declared = model if isinstance(model, Model) else Model  # a single layer has none of the capabilities
    net = Net(
        train_graph=graphs[True],
        eval_graph=graphs[False],
        grid=declared.grid,
        has_token_head=declared.has_token_head,
        has_distillation_token=declared.has_distillation_token,
        has_dense_logits=declared.has_dense_logits,
    )
    return net, params, stats


def update(model: nnx.Module, params: PyTree, stats: PyTree) -> None:
    """Writes nested dicts of arrays back into a module."""
    nnx.update(model, _list_keys(params), _list_keys(stats))


def _arrays(model: nnx.Module) -> tuple[PyTree, PyTree]:
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return _string_keys(nnx.to_pure_dict(params)), _string_keys(nnx.to_pure_dict(stats))


def _string_keys(tree: PyTree) -> PyTree:
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _list_keys(tree: PyTree) -> PyTree:
    """NNX numbers the members of a list with integers."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _list_keys(v) for k, v in tree.items()}


def count_parameters(params: PyTree) -> int:
    """Number of trained scalars."""
    return sum(int(p.size) for p in jax.tree.leaves(params))
