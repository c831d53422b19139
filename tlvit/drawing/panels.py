"""Draws rows of panels: images, the classes of their cells, and the relevance of their patches."""

import dataclasses
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tlvit.draw_tokens import class_color
from tlvit.files import as_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

LEGEND = 24  # most classes that the legend names
COLORS = "inferno"  # of the relevance
OUTLINE = "#00e5ff"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
      image: uint8 [H, W, 3].
      title: text above it.
      caption: text below it; "(wrong)" at its end makes it red.
      probability: float [h, w, L], class probabilities of the cells, drawn over the image in gray.
      weight: float [h, w], in [0, 1]: how much of each cell is known. Cells with 0 are crossed out.
      heat: float [h, w], at least 0, drawn over the image in gray. Its largest value is the brightest.
      extent: (left, top, right, bottom) of the cells, as fractions of the image.
      outline: float [n, 2], corners (x, y) of a polygon, as fractions of the image.
    """

    image: np.ndarray
    title: str = ""
    caption: str = ""
    probability: np.ndarray | None = None
    weight: np.ndarray | None = None
    heat: np.ndarray | None = None
    extent: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    outline: np.ndarray | None = None


def draw_panels(
    rows: Sequence[Sequence[Panel]],
    *,
    class_names: Sequence[str] | None = None,
    title: str = "",
    side: float = 2.2,
) -> "Figure":
    """Draws rows of panels, with a legend if cells have classes. A class has one color in all pictures.

    Args:
      rows: the panels; rows may differ in length.
      class_names: name of each class; None: class indices are shown.
      title: title of the figure.
      side: width of a panel, inches.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    name = namer(class_names)
    panels = [panel for row in rows for panel in row]
    best = [panel.probability.argmax(-1).ravel() for panel in panels if panel.probability is not None]
    shown = np.concatenate(best) if best else np.zeros(0, int)
    colors = {int(k): color_of(int(k)) for k in np.unique(shown)}
    columns = max(map(len, rows))
    heights = [max(_height(panel) for panel in row) for row in rows]
    size = (max(columns * side, 4.4), side * sum(heights) + 0.5 * bool(title) + 0.9 * bool(len(shown)))
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11, fontweight="bold")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, row in zip(axes, rows, strict=True):
        for axis, panel in zip(line, row, strict=False):
            _draw(axis, panel, colors, name, side=72 * side)
        for axis in line[len(row) :]:
            axis.set_axis_off()
    if len(shown):
        draw_legend(figure, shown, colors, name, columns=max(2, int(size[0] / 1.5)))
    return figure


def save(figure: "Figure", path: str | pathlib.Path, *, dpi: int = 100) -> None:
    """Writes a figure as a PNG file, also to a bucket."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format="png")
    as_path(path).write_bytes(picture.getvalue())


def draw_cells(
    axis: "Axes",
    image: np.ndarray,
    probability: np.ndarray,
    colors: Mapping[int, np.ndarray],
    name: Callable[[int], str],
    *,
    side: float,
    extent: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> None:
    """Draws every cell in the color of its most probable class, with an opacity that grows with the
    probability. Classes with short names are written into the cells of high probability; `side` is the size
    of the picture in points."""
    height, width = image.shape[:2]
    best, sure = probability.argmax(-1), probability.max(-1)
    chance = 1 / probability.shape[-1]
    strength = np.sqrt(np.clip((sure - chance) / max(1 - chance, 1e-6), 0, 1))
    axis.imshow(image.mean(-1), cmap="gray", vmin=-60, vmax=320)
    paint = np.zeros((*best.shape, 4))
    for k in np.unique(best):
        paint[best == k, :3] = colors[int(k)]
    paint[..., 3] = 0.75 * strength
    left, top, right, bottom = (
        edge * length - 0.5 for edge, length in zip(extent, (width, height) * 2, strict=True)
    )
    axis.imshow(paint, extent=(left, right, bottom, top), interpolation="nearest")
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)
    h, w = best.shape
    size = max(5.0, 0.375 * side / max(h, w))
    fits = int(side / w / (0.65 * size))  # letters
    for y, x in zip(*np.nonzero(strength > 0.5), strict=True):
        center = (left + (x + 0.5) * (right - left) / w, top + (y + 0.5) * (bottom - top) / h)
        text = name(int(best[y, x]))
        style = {"fontsize": size, "color": "white", "fontweight": "bold", "ha": "center", "va": "center"}
        if len(text) <= fits:  # longer names are in the legend
            axis.text(*center, text, **style)


def draw_legend(
    figure: "FigureBase",
    shown: np.ndarray,
    colors: Mapping[int, np.ndarray],
    name: Callable[[int], str],
    *,
    columns: int = 6,
    title: str = "most probable class of a cell; the stronger the color, the higher its probability",
) -> None:
    """Names the colors of the most frequent classes. `shown` has the class of every image and cell."""
    from matplotlib.patches import Patch

    classes, counts = np.unique(shown, return_counts=True)
    frequent = sorted(int(k) for k in classes[np.argsort(-counts, kind="stable")][:LEGEND])
    patches = [Patch(color=tuple(colors[k]), label=name(k)[:24]) for k in frequent]
    others = len(classes) - len(frequent)
    title = title if columns > 4 else title.replace("; ", ";\n")
    title += f" ({others} less frequent classes are not named)" if others else ""
    style = {"ncols": columns, "fontsize": 8, "title_fontsize": 9}
    figure.legend(handles=patches, title=title, loc="outside lower center", **style)


def namer(class_names: Sequence[str] | None) -> Callable[[int], str]:
    """The name of a class index; the index itself if there are no names."""
    return lambda k: str(class_names[k]) if class_names else str(k)


def color_of(index: int) -> np.ndarray:
    """The color of a class, float [3] in [0, 1]."""
    return np.array(class_color(index)) / 255


def _draw(
    axis: "Axes", panel: Panel, colors: Mapping[int, np.ndarray], name: Callable[[int], str], *, side: float
) -> None:
    """Draws one panel."""
    height, width = panel.image.shape[:2]
    if panel.probability is not None:
        draw_cells(axis, panel.image, panel.probability, colors, name, side=side, extent=panel.extent)
    elif panel.heat is not None:
        axis.imshow(panel.image.mean(-1), cmap="gray", vmin=-60, vmax=320)
        axis.imshow(
            _paint(panel.heat), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear"
        )
    else:
        axis.imshow(panel.image)
    if panel.weight is not None:
        h, w = panel.weight.shape
        y, x = np.nonzero(panel.weight == 0)
        axis.plot((x + 0.5) * width / w - 0.5, (y + 0.5) * height / h - 0.5, "kx", markersize=4)
    if panel.outline is not None:
        from matplotlib.patches import Polygon

        corners = panel.outline * (width, height) - 0.5
        axis.add_patch(Polygon(corners, fill=False, edgecolor=OUTLINE, linewidth=1.6))
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel(
        panel.caption, fontsize=8, color="tab:red" if panel.caption.endswith("(wrong)") else "0.2"
    )
    axis.set_xticks([])
    axis.set_yticks([])


def _paint(heat: np.ndarray) -> np.ndarray:
    """Heat as RGBA [h, w, 4]: its smallest value is transparent."""
    from matplotlib import colormaps

    strength = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-30)
    paint = colormaps[COLORS](0.25 + 0.75 * strength)
    paint[..., 3] = 0.85 * np.sqrt(strength)
    return paint


def _height(panel: Panel) -> float:
    """Height of a panel with its texts, as a fraction of its width."""
    lines = sum(text.count("\n") + 1 for text in (panel.title, panel.caption) if text)
    height, width = panel.image.shape[:2]
    return min(height / width, 3.0) + 0.08 * lines + 0.02
