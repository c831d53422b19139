"""Classifies images with the exported program of this folder: python example.py photo.jpg …

It needs NumPy, Pillow, and JAX for a program.stablehlo or TensorFlow for a SavedModel.
"""

import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FOLDER = pathlib.Path(__file__).parent


def main(paths: list[str]) -> None:
    """Prints the most probable class of every image and its probability."""
    model = json.loads((FOLDER / "model.json").read_text())
    run = open_saved_model(model["signature"]) if "signature" in model else open_stablehlo()
    images = np.stack([read_image(path, model) for path in paths])
    probabilities = np.asarray(run(images)["probabilities"])
    names = model["class_names"] or [str(i) for i in range(model["num_classes"])]
    for path, row in zip(paths, probabilities, strict=True):
        print(f"{path}: {names[row.argmax()]} {row.max():.4f}")


def read_image(path: str, model: dict[str, Any]) -> np.ndarray:
    """The part of an image that the model sees, uint8 [H, W, 3]: resized to cover it, then center-cropped."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    size = (image.height, image.width)
    target = [math.floor(side / model["crop_pct"]) for side in model["image_size"]]
    zoom = max(t / s for t, s in zip(target, size, strict=True))
    scaled = [t if t / s >= zoom else math.floor(zoom * s + 1e-4) for t, s in zip(target, size, strict=True)]
    top, left = (round((s - side) / 2) for s, side in zip(scaled, model["image_size"], strict=True))
    height, width = model["image_size"]
    image = image.resize((scaled[1], scaled[0]), Image.Resampling[model["interpolation"].upper()])
    return np.asarray(image.crop((left, top, left + width, top + height)))


def open_stablehlo() -> Callable[[np.ndarray], Any]:
    """The program for JAX: images uint8 [B, H, W, 3] -> {"logits", "probabilities"}, float32 [B, classes]."""
    import jax.export

    program = jax.export.deserialize(bytearray((FOLDER / "program.stablehlo").read_bytes()))
    weights = dict(np.load(FOLDER / "weights.npz"))
    return lambda images: program.call(weights, images)


def open_saved_model(signature: str) -> Callable[[np.ndarray], Any]:
    """The program for TensorFlow: the same arguments and results as those of `open_stablehlo`."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(FOLDER))  # owns the weights: the function below keeps it
    return lambda images: loaded.signatures[signature](images=tf.constant(images))


if __name__ == "__main__":
    main(sys.argv[1:])
