"""Scenes of real handwritten digits, made locally from scikit-learn's `load_digits`: the data of the demo.

One large digit gives the class; smaller digits of other classes stand around it, so that *where* a model
looks decides what it sees. Scenes need numpy and scikit-learn only; `prepare` writes them as a TFDS data set.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow_datasets as tfds  # loads TensorFlow itself only when a data set is written or read

NUM_CLASSES = 10
TEST_SHARE = 0.3  # of the 1,797 digits; the split never depends on a scene's seed
SPLIT_SEED = 20210422
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes and what is true of them.

    Attributes:
      image: uint8 [n, S, S, 3].
      label: int32 [n], the class of the large digit, 0-9.
      box: float32 [n, 4], the ink of the large digit as (y0, x0, y1, x1), relative to the image.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray


def make_scenes(
    split: Literal["train", "test"],
    count: int,
    *,
    seed: int = 0,
    size: int = 48,
    digit_scale: tuple[float, float] = (0.5, 0.7),
    distractors: tuple[int, int] = (2, 3),
    distractor_scale: tuple[float, float] = (0.25, 0.34),
    contrast: float = 0.35,
    texture: float = 0.12,
    noise: float = 0.02,
) -> Scenes:
    """Draw `count` scenes; scene i depends on (seed, split, i) and the scene's own options only.

    Args:
      split: "train" or "test": no digit of one is ever in a scene of the other.
      count: number of scenes n.
      seed: seed of the drawing; which digits belong to which split is fixed.
      size: side S of the square scenes, pixels.
      digit_scale: smallest and largest height of the class digit, share of S.
      distractors: smallest and largest number of smaller digits, all of other classes than the label.
      distractor_scale: their smallest and largest height, share of S.
      contrast: least difference in brightness between a digit and the background's mean, 0-0.5.
      texture: strength of the background's gradient and cloudy texture, brightness 0-1.
      noise: standard deviation of the pixel noise, brightness 0-1.

    Returns:
      Scenes of n images.

    Raises:
      ValueError: an unknown split, a negative count, or options out of their range.
    """
    check_options(split, count, seed, size, digit_scale, distractors, distractor_scale, contrast)
    digits, labels = load_digit_images(split)
    images = np.empty((count, size, size, 3), np.uint8)
    scene_labels = np.empty(count, np.int32)
    boxes = np.empty((count, 4), np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), i])
        chosen = choose_digits(rng, labels, int(rng.integers(distractors[0], distractors[1] + 1)))
        image = draw_background(rng, size, contrast, texture)
        mean = image.mean(axis=(0, 1))
        taken = np.zeros((size, size), bool)
        for k, index in enumerate(chosen):
            scale = digit_scale if k == 0 else distractor_scale
            ink = render_digit(rng, digits[index], max(4, round(size * rng.uniform(*scale))))
            alpha = place(rng, ink, taken)
            taken |= alpha > 0.1
            alpha3 = alpha[:, :, None]
            image = image * (1 - alpha3) + ink_color(rng, mean, contrast)[None, None] * alpha3
            if k == 0:
                boxes[i] = ink_box(alpha)
        image += rng.normal(0, noise, image.shape)
        images[i] = np.clip(np.rint(image * 255), 0, 255)
        scene_labels[i] = labels[chosen[0]]
    return Scenes(image=images, label=scene_labels, box=boxes)


@dataclasses.dataclass(kw_only=True)
class DigitScenesConfig(tfds.core.BuilderConfig):
    """What the data are made of; every field is part of the data set's name (see `prepare`)."""

    num_train: int = 2000
    num_test: int = 1500
    seed: int = 0
    scene: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of make_scenes


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """The TFDS data set `digit_scenes`: image, label, file_name (a unique key) and box of the class digit."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [DigitScenesConfig(name="default", description="2,000 and 1,500 scenes")]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.scene.get("size", 48)
        return tfds.core.DatasetInfo(
            builder=self,
            description="One large handwritten digit among smaller ones of other classes.",
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                    "file_name": tfds.features.Text(),
                    "box": tfds.features.BBoxFeature(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.num_train),
            "test": self._generate_examples("test", config.num_test),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
        scenes = make_scenes(split, count, seed=self.builder_config.seed, **self.builder_config.scene)
        for i in range(count):
            name = f"{split}_{i:06d}.png"
            ymin, xmin, ymax, xmax = (float(v) for v in scenes.box[i])
            yield (
                name,
                {
                    "image": scenes.image[i],
                    "label": int(scenes.label[i]),
                    "file_name": name,
                    "box": tfds.features.BBox(ymin=ymin, xmin=xmin, ymax=ymax, xmax=xmax),
                },
            )


def prepare(
    data_dir: str | os.PathLike,
    *,
    num_train: int = 2000,
    num_test: int = 1500,
    seed: int = 0,
    num_shards: int = 8,
    **scene: Any,
) -> tfds.core.DatasetBuilder:
    """Write the data set under `data_dir`, or reuse it if one with exactly these options is there.

    Args:
      data_dir: root folder of TFDS data; the data go to `digit_scenes/<config>/1.0.0` below it.
      num_train: scenes of the train split.
      num_test: scenes of the test split.
      seed: seed of the scenes.
      num_shards: files of each split; score maps are written one file a shard.
      **scene: options of `make_scenes` (size, digit_scale, ...).

    Returns:
      A prepared builder: `builder.as_dataset("train")`, `builder.info.splits["train"].num_examples`.

    Raises:
      ValueError: empty splits, no shard, or options `make_scenes` refuses (before anything is written).
    """
    if min(num_train, num_test, num_shards) < 1:
        raise ValueError(
            f"Need at least one train scene, test scene and shard: {num_train}, {num_test}, {num_shards}."
        )
    make_scenes("test", 1, seed=seed, **scene)  # bad options fail here, with their own message
    name = config_name(num_train, num_test, seed, num_shards, scene)
    config = DigitScenesConfig(
        name=name,
        description=f"{num_train} train and {num_test} test scenes, seed {seed}, options {scene}",
        num_train=num_train,
        num_test=num_test,
        seed=seed,
        scene=scene,
    )
    builder = DigitScenes(data_dir=os.fspath(data_dir), config=config)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=num_shards, try_download_gcs=False)
    )
    return builder


def config_name(num_train: int, num_test: int, seed: int, num_shards: int, scene: dict[str, Any]) -> str:
    """Name of the data made with these options: readable counts and a hash of every option."""
    options = {**scene_defaults(), **scene}
    text = repr((seed, num_shards, sorted((k, repr(v)) for k, v in options.items())))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"s{options['size']}_train{num_train}_test{num_test}_seed{seed}_{digest}"


def scene_defaults() -> dict[str, Any]:
    """Options of `make_scenes` with their default values."""
    return {k: v for k, v in make_scenes.__kwdefaults__.items() if k != "seed"}


@functools.cache
def load_digit_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The real digits of one split: ink float64 [M, 8, 8] in 0-1 and label int64 [M].

    Each class is shuffled by a fixed seed and cut at the same share, so both splits hold all ten.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('The digit scenes need scikit-learn: pip install "tlvit[demo]".') from error
    data = load_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    keep = []
    for c in range(NUM_CLASSES):
        members = rng.permutation(np.flatnonzero(data.target == c))
        cut = round(len(members) * TEST_SHARE)
        keep.append(members[:cut] if split == "test" else members[cut:])
    index = np.sort(np.concatenate(keep))
    return data.images[index] / 16.0, data.target[index]


def check_options(
    split: str,
    count: int,
    seed: int,
    size: int,
    digit_scale: tuple[float, float],
    distractors: tuple[int, int],
    distractor_scale: tuple[float, float],
    contrast: float,
) -> None:
    """Raise ValueError where `make_scenes` could not draw what is asked for."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    if count < 0 or seed < 0:
        raise ValueError(f"count and seed must not be negative, got {count} and {seed}.")
    if size < 16:
        raise ValueError(f"Scenes need a side of at least 16 pixels, got {size}.")
    for name, (low, high) in (("digit_scale", digit_scale), ("distractor_scale", distractor_scale)):
        if not 0 < low <= high <= 1:
            raise ValueError(f"{name} must be 0 < low <= high <= 1, got ({low}, {high}).")
    if not 0 <= distractors[0] <= distractors[1] < NUM_CLASSES:
        raise ValueError(f"distractors must be 0 <= low <= high <= 9, got {tuple(distractors)}.")
    if not 0 <= contrast <= 0.5:
        raise ValueError(f"contrast must be between 0 and 0.5, got {contrast}.")


def choose_digits(rng: np.random.Generator, labels: np.ndarray, others: int) -> list[int]:
    """Indices of 1 + `others` digits of as many different classes; the first one gives the class."""
    classes = rng.permutation(NUM_CLASSES)[: 1 + others]
    return [int(rng.choice(np.flatnonzero(labels == c))) for c in classes]


def render_digit(rng: np.random.Generator, digit: np.ndarray, height: int) -> np.ndarray:
    """Ink [height, height] in 0-1 of an 8x8 digit, slightly turned and slanted, with sharp strokes."""
    angle, slant, width = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15), rng.uniform(0.85, 1.1)
    y, x = np.meshgrid(*2 * [(np.arange(height) + 0.5) / height * 2 - 1], indexing="ij")
    u = (np.cos(angle) * x + np.sin(angle) * y + slant * y) / width
    v = -np.sin(angle) * x + np.cos(angle) * y
    taps = np.arange(8)
    at = lambda p: catmull_rom((p.reshape(-1, 1) * 1.06 + 1) * 4 - 0.5 - taps[None, :])
    ink = (at(v) @ digit * at(u)).sum(axis=1).reshape(height, height)
    ink = np.clip((ink - 0.2) / 0.45, 0, 1)
    return ink * ink * (3 - 2 * ink)


def catmull_rom(t: np.ndarray) -> np.ndarray:
    """Cubic interpolation weight of a tap at distance t (a = -0.5)."""
    t = np.abs(t)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def place(rng: np.random.Generator, ink: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Put `ink` [k, k] where it covers the least of `taken` [S, S]; uniformly among such places: [S, S]."""
    size, k = taken.shape[0], ink.shape[0]
    sums = np.pad(taken.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    covered = sums[k:, k:] - sums[:-k, k:] - sums[k:, :-k] + sums[:-k, :-k]
    free = np.flatnonzero(covered == covered.min())
    top, left = divmod(int(rng.choice(free)), size - k + 1)
    alpha = np.zeros((size, size))
    alpha[top : top + k, left : left + k] = ink
    return alpha


def draw_background(rng: np.random.Generator, size: int, contrast: float, texture: float) -> np.ndarray:
    """A colored background [S, S, 3] in 0-1: a gradient, soft clouds and a faint grain of stripes."""
    side = rng.integers(2)  # dark or light, so that ink of the needed contrast exists
    base = rng.uniform(0.05, 1 - contrast - 0.25) if side == 0 else rng.uniform(contrast + 0.25, 0.95)
    color = np.clip(base + rng.normal(0, 0.12, 3), 0, 1)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = axis[:, None], axis[None, :]
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    gradient = np.cos(angle) * x + np.sin(angle) * y
    direction = rng.uniform(0, 2 * np.pi)
    stripes = np.sin(rng.uniform(6, 20) * (np.cos(direction) * x + np.sin(direction) * y) + phase)
    knots = int(rng.integers(4, 9))
    weights = catmull_rom((axis[:, None] + 1) / 2 * (knots - 1) - np.arange(knots)[None, :])
    clouds = np.tensordot(weights, rng.normal(0, 1, (knots, knots, 3)), (1, 0))  # [S, knots, 3]
    clouds = np.swapaxes(np.tensordot(clouds, weights, (1, 1)), 1, 2)
    tint = rng.uniform(0.5, 1.0, 3)
    pattern = (0.8 * gradient + 0.35 * rng.uniform() * stripes)[:, :, None] * tint[None, None] + 0.5 * clouds
    return np.clip(color[None, None] + texture * pattern, 0, 1)


def ink_color(rng: np.random.Generator, mean: np.ndarray, contrast: float) -> np.ndarray:
    """A color [3] whose brightness differs from the background's `mean` [3] by at least `contrast`."""
    level = float(mean.mean())
    room = np.array([max(level - contrast, 0.0), max(1 - level - contrast, 0.0)])  # darker, lighter
    darker = rng.uniform() * room.sum() < room[0] if room.sum() > 0 else level > 0.5
    target = rng.uniform(0, room[0]) if darker else 1 - rng.uniform(0, room[1])
    color = target + rng.normal(0, 0.15, 3)
    return np.clip(color - color.mean() + target, 0, 1)


def ink_box(alpha: np.ndarray) -> np.ndarray:
    """Relative box (y0, x0, y1, x1) [4] around the pixels of `alpha` [S, S] that are mostly ink."""
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis=axis)) for axis in (1, 0))
    size = alpha.shape[0]
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], np.float32) / size
