"""The names of all models, how they are built, and their published evaluation settings."""

import difflib
import fnmatch
import functools
from collections.abc import Sequence
from typing import Any

from flax import nnx

from tlvit.models import deit, deit3, lvvit, nfnet, regnety, t2t_vit, upernet
from tlvit.models.options import check_image_size, check_num_classes, check_options, option_defaults
from tlvit.models.parameter_keys import ParameterKeys

FAMILIES = (
    (lvvit.LVViT, lvvit.VARIANTS),
    (deit.DeiT, deit.VARIANTS),
    (deit3.DeiT3, deit3.VARIANTS),
    (t2t_vit.T2TViT, t2t_vit.VARIANTS),
    (regnety.RegNetY, regnety.VARIANTS),
    (nfnet.NFNet, nfnet.VARIANTS),
    (upernet.UperNet, upernet.VARIANTS),
)
MODELS = {
    name: functools.partial(model, **options)
    for model, variants in FAMILIES
    for name, options in variants.items()
}

# Fraction of the resized image that the published evaluations keep, by prefix of the model's name. The
# longest prefix counts. Sources: the papers' code for LV-ViT, T2T-ViT, DeiT and RegNetY, the paper for
# DeiT III, timm 0.4.5 for NFNet.
CROP_PCT = {
    "": 0.875,
    "vit": 0.9,
    "lvvit": 0.9,
    "lvvit_m": 1.0,
    "lvvit_l": 1.0,
    "t2t": 0.9,
    **dict.fromkeys(deit3.VARIANTS, 1.0),
    "dm_nfnet_f0": 0.9,
    "dm_nfnet_f1": 0.91,
    "dm_nfnet_f2": 0.92,
    "dm_nfnet_f3": 0.94,
    "dm_nfnet_f4": 0.951,
    "dm_nfnet_f5": 0.954,
    "dm_nfnet_f6": 0.956,
}

# Image sizes of the published evaluations, pixels. All others: 384 if the name ends in _384, else 224.
IMAGE_SIZE = {
    "lvvit_l": 448,
    "dm_nfnet_f0": 256,
    "dm_nfnet_f1": 320,
    "dm_nfnet_f2": 352,
    "dm_nfnet_f3": 416,
    "dm_nfnet_f4": 512,
    "dm_nfnet_f5": 544,
    "dm_nfnet_f6": 576,
    "upernet": 512,
    "upernet_lvvit_s": 512,
    "upernet_lvvit_m": 512,
    "upernet_lvvit_l": 448,  # of its position embeddings; the published crop is 512
}


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> nnx.Module:
    """Builds a model with initialized parameters.

    Args:
      name: one of `list_models()`.
      num_classes: L, the width of the heads, from 1 to 1,000,000.
      image_size: pixels, one number for a square or (height, width). The default is the size in the name
        (deit_base_patch16_384) or else 224. At most 8192 x 8192 pixels and 65,536 tokens.
      seed: seeds the initialization.
      **options: options of the model class, such as drop_path=0.1, or dtype=jnp.bfloat16 for the computation.
        Parameters are float32. `tlvit summary NAME` lists the options with their defaults.

    Returns:
      The model. Call it with normalized float32 images [B, H, W, 3] to get a ModelOutput (upernet…: a
      SegmentationOutput).

    Raises:
      ValueError: the name is unknown, a value is out of its range, or the options do not fit together.
      TypeError: the model does not have an option. It is a ValueError, too.

    Example:
      >>> import jax.numpy as jnp
      >>> import tlvit
      >>> model = tlvit.create_model("lvvit_s", dim=32, depth=1, num_heads=2, image_size=32, num_classes=7)
      >>> output = model(jnp.zeros((4, 32, 32, 3)))
      >>> output.logits.shape, output.tokens.shape
      ((4, 7), (4, 4, 7))
    """
    check_model_name(name)
    check_num_classes(num_classes)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, not {seed}.")
    options = check_options(name, MODELS[name], options)
    if image_size is not None:
        options["image_size"] = check_image_size(image_size)
    return MODELS[name](num_classes=num_classes, rngs=ParameterKeys(seed), **options)


def list_models(pattern: str = "*") -> list[str]:
    """The names of all models, sorted.

    Args:
      pattern: which names, as in a shell: "*" matches any text, "?" one character.

    Returns:
      Names for `create_model`.

    Example:
      >>> import tlvit
      >>> tlvit.list_models("lvvit*")
      ['lvvit', 'lvvit_l', 'lvvit_m', 'lvvit_s', 'lvvit_t']
    """
    return sorted(fnmatch.filter(MODELS, pattern))


def model_options(name: str) -> dict[str, Any]:
    """Option -> default of a model, as `create_model` takes them.

    Raises:
      ValueError: the name is unknown.
    """
    check_model_name(name)
    return option_defaults(MODELS[name])


def model_task(name: str) -> str:
    """What a model is trained for, "classification" or "segmentation".

    Raises:
      ValueError: the name is unknown.
    """
    check_model_name(name)
    model: Any = MODELS[name].func
    return model.task


def check_model_name(name: str) -> None:
    """Raises ValueError with the closest names if there is no such model."""
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(list_models())}."
        raise ValueError(f"Unknown model {name!r}; {hint}")


def published_crop_pct(name: str) -> float:
    """Fraction of the resized image that the published evaluation of this model keeps."""
    return CROP_PCT[max((prefix for prefix in CROP_PCT if name.startswith(prefix)), key=len)]


def published_image_size(name: str) -> int:
    """Image size of the published evaluation of this model, pixels."""
    return 384 if name.endswith("_384") else IMAGE_SIZE.get(name, 224)
