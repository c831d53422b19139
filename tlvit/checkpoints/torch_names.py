"""A model's arrays under their official PyTorch names: one naming rule, one layout rule, few exceptions.

A tensor's official name is the path of the array in the module, joined by dots, with the leaf renamed (kernel
and scale -> weight, mean and var -> running_mean and running_var). Kernels have their two channel axes last
here, and first and exchanged in PyTorch (a matrix is transposed, HWIO is OIHW); other arrays have one layout.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlvit.checkpoints.model_info import ModelInfo, default_image_size, default_preprocessing, image_size_pair
from tlvit.models.functional import functionalize, update
from tlvit.models.table import MODELS, list_models
from tlvit.ops.resize import resize_pos_embed
from tlvit.types import Array, PyTree

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

# Which models to compare a state dict with, by names it has: building all of them takes a minute.
FAMILIES = {
    "tokens_to_token.": ("t2t_",),
    "stages.": ("dm_nfnet_",),
    "s1.": ("regnety_",),
    "patch_embed.conv1.": ("lvvit",),
    "patch_embed.proj.": ("deit_", "vit"),
}


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of the tensors, by official name; `str()` of it is a table to print.

    Attributes:
      loaded: taken as they are.
      resized: position embeddings fitted to another grid.
      reinitialized: of the model, that kept their initial values.
      unexpected: of the file, that the model has no place for.
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...] = ()
    reinitialized: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [f"{'loaded':<15}{len(self.loaded):>5}"]
        for title, names in (
            ("resized", self.resized),
            ("reinitialized", self.reinitialized),
            ("unexpected", self.unexpected),
        ):
            more = f", and {len(names) - 6} more" if len(names) > 6 else ""
            rows.append(f"{title:<15}{len(names):>5}  {', '.join(names[:6])}{more}".rstrip())
        return "\n".join(rows)


def from_torch(
    model: nnx.Module,
    state_dict: Mapping[str, Any],
    *,
    allow: Sequence[str] | str = (),
    pos_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Fills a model from an official state dict (name -> numpy array or torch tensor, of any float type).

    Args:
      model: changed in place, and only if everything fits; one of `nnx.eval_shape` will do without `allow`.
      state_dict: the tensors.
      allow: beginnings of names (such as "head") that may be missing, of another shape, or without a place in
        the model: these keep their initial values. With "pos_embed" among them, position embeddings of
        another grid are resized (bicubic), or made anew where they are a fixed table.
      pos_grid: (h, w) of the state dict's position embeddings; a square if not given.

    Returns:
      The LoadReport.

    Raises:
      ValueError: missing, unexpected or misshapen tensors that are not allowed, named with their shapes; or
        position embeddings that cannot be resized.
    """
    allowed = (allow,) if isinstance(allow, str) else tuple(allow)
    may = lambda name: name.startswith(allowed) if allowed else False
    _, params, stats = functionalize(model)
    source = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    loaded, resized, kept, problems, arrays = [], [], [], [], {}
    for path, leaf in [*_leaves(params), *_leaves(stats)]:
        name, wanted = _official_name(path), _official_shape(path, leaf.shape)
        tensor = source.pop(name, None)
        found = None if tensor is None else tuple(tensor.shape)
        if found == wanted:
            arrays[path] = _from_official(path, as_float32(name, tensor))
            loaded.append(name)
        elif not may(name):
            problems.append(
                f"{name}: {'missing' if found is None else f'is {list(found)}'}, wanted {list(wanted)}"
            )
        elif name == "pos_embed" and found is not None:
            if path not in dict(
                _leaves(stats)
            ):  # a fixed table is there already, made for the model's own grid
                arrays[path] = _fit_pos_embed(model, as_float32(name, tensor), wanted, pos_grid)
            resized.append(name)
        else:
            kept.append(name)
    problems += [
        f"{name}: unexpected, {list(t.shape)}" for name, t in sorted(source.items()) if not may(name)
    ]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{len(problems)} tensors do not fit this {type(model).__name__}:\n  "
            + "\n  ".join(problems[:20])
            + more
        )
    fill = lambda path, leaf: jnp.asarray(arrays.pop(path), leaf.dtype) if path in arrays else leaf
    update(model, _map_with_path(fill, params), _map_with_path(fill, stats))
    return LoadReport(tuple(loaded), tuple(resized), tuple(kept), tuple(sorted(source)))


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """The model's arrays under their official names and in torch's layouts, float32; `num_batches_tracked`,
    which torch lists beside every BatchNorm and uses for nothing here, is int64 0."""
    _, params, stats = functionalize(model)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in [*_leaves(params), *_leaves(stats)]:
        array = _to_official(path, np.asarray(leaf))
        tensors[_official_name(path)] = np.require(array, np.float32, ["C", "W"])  # a scalar stays one
        if path[-1] == "var":
            tensors[".".join([*path[:-1], "num_batches_tracked"])] = np.zeros((), np.int64)
    return tensors


def identify(
    tensors: Mapping[str, np.ndarray],
    *,
    model: str | None = None,
    pos_grid: tuple[int, int] | None = None,
    patch_size: int = 16,
) -> ModelInfo:
    """What a state dict tells about its model: name, classes, image size, whether it has a token head.

    Args:
      tensors: official name -> array.
      model: its name, if known.
      pos_grid: (h, w) of its position embeddings where it is no square.
      patch_size: pixels a token, which with the position embeddings gives the image size.

    Raises:
      ValueError: no model has these tensors, or several have.
    """
    name = model or _guess_model(tensors)
    return ModelInfo(
        model=name,
        num_classes=_count_classes(tensors),
        image_size=_guess_image_size(tensors, name, pos_grid, patch_size),
        overrides=_extra_options(tensors, name),
        preprocessing=default_preprocessing(name),
    )


def official_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a model's tensors (concrete, or of `nnx.eval_shape`)."""
    _, params, stats = functionalize(model)
    return {_official_name(p): _official_shape(p, x.shape) for p, x in [*_leaves(params), *_leaves(stats)]}


def as_float32(name: str, tensor: Any) -> np.ndarray:
    """A numpy array or torch tensor (float64, float16, bfloat16, integers) as float32.

    Raises:
      ValueError: complex numbers, text, quantized or sparse tensors.
    """
    try:
        if hasattr(tensor, "detach"):  # torch's, which numpy cannot take as bfloat16
            tensor = tensor.detach().cpu().float().numpy()
        array = np.asarray(tensor)
        if array.dtype.kind in "cOSUM":
            raise TypeError(f"is of type {array.dtype}")
        return array.astype(np.float32, copy=False)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot become float32: {str(error).splitlines()[0]}") from error


def _guess_model(tensors: Mapping[str, np.ndarray]) -> str:
    """The name of the one model that has these tensors."""
    shapes = {
        k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked") and k != "pos_embed"
    }
    position = tensors["pos_embed"].shape if "pos_embed" in tensors else None
    families = tuple(n for prefix, n in FAMILIES.items() if any(k.startswith(prefix) for k in shapes))
    families = sum(families, ()) or ("",)
    has_token_head = any(k.startswith("aux_head.") for k in shapes)
    for options in ({}, {"token_head": True}) if has_token_head else ({},):
        fitting: dict[str, tuple[int, ...] | None] = {}
        for name in (n for n in list_models() if n.startswith(families) and _may_be(n, shapes)):
            with contextlib.suppress(TypeError):  # the model has no such option
                official = _abstract_shapes(name, _count_classes(tensors), **options)
                table = official.pop("pos_embed", None)
                if official == shapes:
                    fitting[name] = table
        # DeiT's models for 224 and 384 pixels differ in their position embeddings only.
        exact = [name for name, table in fitting.items() if table == position]
        for names in (fitting, exact):
            if len(names) == 1:
                return next(iter(names))
        if fitting:
            raise ValueError(f"These tensors fit {', '.join(fitting)}: say which with model=… (--model=…).")
    first = ", ".join(list(shapes)[:3])
    raise ValueError(
        f"No model has just these {len(shapes)} tensors ({first}, …): say which with model=… (--model=…)."
    )


def _may_be(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether width and depth fit, as far as the model table has them: cheaper than building the model."""
    options = MODELS[name].keywords
    blocks = {m[0] for k in shapes if (m := re.match(r"(blocks\.\d+|stages\.\d+\.\d+|s\d+\.b\d+)\.", k))}
    depth = sum(options["depths"]) if "depths" in options else options.get("depth")
    wrong_depth = isinstance(depth, int) and depth != len(blocks)
    return not wrong_depth and ("cls_token" not in shapes or options.get("dim") == shapes["cls_token"][-1])


def _abstract_shapes(name: str, num_classes: int, **options: Any) -> dict[str, tuple[int, ...]]:
    info = ModelInfo(name, num_classes, image_size_pair(default_image_size(name)), options)
    return official_shapes(nnx.eval_shape(info.build))


def _extra_options(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """A token head that the file has and the model by default has not."""
    if "aux_head.weight" not in tensors or "aux_head.weight" in _abstract_shapes(name, 1):
        return {}
    return {"token_head": True}


def _count_classes(tensors: Mapping[str, np.ndarray]) -> int:
    for name in ("head.weight", "head.fc.weight"):
        if name in tensors and tensors[name].ndim > 1:
            return tensors[name].shape[0]
    return 1000  # a file without its head: whether that is allowed is for the loading to say


def _guess_image_size(
    tensors: Mapping[str, np.ndarray], name: str, pos_grid: tuple[int, int] | None, patch_size: int
) -> tuple[int, int]:
    """From the number of position embeddings, where there are any."""
    size = image_size_pair(default_image_size(name))
    if pos_grid is not None:
        return patch_size * pos_grid[0], patch_size * pos_grid[1]
    if "pos_embed" not in tensors or tensors["pos_embed"].ndim != 3:
        return size
    tokens = tensors["pos_embed"].shape[1] - (2 if "dist_token" in tensors else 1)
    side = int(max(tokens, 0) ** 0.5)
    return (patch_size * side, patch_size * side) if side and side * side == tokens else size


def _fit_pos_embed(
    model: nnx.Module, table: np.ndarray, wanted: tuple[int, ...], old_grid: tuple[int, int] | None
) -> Array:
    grid = getattr(model, "grid", None)
    if grid is None or table.ndim != 3 or table.shape[-1] != wanted[-1]:
        raise ValueError(f"pos_embed: {list(table.shape)} cannot be resized to {list(wanted)}.")
    return resize_pos_embed(
        jnp.asarray(table), grid, num_prefix=wanted[1] - grid[0] * grid[1], old_grid=old_grid
    )


def _official_name(path: tuple[str, ...]) -> str:
    return ".".join([*path[:-1], LEAVES.get(path[-1], path[-1])])


def _official_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_official(path, np.broadcast_to(False, shape)).shape


def _to_official(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    n = array.ndim
    return array.transpose(n - 1, n - 2, *range(n - 2)) if path[-1] == "kernel" else array


def _from_official(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    return array.transpose(*range(2, array.ndim), 1, 0) if path[-1] == "kernel" else array


def _leaves(tree: PyTree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _map_with_path(function, tree: PyTree, path: tuple[str, ...] = ()) -> PyTree:
    if isinstance(tree, dict):
        return {k: _map_with_path(function, v, (*path, k)) for k, v in tree.items()}
    return function(path, tree)
