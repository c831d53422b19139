"""Draws scenes of handwritten digits, made of scikit-learn's `load_digits` with NumPy only.

The class of a scene is the class of its one large digit. Smaller digits of other classes surround it, so a
model has to learn where to look.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np

NUM_CLASSES = 10
TEST_FRACTION = 0.3  # of the 1,797 digits; the split does not depend on the seed of the scenes
SPLIT_SEED = 20210422
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """How scenes are drawn.

    Attributes:
      size: side S of the square scenes in pixels, at least 16.
      digit_scale: smallest and largest height of the class digit, as a fraction of S in (0, 1].
      distractors: smallest and largest number of smaller digits, 0 to 9. Their classes differ from the label
        and from each other.
      distractor_scale: smallest and largest height of the smaller digits, as a fraction of S in (0, 1].
      contrast: smallest difference in brightness between a digit and the background's mean, 0 to 0.5.
      texture: strength of the background's gradient and texture, in brightness 0 to 1.
      noise: standard deviation of the pixel noise, in brightness 0 to 1.

    Raises:
      ValueError: an option is outside of its range.
    """

    size: int = 48
    digit_scale: tuple[float, float] = (0.5, 0.7)
    distractors: tuple[int, int] = (2, 3)
    distractor_scale: tuple[float, float] = (0.25, 0.34)
    contrast: float = 0.35
    texture: float = 0.12
    noise: float = 0.02

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"Scenes need a side of at least 16 pixels, got {self.size}.")
        for name in ("digit_scale", "distractor_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be 0 < low <= high <= 1, got ({low}, {high}).")
        if not 0 <= self.distractors[0] <= self.distractors[1] < NUM_CLASSES:
            raise ValueError(f"distractors must be 0 <= low <= high <= 9, got {tuple(self.distractors)}.")
        if not 0 <= self.contrast <= 0.5:
            raise ValueError(f"contrast must be in [0, 0.5], got {self.contrast}.")


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes and their labels.

    Attributes:
      image: uint8 [n, S, S, 3].
      label: int32 [n], the class of the large digit, 0 to 9.
      box: float32 [n, 4], the ink of the large digit as (y0, x0, y1, x1), as fractions of the image.
      mask: uint8 [n, S, S], the class of every pixel: 0 for the background, 1 + d for the ink of a digit d.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    mask: np.ndarray


def make_scenes(
    split: Literal["train", "test"], count: int, options: SceneOptions | None = None, *, seed: int = 0
) -> Scenes:
    """Draws `count` scenes. Scene i depends on the seed, the split, i and the options only.

    Args:
      split: "train" or "test". No digit of one split is used in a scene of the other.
      count: number of scenes n.
      options: how they are drawn. None: `SceneOptions()`.
      seed: seeds the drawing. The division of the digits into splits is fixed.

    Returns:
      The n scenes.

    Raises:
      ValueError: the split is unknown, or the count or seed is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    if count < 0 or seed < 0:
        raise ValueError(f"count and seed must not be negative, got {count} and {seed}.")
    options = options or SceneOptions()
    digits, labels = load_digit_images(split)
    images = np.empty((count, options.size, options.size, 3), np.uint8)
    scene_labels = np.empty(count, np.int32)
    boxes = np.empty((count, 4), np.float32)
    masks = np.empty((count, options.size, options.size), np.uint8)
    for i in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), i])
        chosen = choose_digits(
            rng, labels, int(rng.integers(options.distractors[0], options.distractors[1] + 1))
        )
        images[i], boxes[i], masks[i] = draw_scene(rng, digits[chosen], labels[chosen], options)
        scene_labels[i] = labels[chosen[0]]
    return Scenes(image=images, label=scene_labels, box=boxes, mask=masks)


def draw_scene(
    rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray, options: SceneOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the given digits [n, 8, 8] of classes [n], the class digit first.

    Returns:
      The image, uint8 [S, S, 3], the box [4] of the class digit, and the mask, uint8 [S, S]; see `Scenes`.
    """
    image = draw_background(rng, options.size, options.contrast, options.texture)
    mean = image.mean(axis=(0, 1))
    taken = np.zeros((options.size, options.size), bool)
    box, mask = np.zeros(4), np.zeros((options.size, options.size), np.uint8)
    for k, digit in enumerate(digits):
        scale = options.digit_scale if k == 0 else options.distractor_scale
        ink = render_digit(rng, digit, max(4, round(options.size * rng.uniform(*scale))))
        alpha = position_ink(rng, ink, taken)
        taken |= alpha > 0.1
        mask[alpha > 0.5] = 1 + labels[k]
        alpha3 = alpha[:, :, None]
        image = image * (1 - alpha3) + ink_color(rng, mean, options.contrast)[None, None] * alpha3
        if k == 0:
            box = ink_box(alpha)
    image += rng.normal(0, options.noise, image.shape)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8), box, mask


@functools.cache
def load_digit_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the digits of one split: ink float64 [M, 8, 8] in [0, 1] and label int64 [M].

    Each class is shuffled by a fixed seed and cut at the same fraction, so both splits have all ten classes.
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
        cut = round(len(members) * TEST_FRACTION)
        keep.append(members[:cut] if split == "test" else members[cut:])
    index = np.sort(np.concatenate(keep))
    return data.images[index] / 16.0, data.target[index]


def choose_digits(rng: np.random.Generator, labels: np.ndarray, others: int) -> list[int]:
    """Returns the indices of 1 + `others` digits of as many different classes, the class digit first."""
    classes = rng.permutation(NUM_CLASSES)[: 1 + others]
    return [int(rng.choice(np.flatnonzero(labels == c))) for c in classes]


def render_digit(rng: np.random.Generator, digit: np.ndarray, height: int) -> np.ndarray:
    """Draws an 8x8 digit, slightly rotated and slanted, as ink [height, height] in [0, 1]."""
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
    """Returns the cubic interpolation weight (a = -0.5) of a tap at distance t."""
    t = np.abs(t)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def position_ink(rng: np.random.Generator, ink: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Puts ink [k, k] into an image [S, S], at random where it covers the least of `taken` [S, S]."""
    size, k = taken.shape[0], ink.shape[0]
    sums = np.pad(taken.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    covered = sums[k:, k:] - sums[:-k, k:] - sums[k:, :-k] + sums[:-k, :-k]
    free = np.flatnonzero(covered == covered.min())
    top, left = divmod(int(rng.choice(free)), size - k + 1)
    alpha = np.zeros((size, size))
    alpha[top : top + k, left : left + k] = ink
    return alpha


def draw_background(rng: np.random.Generator, size: int, contrast: float, texture: float) -> np.ndarray:
    """Draws a colored background [S, S, 3] in [0, 1]: a gradient, smooth noise and faint stripes."""
    side = rng.integers(2)  # dark or light, so that ink of the required contrast exists
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
    """Draws a color [3] whose brightness differs from the background's mean [3] by at least `contrast`."""
    level = float(mean.mean())
    room = np.array([max(level - contrast, 0.0), max(1 - level - contrast, 0.0)])  # darker, lighter
    darker = rng.uniform() * room.sum() < room[0] if room.sum() > 0 else level > 0.5
    target = rng.uniform(0, room[0]) if darker else 1 - rng.uniform(0, room[1])
    color = target + rng.normal(0, 0.15, 3)
    return np.clip(color - color.mean() + target, 0, 1)


def ink_box(alpha: np.ndarray) -> np.ndarray:
    """Returns the box (y0, x0, y1, x1) around the pixels of `alpha` [S, S] that are mostly ink."""
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis=axis)) for axis in (1, 0))
    size = alpha.shape[0]
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], np.float32) / size
