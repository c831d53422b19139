"""Decides which arrays of a checkpoint a model takes, and reports what differs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlvit.models.layers import Buffer
from tlvit.ops.resize import resize_pos_embed

MAX_LINES = 20  # misfits that an error message lists


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was done with the arrays, by name. `str(report)` is a table to print.

    Attributes:
      loaded: taken unchanged.
      resized: position embeddings, resized or regenerated for another grid.
      reinitialized: arrays of the model that keep their initial values.
      unexpected: arrays of the checkpoint that the model does not have.

    Example:
      >>> report = tlvit.from_torch(model, state_dict, allow=("head", "pos_embed"))
      >>> print(report.reinitialized)
      ('head.weight', 'head.bias')
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...] = ()
    reinitialized: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [f"{'loaded':<15}{len(self.loaded):>5}"]
        for title in ("resized", "reinitialized", "unexpected"):
            names = getattr(self, title)
            more = f", and {len(names) - 6} more" if len(names) > 6 else ""
            rows.append(f"{title:<15}{len(names):>5}  {', '.join(names[:6])}{more}".rstrip())
        return "\n".join(rows)


def fit_arrays(
    model: nnx.Module,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, Any],
    *,
    allow: Sequence[str] | str = (),
    pos_grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], LoadReport]:
    """Compares the arrays of a checkpoint with a model. Nothing is changed.

    Args:
      model: the model, whose grid the position embeddings are resized to.
      shapes: name -> shape of all arrays of the model.
      arrays: name -> array of the checkpoint, with the same naming.
      allow: prefixes of names that may be missing, unexpected or of another shape. In a segmentation model
        they may be names in its backbone. These keep their initial values, except "pos_embed": trained
        position embeddings are resized (bicubic), fixed ones stay as the model generated them.
      pos_grid: (h, w) of the checkpoint's position embeddings. Default: a square.

    Returns:
      (name -> array for the model, LoadReport).

    Raises:
      ValueError: arrays that do not fit and are not allowed to differ, with their shapes; or position
        embeddings that cannot be resized.
    """
    allowed = (allow,) if isinstance(allow, str) else tuple(allow)
    chosen, loaded, resized, reinitialized, problems = {}, [], [], [], []
    for name, shape in shapes.items():
        array = arrays.get(name)
        problem = _misfit(model, name, array, shape, pos_grid)
        if not problem:
            chosen[name] = array
            loaded.append(name)
        elif not name.startswith(allowed) and not _bare(name).startswith(allowed):
            problems.append(f"{name}: {problem}")
        elif _bare(name) != "pos_embed" or array is None:
            reinitialized.append(name)
        elif isinstance(getattr(model, "backbone", model).pos_embed, Buffer):
            resized.append(name)
        elif array.ndim == 3 and array.shape[-1] == shape[-1]:
            resized.append(name)
            chosen[name] = _resize_pos_embed(model, array, shape, pos_grid)
        else:
            problems.append(f"{name}: {list(array.shape)} cannot be resized to {list(shape)}")
    unexpected = sorted(arrays.keys() - shapes.keys())
    problems += [
        f"{name}: unexpected, {list(arrays[name].shape)}"
        for name in unexpected
        if not name.startswith(allowed) and not _bare(name).startswith(allowed)
    ]
    if problems:
        lines = problems[:MAX_LINES]
        if len(problems) > MAX_LINES:
            lines.append(f"and {len(problems) - MAX_LINES} more")
        what = f"{len(problems)} tensors do not fit this {type(model).__name__}"
        raise ValueError("\n  ".join([f"{what}:", *lines]))
    return chosen, LoadReport(tuple(loaded), tuple(resized), tuple(reinitialized), tuple(unexpected))


def check_finite(arrays: Mapping[str, Any], what: str) -> None:
    """Checks the values of weights. Every opened checkpoint passes here.

    Args:
      arrays: name -> array.
      what: the checkpoint, for the message.

    Raises:
      ValueError: says how many values of which arrays are NaN or infinite.
    """
    found = []
    for name, array in arrays.items():
        values = np.asarray(array)
        finite = np.isfinite(values)
        if not finite.all():
            found.append(f"{values.size - finite.sum():,} of {values.size:,} values of {name}")
    if found:
        more = f", and values of {len(found) - 3} other tensors" if len(found) > 3 else ""
        raise ValueError(
            f"{what} is not usable: {', '.join(found[:3])}{more} are NaN or infinite. Its training diverged "
            "or the file is damaged. Use an earlier checkpoint."
        )


def check_same_shapes(
    wanted: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Compares the arrays of a run with those of one of its checkpoints, named `what`.

    Raises:
      ValueError: arrays are missing, unexpected or of another shape; the first five are listed.
    """
    differing = [k for k in sorted({*wanted, *saved}) if wanted.get(k) != saved.get(k)]
    if differing:
        lines = [
            f"{k}: saved {saved.get(k, 'nothing')}, this run {wanted.get(k, 'nothing')}"
            for k in differing[:5]
        ]
        problem = f"{what} belongs to another model or optimizer, {len(differing)} arrays differ:"
        raise ValueError("\n  ".join([problem, *lines]))


def _misfit(
    model: nnx.Module, name: str, array: Any, shape: tuple[int, ...], pos_grid: tuple[int, int] | None
) -> str:
    """What is wrong with an array of the checkpoint; empty if it fits."""
    if array is None:
        return f"missing, wanted {list(shape)}"
    if tuple(array.shape) != shape:
        return f"is {list(array.shape)}, wanted {list(shape)}"
    if _bare(name) == "pos_embed" and pos_grid is not None and tuple(pos_grid) != tuple(model.grid):
        return f"is for {pos_grid[0]}x{pos_grid[1]} tokens, wanted {model.grid[0]}x{model.grid[1]}"
    return ""


def _bare(name: str) -> str:
    """The name of an array of a segmentation model's backbone, without its prefix."""
    return name.removeprefix("backbone.").removeprefix("backbone/")


def _resize_pos_embed(
    model: nnx.Module, table: Any, shape: tuple[int, ...], old_grid: tuple[int, int] | None
) -> Any:
    grid = model.grid
    num_prefix = shape[1] - grid[0] * grid[1]
    return resize_pos_embed(jnp.asarray(table), grid, num_prefix=num_prefix, old_grid=old_grid)
