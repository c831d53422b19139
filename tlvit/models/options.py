"""The options of the model classes: names, defaults and the values that they may have."""

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tlvit.records import closest, convert

NOT_OPTIONS = ("self", "num_classes", "image_size", "rngs")  # arguments that every model class has
MAX_PIXELS = 8192 * 8192
MAX_CLASSES = 1_000_000

# (smallest, largest) value of the numeric options. The largest ones are far above all published models, and
# keep a typing error from exhausting the memory.
FRACTION = (0.0, math.nextafter(1.0, 0.0))  # [0, 1)
POSITIVE = (math.nextafter(0.0, 1.0), 100.0)  # (0, 100]
RANGES: dict[str, tuple[float, float]] = {
    "dim": (1, 16384), "widths": (1, 16384), "stem_width": (0, 16384), "growth": (1, 16384),
    "group_width": (1, 16384), "depth": (0, 1000), "depths": (0, 1000), "num_heads": (1, 1024),
    "patch_size": (1, 1024), "stem_stride": (1, 64), "strides": (1, 64), "mlp_ratio": POSITIVE,
    "skip_lam": POSITIVE, "layer_scale": POSITIVE, "se_ratio": (0, 100), "alpha": POSITIVE,
    "token_weight": (-100, 100), "last_width": (1, 16384),
    "channels": (1, 16384), "out_indices": (0, 999), "epsilon": POSITIVE, "head_drop": FRACTION,
    "drop_rate": FRACTION, "attn_drop": FRACTION, "drop_path": FRACTION, "token_drop": FRACTION,
}  # fmt: skip


# What an option does, for `tlvit summary NAME`.
MEANINGS = {
    "patch_size": "side of a patch, pixels",
    "dim": "width of a token",
    "depth": "number of transformer blocks (dense T2T-ViT: of each stage)",
    "num_heads": "attention heads of a block",
    "mlp_ratio": "hidden width of the MLPs / dim",
    "stem_width": "channels of the first convolutions (LV-ViT: None for one linear layer)",
    "skip_lam": "residual branches are divided by it",
    "token_head": "a classifier for every patch token, which token labels train",
    "distilled": "a distillation token with its own classifier",
    "rule": 'the logits: those of the class token ("class") + token_weight * the maximum ("max") or mean '
    '("mean") over the patch tokens',
    "token_weight": "weight of the patch tokens in the logits, see rule",
    "tokens": 'attention of the tokens-to-token layers, "performer" or "transformer"',
    "block": 'kind of the blocks, "plain", "se" (squeeze-and-excitation), "ghost" or "dense"',
    "growth": "channels that a dense block adds",
    "widths": "channels of each stage",
    "depths": "number of blocks of each stage",
    "strides": "stride of each stage; None: 2",
    "stem_stride": "stride of the first convolution",
    "group_width": "channels of a group of the grouped convolutions",
    "se_ratio": "width of squeeze-and-excitation / input width of the block; 0: none",
    "alpha": "scale of the residual branches",
    "layer_scale": "initial factor of the channels of the residual branches",
    "backbone": "name of the LV-ViT, DeiT or T2T-ViT, whose options may be given too",
    "out_indices": "the four blocks whose tokens become feature maps; None: evenly spaced",
    "last_width": "channels of the last feature map",
    "head": 'kind of the head, "upernet" or "fcn"',
    "channels": "channels of the head",
    "auxiliary": "a second head for training",
    "head_drop": "dropout of the heads' channels",
    "mlp_dropout": "use drop_path as dropout in the MLPs, as the published code does, and no drop path",
    "epsilon": "epsilon of the blocks' LayerNorms; None: the backbone's",
    "drop_rate": "dropout of the layers (convolutional models: before the classifier)",
    "attn_drop": "dropout of the attention weights",
    "drop_path": "probability of skipping the last residual branch; it grows linearly with the depth "
    "(DeiT III: the same in all blocks)",
    "token_drop": "dropout in the tokens-to-token layers",
    "attention": 'implementation of the blocks\' attention, "xla", "fused" (on a TPU or GPU its weights stay '
    'on the chip) or "auto" (fused on a TPU or GPU)',
    "remat": "compute activations a second time in the backward pass, to save memory",
    "scan_blocks": "equal blocks run as one loop of the program: less to compile, less memory",
    "dtype": "type of the computation; None: float32. In a run it is set by config.model.dtype",
}


class UnknownOption(TypeError, ValueError):
    """An option that the model does not have: a TypeError, as of any unknown keyword, with a suggestion."""


def option_defaults(build: functools.partial) -> dict[str, Any]:
    """Option -> default of a model.

    Args:
      build: a value of `table.MODELS`: the class with the options of one published model.
    """
    parameters = inspect.signature(build.func.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD} | build.keywords
    return {name: value for name, value in defaults.items() if name not in NOT_OPTIONS}


def check_options(name: str, build: functools.partial, options: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the names and values of a model's options. The model checks what several of them must fulfill.

    Options that a model passes on to its backbone are left to it; it calls this function for the backbone.

    Args:
      name: of the model, for messages.
      build: the model's value of `table.MODELS`.
      options: as of `create_model`, without num_classes and image_size. Numbers may be NumPy's.

    Returns:
      The options with values as the model annotates them: tuples for lists.

    Raises:
      UnknownOption: gives the closest option that the model has, or all of them.
      ValueError: a value of another type or out of its range.
    """
    parameters = inspect.signature(build.func.__init__).parameters
    passed_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known, checked = option_defaults(build), {}
    for option, value in options.items():
        if option not in parameters and passed_on:
            checked[option] = value
        elif option not in known:
            raise UnknownOption(f"{name} has no option {option!r}; {closest(option, known)}")
        elif option == "dtype":
            _check_dtype(value)
            checked[option] = value
        else:
            value = value.item() if isinstance(value, np.generic) else value
            checked[option] = convert(value, parameters[option].annotation, option)
            _check_range(option, checked[option])
    return checked


def check_num_classes(num_classes: int) -> None:
    """Raises ValueError unless it is an integer from 1 to MAX_CLASSES."""
    if not isinstance(num_classes, int | np.integer) or not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes must be an integer from 1 to {MAX_CLASSES:,}, not {num_classes!r}.")


def check_image_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width).

    Raises:
      ValueError: it is not one positive integer or two, or has more than MAX_PIXELS pixels.
    """
    pair = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(pair) != 2 or not all(isinstance(side, int | np.integer) and side >= 1 for side in pair):
        raise ValueError(f"image_size must be a number of pixels or (height, width), not {image_size!r}.")
    height, width = pair
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"An image of {height}x{width} has {height * width:,} pixels; the limit is {MAX_PIXELS:,} "
            "(8192x8192)."
        )
    return height, width


def _check_range(option: str, value: Any) -> None:
    low, high = RANGES.get(option, (-math.inf, math.inf))
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not low <= number <= high:
            raise ValueError(f"{option} must be {_range_text(option)}, not {value}.")


def _range_text(option: str) -> str:
    low, high = RANGES[option]
    named = {FRACTION: "in [0, 1)", POSITIVE: f"above 0 and at most {high:g}"}
    return named.get((low, high), f"from {low:g} to {high:g}")


def _check_dtype(dtype: Any) -> None:
    try:
        floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"dtype must be a floating-point type such as float32 or bfloat16, not {dtype!r}.")
