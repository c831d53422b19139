"""Names and layouts of PyTorch: converts a model's arrays to and from an official state dict.

The official name of a tensor is the path of the array in the module, joined by dots, with the leaf renamed
(kernel and scale -> weight, mean and var -> running_mean and running_var). Kernels have their two channel
axes last in Flax, and first and exchanged in PyTorch: a matrix is transposed, HWIO becomes OIHW. Other arrays
have the same layout.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from tlvit.checkpoints.fit import LoadReport, fit_arrays
from tlvit.checkpoints.model_info import ModelInfo, published_preprocessing
from tlvit.checkpoints.trees import model_arrays, set_model_arrays
from tlvit.config import parse_image_size
from tlvit.models.table import MODELS, list_models, model_options, published_image_size
from tlvit.models.upernet import BACKBONES

__all__ = ["LoadReport", "as_float32", "from_torch", "identify", "official_shapes", "to_torch"]

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

# Models to compare a state dict with, by a prefix of its names: building all of them takes a minute.
FAMILIES = {
    "tokens_to_token.": ("t2t_",),
    "stages.": ("dm_nfnet_",),
    "s1.": ("regnety_",),
    "patch_embed.conv1.": ("lvvit",),
    "patch_embed.proj.": ("deit_", "vit"),
    "backbone.": ("upernet_lvvit",),
}

# The parts of names in the published order of LV-ViT, DeiT and UperNet. Parts that are not here come last.
ORDER = (
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    "backbone", "decode_head", "auxiliary_head",
    "cls_token", "pos_embed", "dist_token", "patch_embed", "blocks", "norm", "head", "head_dist", "aux_head",
    "gamma_1", "gamma_2", "norm1", "attn", "norm2", "mlp", "qkv", "fc1", "fc2",
    "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "proj", "conv", "bn",
    "conv_seg", "psp_modules", "bottleneck", "lateral_convs", "fpn_convs", "fpn_bottleneck", "convs",
    "conv_cat",
)  # fmt: skip


class UnknownModelError(ValueError):
    """A file without a record whose tensors are those of no model or of several models."""


def from_torch(
    model: nnx.Module,
    state_dict: Mapping[str, Any],
    *,
    allow: Sequence[str] | str = (),
    missing: Sequence[str] | str = (),
    pos_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Fills a model from an official state dict.

    Args:
      model: changed in place, and only if everything fits. Without `allow` it may be one of `nnx.eval_shape`.
      state_dict: official name -> NumPy array or torch tensor of any float type.
      allow: prefixes of names (such as "head") that may be missing, unexpected or of another shape. These
        keep their initial values. With "pos_embed" among them, position embeddings of another grid are
        resized (bicubic), or regenerated if they are fixed.
      missing: prefixes of names that the state dict may lack. Of these, aux_head and head_dist start as
        copies of the class head and dist_token of cls_token; the others keep their initial values.
      pos_grid: (h, w) of the state dict's position embeddings. Default: a square.

    Returns:
      The LoadReport.

    Raises:
      ValueError: tensors that do not fit and are not allowed to differ, with their shapes; or position
        embeddings that cannot be resized.

    Example:
      >>> model = tlvit.create_model("lvvit_s", num_classes=10)
      >>> report = tlvit.from_torch(model, state_dict, allow=("head", "aux_head"))
      >>> model = tlvit.create_model("t2t_vit_14", token_head=True)
      >>> report = tlvit.from_torch(model, state_dict, missing="aux_head")  # starts from the class head
    """
    own = model_arrays(model)
    paths = {_official_name(path): path for path in own}
    shapes = {name: _official_shape(path, own[path].shape) for name, path in paths.items()}
    tensors = {
        name: as_float32(name, tensor) if name in shapes else tensor
        for name, tensor in state_dict.items()
        if not name.endswith("num_batches_tracked")
    }
    chosen, report = fit_arrays(model, shapes, tensors, allow=allow, missing=missing, pos_grid=pos_grid)
    set_model_arrays(model, {paths[k]: _from_official(paths[k], tensor) for k, tensor in chosen.items()})
    return report


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the model's arrays as float32 with official names and layouts, in the order of `ORDER`.

    PyTorch has a `num_batches_tracked` for each BatchNorm, which inference does not use; it is int64 0.

    Example:
      >>> tlvit.to_torch(model)["head.weight"].shape
      (1000, 384)
    """
    tensors: dict[str, np.ndarray] = {}
    for path, array in model_arrays(model).items():
        name = _official_name(path)
        tensors[name] = np.require(_to_official(path, np.asarray(array)), np.float32, ["C", "W"])
        if name.endswith("running_var"):
            tensors[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return {name: tensors[name] for name in sorted(tensors, key=_position)}


def official_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns official name -> shape of a model's tensors, in the order of `ORDER`.

    The model may be one of `nnx.eval_shape`.
    """
    own = model_arrays(model)
    shapes = {_official_name(path): _official_shape(path, array.shape) for path, array in own.items()}
    return {name: shapes[name] for name in sorted(shapes, key=_position)}


def identify(
    tensors: Mapping[str, np.ndarray],
    *,
    model: str | None = None,
    pos_grid: tuple[int, int] | None = None,
    patch_size: int = 16,
) -> ModelInfo:
    """Finds out what a state dict tells about its model: name, classes, image size, presence of a token head.

    Args:
      tensors: official name -> array.
      model: name of the model. Default: the only model with these tensors.
      pos_grid: (h, w) of the position embeddings. Default: a square.
      patch_size: width and height of a patch in pixels.

    Raises:
      ValueError: no model or several models have these tensors.
    """
    name = model or _guess_model(tensors)
    return ModelInfo(
        model=name,
        num_classes=_count_classes(tensors),
        image_size=_guess_image_size(tensors, name, pos_grid, patch_size),
        options=_extra_options(tensors, name),
        preprocessing=published_preprocessing(name),
    )


def describe(tensors: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The model with these tensors; if it has sizes of its own, the families that it may be of, with which
    their models' names begin; empty if unknown."""
    try:
        return (_guess_model(tensors),)
    except UnknownModelError:
        found = (names for prefix, names in FAMILIES.items() if any(k.startswith(prefix) for k in tensors))
        return tuple(name.partition("_")[0] for name in next(found, ()))


def as_float32(name: str, tensor: Any) -> np.ndarray:
    """Converts a NumPy array or torch tensor (float64, float16, bfloat16, integers) to float32.

    Raises:
      ValueError: complex numbers, text, quantized or sparse tensors.
    """
    try:
        if hasattr(tensor, "detach"):  # a torch tensor; NumPy has no bfloat16
            if tensor.is_complex():
                raise TypeError(f"is of type {tensor.dtype}")
            tensor = tensor.detach().cpu().float().numpy()
        array = np.asarray(tensor)
        if array.dtype.kind in "cOSUM":
            raise TypeError(f"is of type {array.dtype}")
        return array.astype(np.float32, copy=False)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot become float32: {str(error).splitlines()[0]}") from error


def _guess_model(tensors: Mapping[str, np.ndarray]) -> str:
    """The name of the one model that has these tensors.

    Raises:
      UnknownModelError: no model or several models have them.
    """
    shapes, pos_embed = _without_pos_embed(
        {k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    )
    has_token_head = any(k.startswith("aux_head.") for k in shapes)
    default = _segmentation_options(tensors)
    for options in (default, {"token_head": True}) if has_token_head else (default,):
        fitting = _fitting_models(shapes, _count_classes(tensors), options)
        # DeiT models for 224 and 384 pixels differ in their position embeddings only.
        exact = [name for name, shape in fitting.items() if shape == pos_embed]
        for names in (list(fitting), exact):
            if len(names) == 1:
                return names[0]
        if fitting:
            raise UnknownModelError(
                f"These tensors fit {', '.join(fitting)}: say which with model=… (--model=…)."
            )
    first = ", ".join(list(shapes)[:3])
    raise UnknownModelError(
        f"No model has exactly these {len(shapes)} tensors ({first}, …): say which with model=… (--model=…). "
        "If it has sizes of its own, convert it once with its options (tlvit convert --option=depth=12)."
    )


def _fitting_models(
    shapes: Mapping[str, tuple[int, ...]], num_classes: int, options: Mapping[str, Any]
) -> dict[str, tuple[int, ...] | None]:
    """Model name -> shape of its position embeddings, of all models whose other tensors have these shapes."""
    families = [names for prefix, names in FAMILIES.items() if any(k.startswith(prefix) for k in shapes)]
    families = sum(families, ()) or ("",)
    fitting = {}
    for name in list_models():
        if name.startswith(families) and _may_fit(name, shapes):
            with contextlib.suppress(TypeError):  # the model has no such option
                official, pos_embed = _without_pos_embed(_published_shapes(name, num_classes, options))
                if official == shapes:
                    fitting[name] = pos_embed
    return fitting


def _may_fit(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether width and depth fit, as far as the model table has them: cheaper than building the model."""
    options = MODELS[name].keywords
    if "backbone" in options:
        options = BACKBONES[options["backbone"]].keywords
        shapes = {k.removeprefix("backbone."): shape for k, shape in shapes.items()}
    blocks = {m[0] for k in shapes if (m := re.match(r"(blocks\.\d+|stages\.\d+\.\d+|s\d+\.b\d+)\.", k))}
    depth = sum(options["depths"]) if "depths" in options else options.get("depth")
    wrong_depth = isinstance(depth, int) and depth != len(blocks)
    return not wrong_depth and ("cls_token" not in shapes or options.get("dim") == shapes["cls_token"][-1])


def _published_shapes(name: str, num_classes: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    info = ModelInfo(name, num_classes, parse_image_size(published_image_size(name)), dict(options))
    return official_shapes(nnx.eval_shape(info.build))


def _extra_options(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Options that the tensors need: a token head that is not the default, or those of UperNet's heads."""
    if name.startswith("upernet"):
        return _segmentation_options(tensors)
    default = model_options(name).get("token_head")  # None: the model cannot have a token head
    return {"token_head": True} if default is False and "aux_head.weight" in tensors else {}


def _segmentation_options(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The options that describe the heads of a segmentation model; none for other models."""
    if "decode_head.conv_seg.weight" not in tensors:
        return {}
    options: dict[str, Any] = {"channels": tensors["decode_head.conv_seg.weight"].shape[1]}
    if "decode_head.conv_cat.conv.weight" in tensors:
        options["head"] = "fcn"
    if "auxiliary_head.conv_seg.weight" not in tensors:
        options["auxiliary"] = False
    last = tensors.get("backbone.side_layer4.0.weight")
    if last is not None and last.shape[0] != model_options("upernet")["last_width"]:
        options["last_width"] = last.shape[0]
    return options


def _without_pos_embed(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...] | None]:
    """The shapes of the other tensors, and that of the position embeddings or None."""
    others = {k: shape for k, shape in shapes.items() if not k.endswith("pos_embed")}
    return others, next((shape for k, shape in shapes.items() if k.endswith("pos_embed")), None)


def _count_classes(tensors: Mapping[str, np.ndarray]) -> int:
    for name in ("head.weight", "head.fc.weight", "decode_head.conv_seg.weight"):
        if name in tensors and tensors[name].ndim > 1:
            return tensors[name].shape[0]
    return 1000  # without a head, loading decides whether the head may be missing


def _guess_image_size(
    tensors: Mapping[str, np.ndarray], name: str, pos_grid: tuple[int, int] | None, patch_size: int
) -> tuple[int, int]:
    """The image size that gives the number of position embeddings; the published size if there are none."""
    if pos_grid is not None:
        return patch_size * pos_grid[0], patch_size * pos_grid[1]
    prefix = "backbone." if "backbone.pos_embed" in tensors else ""
    pos_embed = tensors.get(f"{prefix}pos_embed")
    if pos_embed is not None and pos_embed.ndim == 3:
        num_prefix = 0 if f"{prefix}blocks.0.gamma_1" in tensors else 1  # DeiT III: positions of patches only
        tokens = pos_embed.shape[1] - num_prefix - (f"{prefix}dist_token" in tensors)
        side = math.isqrt(max(tokens, 0))
        if side and side * side == tokens:
            return patch_size * side, patch_size * side
    return parse_image_size(published_image_size(name))


def _official_name(path: str) -> str:
    *parents, leaf = path.split("/")
    return ".".join([*parents, LEAVES.get(leaf, leaf)])


def _position(name: str) -> list[tuple[int, str]]:
    """Sort key of an official name: numbers by value, other parts by `ORDER`."""
    rank = lambda part: int(part) if part.isdigit() else ORDER.index(part) if part in ORDER else len(ORDER)
    return [(rank(part), part) for part in name.split(".")]


def _official_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_official(path, np.broadcast_to(False, shape)).shape


def _to_official(path: str, array: np.ndarray) -> np.ndarray:
    n = array.ndim
    return array.transpose(n - 1, n - 2, *range(n - 2)) if _is_kernel(path) else array


def _from_official(path: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(*range(2, array.ndim), 1, 0) if _is_kernel(path) else array


def _is_kernel(path: str) -> bool:
    return path.split("/")[-1] == "kernel"
