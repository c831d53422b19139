"""Nested arrays as flat dicts that are keyed by path: {"blocks/0/attn/qkv/kernel": array}."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tlvit.models.functional import functionalize, update
from tlvit.types import Array, PyTree


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns path -> leaf. A path joins dict keys, field names and indices with "/"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of path -> leaf."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def unflatten_like(tree: PyTree, flat: Mapping[str, Any]) -> PyTree:
    """Returns a pytree with the structure of `tree` and the leaves of `flat`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[path] for path in flatten(tree)])


def model_arrays(model: nnx.Module) -> dict[str, Array]:
    """Returns path -> array of a model's parameters and statistics.

    The arrays of a model of `nnx.eval_shape` are shapes.
    """
    _, params, stats = functionalize(model)
    return {**flatten(params), **flatten(stats)}


def set_model_arrays(model: nnx.Module, arrays: Mapping[str, Array]) -> None:
    """Writes path -> array into a model. Arrays that are not given keep their values."""

    def replace(tree: PyTree) -> PyTree:
        leaves = flatten(tree)
        new = {k: jnp.asarray(arrays[k], leaf.dtype) for k, leaf in leaves.items() if k in arrays}
        return unflatten({**leaves, **new})

    _, params, stats = functionalize(model)
    update(model, replace(params), replace(stats))
