"""Counts the multiply-adds of a model in its jaxpr."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from tlvit.models.functional import Net
from tlvit.types import PyTree


def model_macs(net: Net, params: PyTree, stats: PyTree, image_size: tuple[int, int]) -> int:
    """Multiply-adds of inference on one image.

    Args:
      net: as from `functionalize`.
      params, stats: arrays, or only their shapes as from an abstract model.
      image_size: (height, width), pixels.
    """
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    infer = lambda p, s, x: net.apply(p, s, x)[0].logits
    return count_macs(jax.make_jaxpr(infer)(params, stats, images).jaxpr)


def count_macs(jaxpr: Jaxpr) -> int:
    """Multiply-adds of all matrix products and convolutions of a program.

    Args:
      jaxpr: as from `jax.make_jaxpr(f)(x).jaxpr`. The body of a `scan` or kernel counts once for each
        iteration, that of a `shard_map` once for each device, that of a `while` once, and a `cond` counts as
        its most expensive branch. Products with the zeros between the values of a dilated input, as in the
        gradient of a strided convolution, do not count.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = _shape(equation.invars[0])
            total += math.prod(_shape(equation.outvars[0])) * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            _, channels_in, *spatial = params["dimension_numbers"].rhs_spec
            kernel = _shape(equation.invars[1])  # it has the input channels of one group
            size = math.prod(_shape(equation.outvars[0]))
            total += (
                size
                * math.prod(kernel[i] for i in (channels_in, *spatial))
                // math.prod(params["lhs_dilation"])
            )
        else:
            inner = [count_macs(j) for value in params.values() for j in _jaxprs(value)]
            total += max(inner, default=0) if name == "cond" else _repetitions(name, params) * sum(inner)
    return total


def _repetitions(name: str, params: dict[str, Any]) -> int:
    """How often the programs in an equation's parameters run."""
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params["mesh"].size if name == "shard_map" else params.get("length", 1)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _jaxprs(value: Any) -> list[Jaxpr]:
    """The programs in an equation's parameter."""
    values = value if isinstance(value, list | tuple) else [value]
    inner = [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values]
    return [j for j in inner if isinstance(j, Jaxpr)]
