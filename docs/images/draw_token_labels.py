"""Draws token_labels.png, the picture of the README, with an annotator of the recipe configs/digits.py.

python docs/images/draw_token_labels.py /tmp/demo/annotator docs/images/token_labels.png

The docstring of the recipe has the commands that train this annotator.
"""

import sys

import jax
import matplotlib
import numpy as np
from PIL import Image

import tlvit
from tlvit.data.sources import digit_scenes
from tlvit.ops.normalize import normalize

SCENE = 12  # index in the test split
CROP = (0.0, 0.3, 0.7, 0.7)  # top, left, height, width, fractions of the scene
GRID = (6, 6)  # tokens of the student


def main(checkpoint: str, path: str) -> None:
    """Draws the scene, its score map, a crop, and the token targets of the crop."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    scene = digit_scenes.make_scenes("test", SCENE + 1).image[SCENE]
    model, info = tlvit.load(checkpoint)
    images = normalize(scene[None], info.preprocessing.mean, info.preprocessing.std)
    logits = jax.jit(model.dense_logits)(images)[0]
    top, left, height, width = CROP
    maps = tlvit.ScoreMaps(
        value=np.moveaxis(np.asarray(logits, np.float16), -1, 0)[None],
        index=np.broadcast_to(np.arange(10)[:, None, None], (1, 10, *logits.shape[:2])).astype(np.uint16),
    )
    geometry = np.array([[[width, 0, left], [0, height, top]]], np.float32)
    targets = tlvit.make_targets(
        maps, np.zeros(1, np.int32), geometry, grid=GRID, num_classes=10, smoothing=0.0
    )
    side = scene.shape[0]
    box = [round(v * side) for v in (left, top, left + width, top + height)]
    crop = np.asarray(Image.fromarray(scene).resize((side, side), Image.Resampling.BICUBIC, box=box))

    figure, axes = pyplot.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
    draw(axes[0], "image", scene)
    draw(axes[1], "score map (annotator, once)", scene, np.asarray(jax.nn.softmax(logits)))
    draw(axes[2], "crop", crop)
    draw(axes[3], "token targets of the crop", crop, np.asarray(targets.tokens[0]).reshape(*GRID, 10))
    for axis in axes[:2]:
        axis.add_patch(
            pyplot.Rectangle(
                (box[0] - 0.5, box[1] - 0.5), box[2] - box[0], box[3] - box[1], fill=False, ec="white", lw=2
            )
        )
    figure.savefig(path, dpi=110)


def draw(axis, title: str, image: np.ndarray, probability: np.ndarray | None = None) -> None:
    """Shows an image; with probabilities [h, w, L], the most probable class of each cell over it."""
    from matplotlib import colormaps

    side = image.shape[0]
    axis.set_title(title, fontsize=11)
    axis.axis("off")
    axis.imshow(image if probability is None else image.mean(-1), cmap="gray", vmin=-60, vmax=320)
    if probability is None:
        return
    best, chance = probability.argmax(-1), 1 / probability.shape[-1]
    strength = np.clip((probability.max(-1) - chance) / (1 - chance), 0, 1)
    paint = np.concatenate([colormaps["tab10"](best)[..., :3], 0.75 * strength[..., None]], axis=-1)
    axis.imshow(paint, extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="nearest")
    h, w = best.shape
    for y, x in zip(*np.nonzero(strength > 0.35), strict=True):
        at = ((x + 0.5) * side / w - 0.5, (y + 0.5) * side / h - 0.5)
        style = {"ha": "center", "va": "center", "color": "white", "fontweight": "bold"}
        axis.text(*at, str(best[y, x]), fontsize=70 / max(h, w), **style)


if __name__ == "__main__":
    main(*sys.argv[1:])
