"""The model table: every name that `create_model` knows, and how it is built."""

import difflib
import functools
from typing import Any

from flax import nnx

from tlvit.models import deit, lvvit, nfnet, regnety, t2t_vit

FAMILIES = (
    (lvvit.LVViT, lvvit.VARIANTS),
    (deit.DeiT, deit.VARIANTS),
    (t2t_vit.T2TViT, t2t_vit.VARIANTS),
    (regnety.RegNetY, regnety.VARIANTS),
    (nfnet.NFNet, nfnet.VARIANTS),
)
MODELS = {
    name: functools.partial(model, **options)
    for model, variants in FAMILIES
    for name, options in variants.items()
}

# Fraction of the resized image that the published evaluations keep, by prefix of the model's name (the longest
# one counts): the papers' code for LV-ViT, T2T-ViT, DeiT and RegNetY, timm 0.4.5 for NFNet.
CROP_PCT = {
    "": 0.875,
    "vit": 0.9,
    "lvvit": 0.9,
    "lvvit_m": 1.0,
    "lvvit_l": 1.0,
    "t2t": 0.9,
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
}


def list_models() -> list[str]:
    """All model names, sorted."""
    return sorted(MODELS)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    **overrides: Any,
) -> nnx.Module:
    """Builds a model with freshly initialized parameters.

    Args:
      name: one of `list_models()`.
      num_classes: L.
      image_size: of the images it will see, an int or (height, width); if not given 224, or what the name
        says (deit_base_patch16_384).
      seed: of the initialization.
      **overrides: any option of the model class, such as drop_path=0.1 or dtype=jnp.bfloat16 (of the
        computation; parameters are float32).

    Returns:
      The module; call it with float32 images [B, H, W, 3], normalized, to get a ModelOutput.

    Raises:
      ValueError: an unknown name (close ones are named) or options that do not fit together.
      TypeError: an option that the model does not have.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(list_models())}."
        raise ValueError(f"Unknown model {name!r}; {hint}")
    if image_size is not None:
        overrides["image_size"] = tuple(image_size) if isinstance(image_size, list) else image_size
    return MODELS[name](num_classes=num_classes, rngs=nnx.Rngs(seed), **overrides)


def published_crop_pct(name: str) -> float:
    """Fraction of the resized image that the published evaluation of this model keeps."""
    return CROP_PCT[max((prefix for prefix in CROP_PCT if name.startswith(prefix)), key=len)]


def published_image_size(name: str) -> int:
    """Image size of the published evaluation of this model, pixels."""
    return 384 if name.endswith("_384") else IMAGE_SIZE.get(name, 224)
