"""`ModelInfo`: everything, in addition to the arrays, that building and using a trained model depends on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from flax import nnx

from tlvit.models.options import check_image_size, check_num_classes, check_options
from tlvit.models.table import (
    MODELS,
    check_model_name,
    create_model,
    model_options,
    model_task,
    published_crop_pct,
)
from tlvit.models.vit import RULES
from tlvit.ops.normalize import IMAGENET_MEAN, IMAGENET_STD
from tlvit.records import build

# Keys of a record that are no field: the rule, the name of `options` in version 0.1, what a run records of
# itself, and what `native` adds.
OTHER_KEYS = ("inference_rule", "overrides", "run", "step", "weights")
MAX_SIDE = 65_535  # pixels, the limit of JPEG
WEIGHTS = ("auto", "ema", "raw")  # "auto": the weights that scored best in the run, else EMA, else raw

PUBLISHED_WINDOWS: dict[str, Any] = {"scale": (2048, 512), "window": 512, "stride": 341}  # of segmentation


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model.

    Attributes:
      mean, std: of the RGB channels, for pixel values in [0, 1]. std is above 0.
      crop_pct: in (0, 1]. The image is resized to cover image_size / crop_pct, then center-cropped.
      interpolation: of the resize, "bicubic" or "bilinear".
      scale: of segmentation models, in place of crop_pct: limits of the longer and the shorter side, pixels.
        The image is resized within them, bilinearly. Empty: not resized.
      window, stride: of segmentation models: side and distance of the sliding windows, pixels. A window of 0:
        the image as a whole.

    Raises:
      ValueError: a value is out of its range or not finite.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    scale: tuple[int, ...] = ()
    window: int = 0
    stride: int = 0

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(v) and 0 <= v <= 1 for v in values):
                raise ValueError(f"{name} must be three numbers for pixels in [0, 1], not {values}.")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {self.std}: images are divided by it.")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct}.")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be bicubic or bilinear, not {self.interpolation!r}.")
        if len(self.scale) not in (0, 2) or not all(0 < side <= MAX_SIDE for side in self.scale):
            raise ValueError(f"scale must be two numbers of pixels up to {MAX_SIDE}, not {self.scale}.")
        if not (self.window == 0 or 0 < self.stride <= self.window):
            raise ValueError(f"stride must be in 1..{self.window}, the window's side, not {self.stride}.")


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Describes a trained model. Checkpoints store it as JSON.

    Attributes:
      model: a name in `list_models()`.
      num_classes: L, the number of classes.
      image_size: (height, width) in pixels.
      options: further options of `create_model`, as JSON values.
      class_names: name of each class, or None if unknown.
      preprocessing: of images.
      best_weights: "raw" or "ema", whichever scored best in the run; None if unknown.

    Raises:
      ValueError: an unknown model or option, a value out of its range, another number of class names than
        num_classes, or best_weights is something else.

    Example:
      >>> info = tlvit.ModelInfo("lvvit_t", num_classes=10, image_size=(224, 224))
      >>> model = info.build()
    """

    model: str
    num_classes: int
    image_size: tuple[int, int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing = Preprocessing()
    best_weights: str | None = None

    def __post_init__(self) -> None:
        check_model_name(self.model)
        check_num_classes(self.num_classes)
        check_image_size(self.image_size)
        check_options(self.model, MODELS[self.model], self.options)
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes.")
        if self.best_weights not in (None, "raw", "ema"):
            raise ValueError(f'best_weights must be "raw", "ema" or None, not {self.best_weights!r}.')

    def build(self, seed: int = 0) -> nnx.Module:
        """Returns the model with freshly initialized weights."""
        return create_model(
            self.model, num_classes=self.num_classes, image_size=self.image_size, seed=seed, **self.options
        )

    @property
    def inference_rule(self) -> str:
        """How logits are computed: "class" token alone, plus the "max" or "mean" over the patch tokens."""
        return self._option("rule") if self._option("token_head") else "class"

    def to_json(self) -> dict[str, Any]:
        """Returns the dict that checkpoints store and `from_json` reads."""
        return {**dataclasses.asdict(self), "inference_rule": self.inference_rule}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str = "The checkpoint") -> "ModelInfo":
        """Reads the dict of `to_json`, also of version 0.1. Required are model, num_classes and image_size.

        Args:
          record: the dict.
          where: the file, for messages.

        Raises:
          ValueError: a required key is missing, a key is unknown, or a value has another type or range.
        """
        missing = [k for k in ("model", "num_classes", "image_size") if k not in record]
        if missing:
            raise ValueError(
                f"{where} does not record its {' or its '.join(missing)}; it has {sorted(record)}."
            )
        values = {"options": record.get("overrides"), "preprocessing": None, **record}
        values = {key: value for key, value in values.items() if key not in OTHER_KEYS}
        for key in ("options", "preprocessing"):
            values[key] = {} if values[key] is None else values[key]
        if isinstance(values["preprocessing"], Mapping):
            crop_pct = published_crop_pct(str(record["model"]))
            values["preprocessing"] = {"crop_pct": crop_pct, **values["preprocessing"]}
        if isinstance(record["image_size"], int):
            values["image_size"] = [record["image_size"]] * 2
        info, rule = build(cls, values, where), record.get("inference_rule")
        if rule in (None, info.inference_rule):
            return info
        if rule not in RULES:
            raise ValueError(f"{where}: inference_rule must be {' or '.join(RULES)}, not {rule!r}.")
        # The default of the model has changed since.
        return build(cls, {**values, "options": {**info.options, "rule": rule}}, where)

    def _option(self, name: str) -> Any:
        """The value of an option; None if the model does not have it."""
        return {**model_options(self.model), **self.options}.get(name)


def published_preprocessing(name: str) -> Preprocessing:
    """Returns the preprocessing of a model's published evaluation."""
    if model_task(name) == "segmentation":
        return Preprocessing(crop_pct=1.0, interpolation="bilinear", **PUBLISHED_WINDOWS)
    return Preprocessing(crop_pct=published_crop_pct(name))


def check_weights(weights: str) -> None:
    """Raises ValueError unless `weights` is one of WEIGHTS."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}.")
