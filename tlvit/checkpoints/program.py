"""Exports a model as a StableHLO program with its weights, which runs without tlvit and without Flax."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from tlvit.checkpoints import program_example
from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.trees import flatten, unflatten
from tlvit.files import write_text
from tlvit.models.functional import functionalize
from tlvit.models.table import model_task
from tlvit.ops.normalize import normalize
from tlvit.types import Array
from tlvit.version import __version__

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
USUAL_PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS, DESCRIPTION, EXAMPLE = "program.stablehlo", "weights.npz", "model.json", "example.py"
TOLERANCE = 0.01  # between the probabilities of an exported program and of the model


@dataclasses.dataclass(frozen=True)
class Inference:
    """What an exported program computes.

    Attributes:
      run: (weights, images uint8 [B, H, W, 3]) -> {"logits", "probabilities"}, both float32 [B, L]. The
        normalization of the images is a part of it.
      weights: name -> array. Names join the keys of `functionalize` with slashes, after "params" or "stats".
      info: the model.
    """

    run: Callable[[dict[str, Array], Array], dict[str, Array]]
    weights: dict[str, Array]
    info: ModelInfo


def inference(model: nnx.Module, info: ModelInfo) -> Inference:
    """The function that is exported, and its weights.

    Raises:
      ValueError: the model is no classifier.
    """
    if model_task(info.model) != "classification":
        raise ValueError(f"{info.model} is a segmentation model: only classifiers are exported as programs.")
    net, params, stats = functionalize(model)
    rule = info.preprocessing

    def run(weights: dict[str, Array], images: Array) -> dict[str, Array]:
        tree = unflatten(weights)
        normalized = normalize(images, rule.mean, rule.std)
        output, _ = net.apply(tree["params"], tree.get("stats", {}), normalized)
        return {"logits": output.logits, "probabilities": jax.nn.softmax(output.logits, axis=-1)}

    return Inference(run, flatten({"params": params, "stats": stats}), info)


def trace(what: Inference, platforms: Sequence[str]) -> export.Exported:
    """The program for any number of images.

    Raises:
      ValueError: an unknown platform.
    """
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise ValueError(f"Platforms are some of {', '.join(PLATFORMS)}, not {', '.join(unknown) or 'none'}.")
    (batch,) = export.symbolic_shape("b")
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in what.weights.items()}
    images = jax.ShapeDtypeStruct((batch, *what.info.image_size, 3), jnp.uint8)
    return export.export(jax.jit(what.run), platforms=tuple(platforms))(weights, images)


def export_stablehlo(
    model: nnx.Module, info: ModelInfo, folder: pathlib.Path, *, platforms: Sequence[str] = USUAL_PLATFORMS
) -> None:
    """Writes the program of a model, its weights, their description and an example.

    Args:
      model: a classifier.
      info: its ModelInfo.
      folder: is created. It gets program.stablehlo, weights.npz, model.json and example.py.
      platforms: that the program runs on, of PLATFORMS.

    Raises:
      ValueError: the model is no classifier or a platform is unknown.
      RuntimeError: the program does not compute what the model computes.
    """
    what = inference(model, info)
    program = trace(what, platforms).serialize()
    read = export.deserialize(bytearray(program))
    if {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()) in platforms:
        check_outputs(what, lambda images: read.call(what.weights, images))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAM).write_bytes(program)
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in what.weights.items()}
    np.savez(folder / WEIGHTS, **arrays)
    write_description(folder, info, {"platforms": list(platforms), "jax": jax.__version__})


def check_outputs(what: Inference, exported: Callable[[np.ndarray], Any]) -> None:
    """Compares an exported program with its model, on two images of noise.

    Raises:
      RuntimeError: a probability differs by more than TOLERANCE.
    """
    images = np.random.default_rng(0).integers(0, 256, (2, *what.info.image_size, 3)).astype(np.uint8)
    expected = np.asarray(jax.jit(what.run)(what.weights, images)["probabilities"], np.float32)
    found = np.asarray(exported(images)["probabilities"], np.float32)
    worst = float(np.abs(found - expected).max())
    if not worst <= TOLERANCE:
        raise RuntimeError(f"A probability of the exported program differs by {worst:.3g} from the model's.")


def write_description(folder: pathlib.Path, info: ModelInfo, more: dict[str, Any]) -> None:
    """Writes model.json (how images are prepared, what goes in and out, the class names) and example.py.

    Args:
      folder: of the exported program.
      info: the model.
      more: entries of model.json that only one kind of program has. The example opens a SavedModel if
        "signature" is one of them, and program.stablehlo otherwise.
    """
    rule = info.preprocessing
    record = {
        "model": info.model,
        "image_size": list(info.image_size),
        "crop_pct": rule.crop_pct,
        "interpolation": rule.interpolation,
        "input": "uint8 [b, height, width, 3], RGB; the normalization is a part of the program",
        "output": "logits and probabilities, float32 [b, classes]",
        "num_classes": info.num_classes,
        "class_names": list(info.class_names) if info.class_names else None,
        "tlvit": __version__,
        **more,
    }
    write_text(folder / DESCRIPTION, json.dumps(record, indent=2) + "\n")
    shutil.copyfile(program_example.__file__, folder / EXAMPLE)
