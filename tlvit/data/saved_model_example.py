"""Classifies images with the SavedModel of this folder: python example.py photo.jpg …

It needs TensorFlow, NumPy and Pillow.
"""

import json
import math
import pathlib
import sys

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

FOLDER = pathlib.Path(__file__).parent


def read_image(path: str, model: dict) -> np.ndarray:
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


def main(paths: list[str]) -> None:
    """Prints the most probable class of every image and its probability."""
    model = json.loads((FOLDER / "model.json").read_text())
    loaded = tf.saved_model.load(str(FOLDER))  # owns the weights: keep it while the signature is used
    run = loaded.signatures[model["signature"]]
    images = np.stack([read_image(path, model) for path in paths])
    probabilities = run(images=tf.constant(images))["probabilities"].numpy()
    names = model["class_names"] or [str(i) for i in range(model["num_classes"])]
    for path, row in zip(paths, probabilities, strict=True):
        print(f"{path}: {names[row.argmax()]} {row.max():.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
