"""Opens tlvit's own checkpoints as models, with what using one takes: sizes, class names, preprocessing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from tlvit.models.table import create_model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Share of the resized image that the published evaluations keep, by the beginning of the model's name (the
# longest one counts): the papers' code for LV-ViT, T2T-ViT, DeiT and RegNetY, timm 0.4.5 for NFNet.
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

# Size that a model is evaluated at where its weights do not tell; all others: 224.
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


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input.

    Attributes:
      mean, std: of the colors, in [0, 1].
      crop_pct: the image is resized to cover image_size / crop_pct, then its center is cut out.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: str = "bicubic"


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What has to be known beside the arrays to build and use a model.

    Attributes:
      model: name, as in `list_models()`.
      num_classes: L.
      image_size: (height, width).
      overrides: further options of `create_model`, JSON values.
      class_names: one a class, or None where nobody knows them.
      preprocessing: of images.
    """

    model: str
    num_classes: int
    image_size: tuple[int, int]
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing = Preprocessing()

    def __post_init__(self):
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes.")

    def build(self, *, seed: int = 0) -> nnx.Module:
        """The model with fresh weights."""
        return create_model(
            self.model,
            num_classes=self.num_classes,
            image_size=self.image_size,
            seed=seed,
            **self.overrides,
        )

    def to_json(self) -> dict[str, Any]:
        """The dict that checkpoints keep; `from_json` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ModelInfo":
        """Reads `to_json`'s dict, in which all but the first three keys may be missing.

        Raises:
          ValueError: a key is missing.
        """
        missing = [k for k in ("model", "num_classes", "image_size") if k not in record]
        if missing:
            raise ValueError(
                f"The checkpoint does not say its {' nor its '.join(missing)}; it has {sorted(record)}."
            )
        name, size = record["model"], image_size_pair(record["image_size"])
        given = {
            k: tuple(v) if isinstance(v, list) else v for k, v in (record.get("preprocessing") or {}).items()
        }
        names = record.get("class_names")
        return cls(
            model=name,
            num_classes=int(record["num_classes"]),
            image_size=size,
            overrides=dict(record.get("overrides") or {}),
            class_names=None if names is None else tuple(names),
            preprocessing=dataclasses.replace(default_preprocessing(name), **given),
        )


def default_preprocessing(name: str) -> Preprocessing:
    """As the published evaluation of this model does it."""
    prefix = max((p for p in CROP_PCT if name.startswith(p)), key=len)
    return Preprocessing(crop_pct=CROP_PCT[prefix])


def default_image_size(name: str) -> int:
    """The size that the published evaluation of this model uses, pixels."""
    return 384 if name.endswith("_384") else IMAGE_SIZE.get(name, 224)


def image_size_pair(size: int | str | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) of 224, "224", "384x256" or a pair.

    Raises:
      ValueError: something else.
    """
    try:
        parts = size.lower().split("x") if isinstance(size, str) else size
        parts = [int(p) for p in (parts if isinstance(parts, list | tuple) else [parts])]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or min(parts) < 1:
        raise ValueError(f"A size is one number or HEIGHTxWIDTH, not {size!r}.")
    return parts[0], parts[-1]
