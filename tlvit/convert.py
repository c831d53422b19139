"""PyTorch state dicts in and out: one naming rule, one layout rule, few exceptions.

A tensor's official name is the path of the array in the module, joined by dots, with the leaf renamed (kernel
and scale -> weight, mean and var -> running_mean and running_var). Linear kernels are transposed,
convolutions go from HWIO to OIHW.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlvit.models.functional import functionalize, update
from tlvit.types import PyTree

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of the tensors, by official name."""

    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def from_torch(model: nnx.Module, state_dict: Mapping[str, Any], *, allow: Sequence[str] = ()) -> LoadReport:
    """Fills a model from an official state dict (name -> numpy array or torch tensor).

    Args:
      model: changed in place, and only if everything fits.
      state_dict: the tensors.
      allow: name prefixes (such as "head") that may be missing or of another shape: these keep their initial
        values.

    Returns:
      The LoadReport.

    Raises:
      ValueError: missing, unexpected or misshapen tensors that are not allowed, named with their shapes.
    """
    _, params, stats = functionalize(model)
    source = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    loaded, kept, problems = [], [], []

    def fill(path, leaf):
        name = _official_name(path)
        tensor = source.get(name)
        found = None if tensor is None else tuple(tensor.shape)
        wanted = _to_official(np.empty(leaf.shape, bool)).shape
        if found == wanted:
            loaded.append(name)
            return jnp.asarray(_from_official(np.asarray(tensor, dtype=np.float32), leaf.ndim), leaf.dtype)
        if not name.startswith(tuple(allow)) or not allow:
            problems.append(
                f"{name}: {'missing' if found is None else f'is {list(found)}'}, wanted {list(wanted)}"
            )
        kept.append(name)
        return leaf

    params, stats = _map_with_path(fill, params), _map_with_path(fill, stats)
    unexpected = sorted(set(source) - set(loaded) - set(kept))
    problems += [
        f"{name}: unexpected, {list(source[name].shape)}"
        for name in unexpected
        if not name.startswith(tuple(allow) or "\0")
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} tensors do not fit {type(model).__name__}:\n  " + "\n  ".join(problems[:20])
        )
    update(model, params, stats)
    return LoadReport(loaded=tuple(loaded), reinitialised=tuple(kept), unexpected=tuple(unexpected))


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """The model's arrays under their official names and in torch's layouts, float32; `num_batches_tracked`,
    which torch lists beside every BatchNorm and uses for nothing here, is int64 0."""
    _, params, stats = functionalize(model)
    tensors: dict[str, np.ndarray] = {}

    def collect(path, leaf):
        tensors[_official_name(path)] = np.ascontiguousarray(_to_official(np.asarray(leaf, np.float32)))
        if path[-1] == "var":
            tensors[".".join([*path[:-1], "num_batches_tracked"])] = np.zeros((), np.int64)
        return leaf

    _map_with_path(collect, params)
    _map_with_path(collect, stats)
    return tensors


def _official_name(path: tuple[str, ...]) -> str:
    return ".".join([*path[:-1], LEAVES.get(path[-1], path[-1])])


def _to_official(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        return array.T
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def _from_official(array: np.ndarray, ndim: int) -> np.ndarray:
    if ndim == 2:
        return array.T
    return array.transpose(2, 3, 1, 0) if ndim == 4 else array


def _map_with_path(function, tree: PyTree, path: tuple[str, ...] = ()) -> PyTree:
    if isinstance(tree, dict):
        return {k: _map_with_path(function, v, (*path, k)) for k, v in tree.items()}
    return function(path, tree)
