"""Exports a model as a TensorFlow SavedModel, whose signature calls the StableHLO program of the model."""

import pathlib
import re
from typing import Any

import numpy as np
import tensorflow as tf
from flax import nnx
from jax import export
from jaxlib.mlir.dialects import stablehlo
from tensorflow.compiler.tf2xla.python import xla as tfxla

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.checkpoints.program import USUAL_PLATFORMS, check_outputs, inference, trace, write_description

SIGNATURE = "serving_default"
# The format of StableHLO that is written. TensorFlow reads old formats, but not those of a newer JAX.
STABLEHLO = "1.0.0"
# An operation that JAX writes together with its definition, such as the error function of GELU. TensorFlow
# does not find the shapes in the definition unless it is called as a function.
COMPOSITE = re.compile(
    r'stablehlo\.composite "[\w.]+" (?P<inputs>%[\w#]+(?:, %[\w#]+)*) '
    r"\{decomposition = (?P<function>@[\w.]+)(?:, version = \d+ : i32)?\}"
)


def export_saved_model(
    model: nnx.Module, info: ModelInfo, folder: pathlib.Path, *, platforms: tuple[str, ...] = USUAL_PLATFORMS
) -> None:
    """Writes a SavedModel for any number of images, with a description and an example.

    Args:
      model: a classifier.
      info: its ModelInfo.
      folder: is created. It gets the files of a SavedModel, model.json and example.py.
      platforms: that the program runs on, of `tlvit.checkpoints.program.PLATFORMS`.

    Raises:
      ValueError: the model is no classifier, a platform is unknown, or TensorFlow cannot run the program.
      RuntimeError: the SavedModel does not compute what the model computes.
    """
    what = inference(model, info)
    module = tf.Module()
    # In the order in which the program takes them, that of the keys of a dict in JAX.
    module.weights = [tf.Variable(np.asarray(x), name=name) for name, x in sorted(what.weights.items())]
    call = _caller(trace(what, platforms), info.num_classes)
    images = tf.TensorSpec([None, *info.image_size, 3], tf.uint8, name="images")
    module.run = tf.function(lambda images: call([*module.weights, images]), [images], autograph=False)
    tf.saved_model.save(module, str(folder), signatures={SIGNATURE: module.run})
    read = tf.saved_model.load(str(folder)).signatures[SIGNATURE]
    if "cpu" in platforms:  # TensorFlow does not see accelerators in tlvit
        check_outputs(what, lambda images: read(tf.constant(images)))
    more = {"platforms": list(platforms), "tensorflow": tf.__version__, "signature": SIGNATURE}
    write_description(folder, info, more)


def _caller(program: export.Exported, num_classes: int) -> Any:
    """Turns a program into a function of TensorFlow: [weights, …, images] -> {"logits", "probabilities"}."""
    text = COMPOSITE.sub(r"func.call \g<function>(\g<inputs>)", program.mlir_module())
    if "stablehlo.composite" in text:
        raise ValueError("TensorFlow cannot run a program with an operation that this JAX writes.")
    version = program.calling_convention_version
    if version > tfxla.call_module_maximum_supported_version():
        raise ValueError(f"TensorFlow {tf.__version__} is too old for programs of this JAX.")
    module = stablehlo.serialize_portable_artifact_str(text, STABLEHLO)

    def call(arguments: list[Any]) -> dict[str, tf.Tensor]:
        logits, probabilities = tfxla.call_module(
            tuple(arguments[i] for i in program.module_kept_var_idx),
            version=version,
            Tout=(tf.float32, tf.float32),
            Sout=((None, num_classes), (None, num_classes)),
            platforms=tuple(platform.upper() for platform in program.platforms),
            module=module,
            has_token_input_output=False,
            function_list=[],
        )
        return {"logits": logits, "probabilities": probabilities}

    return call
