"""`ModelInfo`: everything, in addition to the arrays, that building and using a trained model depends on."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal

from flax import nnx

from tlvit.config import parse_image_size
from tlvit.models.table import MODELS, create_model, published_crop_pct
from tlvit.ops.normalize import IMAGENET_MEAN, IMAGENET_STD

WEIGHTS = ("auto", "ema", "raw")  # "auto": the weights that scored best in the run, else EMA, else raw


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model.

    Attributes:
      mean, std: of the RGB channels, for pixel values in [0, 1].
      crop_pct: in (0, 1]. The image is resized to cover image_size / crop_pct, then center-cropped.
      interpolation: of the resize, "bicubic" or "bilinear".
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


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
      ValueError: the number of class names is not num_classes, or best_weights is something else.

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
    def from_json(cls, record: Mapping[str, Any]) -> "ModelInfo":
        """Reads the dict of `to_json`, also of version 0.1. Required are model, num_classes and image_size.

        Raises:
          ValueError: a required key is missing.
        """
        missing = [k for k in ("model", "num_classes", "image_size") if k not in record]
        if missing:
            raise ValueError(
                f"The checkpoint does not record its {' or its '.join(missing)}; it has {sorted(record)}."
            )
        names, saved = record.get("class_names"), record.get("preprocessing") or {}
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        info = cls(
            model=record["model"],
            num_classes=int(record["num_classes"]),
            image_size=parse_image_size(record["image_size"]),
            options=dict(record.get("options") or record.get("overrides") or {}),  # overrides: version 0.1
            class_names=None if names is None else tuple(names),
            preprocessing=dataclasses.replace(published_preprocessing(record["model"]), **stored),
            best_weights=record.get("best_weights"),
        )
        rule = record.get("inference_rule")
        if rule and info.model in MODELS and rule != info.inference_rule:
            info.options["rule"] = rule  # the default of the model has changed since
        return info

    def _option(self, name: str) -> Any:
        """The value of an option of the model class; None if the class does not have it."""
        build = MODELS[self.model]
        parameter = inspect.signature(build.func.__init__).parameters.get(name)
        default = parameter.default if parameter else None
        return self.options.get(name, build.keywords.get(name, default))


def published_preprocessing(name: str) -> Preprocessing:
    """Returns the preprocessing of a model's published evaluation."""
    return Preprocessing(crop_pct=published_crop_pct(name))


def check_weights(weights: str) -> None:
    """Raises ValueError unless `weights` is one of WEIGHTS."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}.")
