"""Nested arrays as flat dicts that are keyed by path: {"blocks/0/attn/qkv/kernel": array}."""

import dataclasses
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


def flatten_state(state: PyTree) -> dict[str, Any]:
    """{"params/blocks/0/…": array or shape} of a TrainState, the PRNG key as its raw data."""
    key = state.key
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    else:
        data = jax.random.key_data(key)
    return flatten(dataclasses.replace(state, key=data))


def unflatten_state(target: PyTree, flat: Mapping[str, Any]) -> PyTree:
    """The TrainState with the structure of `target` and the arrays of `flatten_state`."""
    state = unflatten_like(target, flat)
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
