"""Decides which arrays of a checkpoint a model takes, and reports what differs."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlvit.models.layers import Buffer
from tlvit.ops.resize import resize_pos_embed

MAX_LINES = 20  # misfits that an error message lists

# Arrays that a checkpoint may lack (`missing`), and the arrays of the checkpoint that they start from.
STARTS = (
    (r"(?:aux_head|head_dist)([./].+)", r"head\1"),
    (r"dist_token", "cls_token"),
)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was done with the arrays, by name. `str(report)` is a table to print.

    Attributes:
      loaded: taken unchanged.
      resized: position embeddings, resized or regenerated for another grid or for other prefix tokens.
      reinitialized: arrays of the model that keep their initial values.
      unexpected: arrays of the checkpoint that the model does not have.
      copied: arrays that the checkpoint lacks and that start as a copy of another one, such as
        "aux_head.weight from head.weight".

    Example:
      >>> report = tlvit.from_torch(model, state_dict, allow=("head", "pos_embed"))
      >>> print(report.reinitialized)
      ('head.weight', 'head.bias')
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...] = ()
    reinitialized: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [f"{'loaded':<15}{len(self.loaded):>5}"]
        titles = ("resized", *(["copied"] if self.copied else []), "reinitialized", "unexpected")
        for title in titles:
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
    missing: Sequence[str] | str = (),
    unexpected: Sequence[str] | str = (),
    pos_grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], LoadReport]:
    """Compares the arrays of a checkpoint with a model. Nothing is changed.

    Args:
      model: the model, whose grid the position embeddings are resized to.
      shapes: name -> shape of all arrays of the model.
      arrays: name -> array of the checkpoint, with the same naming.
      allow: prefixes of names that may be missing, unexpected or of another shape. In a segmentation model
        they may be names in its backbone. These keep their initial values, except "pos_embed": trained
        position embeddings are resized (bicubic), fixed ones stay as the model generated them. If only one
        side has a distillation token, its position is removed, or starts as that of the class token.
      missing: prefixes of names that the checkpoint may lack. Of these, aux_head and head_dist start as
        copies of the class head, and dist_token of cls_token; the others keep their initial values.
      unexpected: prefixes of names of the checkpoint that are left out.
      pos_grid: (h, w) of the checkpoint's position embeddings. Default: a square.

    Returns:
      (name -> array for the model, LoadReport).

    Raises:
      ValueError: arrays that do not fit and are not allowed to differ, with their shapes; or position
        embeddings that cannot be resized.
    """
    allowed, lacking = _prefixes(allow), _prefixes(missing)
    chosen, loaded, resized, copied, reinitialized, problems = {}, [], [], [], [], []
    for name, shape in shapes.items():
        array = arrays.get(name)
        problem = _misfit(model, name, array, shape, pos_grid)
        start = _start(name) if array is None and _has_prefix(name, lacking) else ""
        if not problem:
            chosen[name] = array
            loaded.append(name)
        elif start in arrays and tuple(arrays[start].shape) == shape:
            chosen[name] = jnp.array(arrays[start])  # a copy: a training step donates both
            copied.append(f"{name} from {start}")
        elif not _has_prefix(name, (*allowed, *lacking) if array is None else allowed):
            problems.append(f"{name}: {problem}")
        elif _bare(name) != "pos_embed" or array is None:
            reinitialized.append(name)
        elif isinstance(getattr(model, "backbone", model).pos_embed, Buffer):
            resized.append(name)
        elif array.ndim == 3 and array.shape[-1] == shape[-1]:
            resized.append(name)
            dist = name.removesuffix("pos_embed") + "dist_token"
            table, num_prefix = _align_prefix(model, array, shape, (dist in arrays) - (dist in shapes))
            chosen[name] = resize_pos_embed(table, model.grid, num_prefix=num_prefix, old_grid=pos_grid)
        else:
            problems.append(f"{name}: {list(array.shape)} cannot be resized to {list(shape)}")
    others = sorted(arrays.keys() - shapes.keys())
    problems += [
        f"{name}: unexpected, {list(arrays[name].shape)}"
        for name in others
        if not _has_prefix(name, (*allowed, *_prefixes(unexpected)))
    ]
    if problems:
        lines = problems[:MAX_LINES]
        if len(problems) > MAX_LINES:
            lines.append(f"and {len(problems) - MAX_LINES} more")
        what = f"{len(problems)} tensors do not fit this {type(model).__name__}"
        raise ValueError("\n  ".join([f"{what}:", *lines]))
    report = (loaded, resized, reinitialized, others, copied)
    return chosen, LoadReport(*map(tuple, report))


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


def resizable(arrays: Collection[str]) -> tuple[str, ...]:
    """What `allow` of `fit_arrays` needs so that the position embeddings of a checkpoint are resized.

    A checkpoint without any lacks a part of its model, so nothing is allowed then.

    Args:
      arrays: names of the checkpoint's arrays.
    """
    return ("pos_embed",) if any(_bare(name) == "pos_embed" for name in arrays) else ()


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


def _prefixes(names: Sequence[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _has_prefix(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether the name, or the name in the backbone of a segmentation model, has one of the prefixes."""
    return name.startswith(prefixes) or _bare(name).startswith(prefixes)


def _start(name: str) -> str:
    """The array that a missing one starts from (STARTS); empty if it keeps its initial values."""
    found = [match.expand(start) for pattern, start in STARTS if (match := re.fullmatch(pattern, name))]
    return found[0] if found else ""


def _align_prefix(
    model: nnx.Module, table: Any, shape: tuple[int, ...], surplus: int
) -> tuple[jax.Array, int]:
    """Gives a checkpoint's position embeddings the prefix tokens of the model.

    Args:
      model: the model, with its grid.
      table: [1, P' + N', D], of the checkpoint.
      shape: (1, P + N, D), of the model.
      surplus: 1 if only the checkpoint has a distillation token, -1 if only the model has one, else 0.

    Returns:
      ([1, P + N', D], P).
    """
    table = jnp.asarray(table)
    num_prefix = shape[1] - model.grid[0] * model.grid[1]
    if surplus > 0:
        table = jnp.delete(table, 1, axis=1)
    elif surplus < 0:
        table = jnp.concatenate([table[:, :1], table], axis=1)
    return table, num_prefix
