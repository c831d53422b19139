"""Models of timm as annotators: their classifier is applied to every cell or patch token."""

import difflib
import hashlib
import os
import textwrap
from typing import Any

import numpy as np

from tlvit.checkpoints.model_info import Preprocessing
from tlvit.checkpoints.torch_files import read_weights


class TimmAnnotator:
    """A classifier of timm that scores the cells of images (a `DenseAnnotator`).

    The features of every cell of a convolutional network, or of every patch token of a transformer, go
    through the model's own head as if they were those of a whole image. A linear classifier on averaged
    features, as most convolutional networks have, then gives cells whose average is the logits of the image.
    Patch tokens were not trained for the classifier of a class token, so such transformers give weaker maps.

    The image size, mean, standard deviation and center crop are those of the model's `pretrained_cfg`. The
    model runs on the accelerator that torch finds, else on the CPU.

    Args:
      name: name of the model, with or without the tag of its weights, such as "resnet50.a1_in1k".
      weights: file of its weights, .pth or .safetensors. "": timm downloads the pretrained ones.
      image_size: (height, width). None: the model's own.

    Attributes:
      name: "timm:NAME".
      version: hash of the weights.
      num_classes: L, that of the weights.
      image_size: (height, width).
      class_names: WordNet ids for weights of ImageNet, else None.
      preprocessing: mean, std and crop_pct.
      geometry: "center" if the model was evaluated on a center crop, "full" if on the entire image.

    Raises:
      ImportError: timm is not installed.
      ValueError: there is no such model, or its weights cannot be downloaded or do not fit.
    """

    def __init__(self, name: str, weights: str | os.PathLike = "", image_size: tuple[int, int] | None = None):
        self._torch, timm = _import_timm()
        self.name = f"timm:{name}"
        self._model = _create(timm, name, os.fspath(weights), image_size).eval()
        config = timm.data.resolve_model_data_config(self._model)
        self.image_size = tuple(config["input_size"][1:]) if image_size is None else tuple(image_size)
        self.preprocessing = Preprocessing(
            mean=tuple(config["mean"]), std=tuple(config["std"]), crop_pct=min(config["crop_pct"], 1.0)
        )
        square = self.image_size[0] == self.image_size[1]
        self.geometry = "center" if square and config.get("crop_mode", "center") == "center" else "full"
        self.num_classes = int(self._model.num_classes)
        if self.num_classes < 2:
            raise ValueError(f"{self.name} has no classifier.")
        self.class_names = _class_names(timm, self._model)
        self.version = _hash(self._model)
        self.device = _device(self._torch)
        self._model.to(self.device)
        scale = lambda values: self._torch.tensor(values, device=self.device).reshape(1, 3, 1, 1)
        self._mean, self._std = scale(self.preprocessing.mean), scale(self.preprocessing.std)

    @property
    def crop_pct(self) -> float:
        """Fraction of the image that the model's own center crop keeps."""
        return self.preprocessing.crop_pct

    def dense_logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] -> float32 [B, h, w, L].

        Raises:
          ValueError: the features are no map and no sequence with a known grid.
        """
        with self._torch.inference_mode():
            pixels = self._torch.from_numpy(np.array(images)).to(
                self.device
            )  # torch warns of arrays that are read-only
            pixels = pixels.permute(0, 3, 1, 2).float() / 255
            features = self._model.forward_features((pixels - self._mean) / self._std)
            cells, grid = self._cells(features)
            logits = self._model.forward_head(cells)
            logits = logits[0] if isinstance(logits, tuple) else logits
            return logits.float().reshape(len(images), *grid, -1).cpu().numpy()

    def _cells(self, features: Any) -> tuple[Any, tuple[int, int]]:
        """Every cell as the features of an image of its own [B * h * w, …], and the grid (h, w)."""
        width = self._model.num_features
        shape = tuple(getattr(features, "shape", ()))
        if len(shape) == 4 and shape[1] == width:  # [B, C, h, w]
            cells = features.permute(0, 2, 3, 1).reshape(-1, width, 1, 1)
            return cells, (shape[2], shape[3])
        if len(shape) == 4 and shape[3] == width:  # [B, h, w, C]
            return features.reshape(-1, 1, 1, width), (shape[1], shape[2])
        if len(shape) == 3 and shape[2] == width:  # [B, P + N, C]
            grid = self._token_grid(shape[1])
            prefix = shape[1] - grid[0] * grid[1]
            patches = features[:, prefix:].reshape(-1, 1, width)
            # Heads take the first tokens or the mean of the others: all of them are this one.
            return patches.expand(-1, prefix + 1, -1), grid
        raise ValueError(
            f"{self.name} has features of shape {list(shape) or type(features).__name__}: neither a map of "
            f"{width} channels nor tokens of this width, so its classifier cannot be applied to cells."
        )

    def _token_grid(self, tokens: int) -> tuple[int, int]:
        """(h, w) of the patch tokens, without the class token and other prefix tokens."""
        embed = getattr(self._model, "patch_embed", None)
        grid = tuple(getattr(embed, "grid_size", None) or ())
        prefix = getattr(self._model, "num_prefix_tokens", None)
        if (
            len(grid) == 2
            and 0 <= tokens - grid[0] * grid[1] <= 16
            and prefix
            in (
                None,
                tokens - grid[0] * grid[1],
            )
        ):
            return grid
        # The number of patches that has the aspect ratio of the image.
        for count in range(tokens, max(tokens - 17, 0), -1):
            ratio = self.image_size[1] / self.image_size[0]
            height = round((count / ratio) ** 0.5)
            fits = height and count % height == 0 and abs(count / height / height / ratio - 1) < 1e-6
            if fits and prefix in (None, tokens - count):
                return height, count // height
        raise ValueError(f"{self.name} has {tokens} tokens for an image, in no grid that is known.")


def _import_timm() -> tuple[Any, Any]:
    try:
        import timm
        import torch
    except ImportError as error:
        raise ImportError(f"An annotator of timm needs timm: pip install tlvit[timm] ({error}).") from None
    except RuntimeError as error:  # torchvision for another build of torch
        raise ImportError(
            f"timm cannot be imported: {str(error).partition(chr(10))[0]}. torch and torchvision are of "
            "different builds: install both for the same CUDA, or both for CPUs."
        ) from error
    return torch, timm


def _create(timm: Any, name: str, weights: str, image_size: tuple[int, int] | None) -> Any:
    """The model with its weights."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them."
        raise ValueError(f"timm has no model {base!r}; {hint}")
    options: dict[str, Any] = {}
    try:
        default = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        known = ", ".join(timm.list_pretrained(f"{base}.*"))
        raise ValueError(f"timm has no weights {name!r}; it has {known or 'none for this model'}.") from error
    config = {} if default is None else default.to_dict()
    own_size = tuple(config.get("input_size", (3, 0, 0))[1:])
    if image_size is not None and tuple(image_size) != own_size and config.get("fixed_input_size"):
        options["img_size"] = tuple(image_size)
    if weights:
        tensors = read_weights(weights).tensors
        options |= _from_file(tensors, config, weights)
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        first, _, others = str(error).partition("\n")
        line = textwrap.shorten(others.strip().partition("\n")[0] or first, 160, placeholder=" …").rstrip(".")
        if weights:
            raise ValueError(f"{weights} does not fit timm's {name}: {line}.") from error
        raise ValueError(
            f"timm cannot make {name} with its pretrained weights: {type(error).__name__}: {line}. "
            f"Without a network, download the weights elsewhere and give the file: timm:{name}:FILE."
        ) from error


def _from_file(tensors: dict[str, np.ndarray], config: dict[str, Any], path: str) -> dict[str, Any]:
    """The options of timm.create_model for tensors of a file, as many classes as it has."""
    import torch

    classifier = config.get("classifier") or ""
    classifier = classifier[0] if isinstance(classifier, tuple | list) else classifier
    kernel = tensors.get(f"{classifier}.weight")
    if kernel is None:
        raise ValueError(f"{path} has no tensor {classifier}.weight, the classifier of the model.")
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    overlay = {"state_dict": state, "num_classes": len(kernel)}
    return {"pretrained_cfg_overlay": overlay, "num_classes": len(kernel)}


def _class_names(timm: Any, model: Any) -> tuple[str, ...] | None:
    """The WordNet ids of the classes of weights for ImageNet; None for others."""
    try:
        subset = timm.data.infer_imagenet_subset(model)
        names = timm.data.ImageNetInfo(subset).label_names() if subset else None
    except (AttributeError, ValueError, OSError):
        return None
    return tuple(names) if names and len(names) == model.num_classes else None


def _device(torch: Any) -> str:
    """The accelerator that torch finds, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def _hash(model: Any) -> str:
    """A hash of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
