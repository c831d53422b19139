"""The views of an image that an annotator scores: overlapping crops, and their mirror images."""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tlvit.types import Array

OVERLAP = 1 / 4  # of neighboring crops, as a fraction of a crop's cells


@dataclasses.dataclass(frozen=True)
class Views:
    """Crops in rows and columns that cover an image, each as large as the annotator's input.

    Neighboring crops overlap by a quarter of their cells, so the crops have whole cells in common. The logits
    of a cell that several views cover are averaged, which is the geometric mean of their probabilities. The
    average keeps the scale of the logits and does not depend on a constant that is added to all of a cell.

    Attributes:
      crop: (H, W) of a crop, the annotator's input, pixels.
      cells: (h, w) of the annotator's logits for a crop.
      crop_grid: number of (rows, columns).
      flip: whether every crop is also scored as its mirror image.
    """

    crop: tuple[int, int]
    cells: tuple[int, int]
    crop_grid: tuple[int, int] = (1, 1)
    flip: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the cells of the image."""
        return (self._cells(0), self._cells(1))

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the image that the crops are cut from, pixels."""
        return (self._pixels(self._cells(0), 0), self._pixels(self._cells(1), 1))

    @property
    def count(self) -> int:
        """Number of views."""
        return self.crop_grid[0] * self.crop_grid[1] * (1 + self.flip)

    def cut(self, images: Array) -> list[Array]:
        """The views of images [B, H, W, 3], each [B, H of a crop, W of a crop, 3]."""
        crops = []
        for row, column in self._corners():
            top, left = self._pixels(row, 0), self._pixels(column, 1)
            crops.append(images[:, top : top + self.crop[0], left : left + self.crop[1]])
        return crops + [crop[:, :, ::-1] for crop in crops if self.flip]

    def merge(self, logits: Iterable[Array]) -> Array:
        """Averages logits.

        Args:
          logits: [B, h, w, L] of each view, in the order of `cut`. An iterator needs the memory of one view
            at a time.

        Returns:
          [B, h of the grid, w of the grid, L].
        """
        corners, total = self._corners(), None
        height, width = self.cells
        for number, part in enumerate(logits):
            if number >= len(corners):
                part = part[:, :, ::-1]
            if self.count == 1:
                return part
            xp = jnp if isinstance(part, jax.Array) else np
            if total is None:
                total = xp.zeros((part.shape[0], *self.grid, part.shape[3]), part.dtype)
            top, left = corners[number % len(corners)]
            place = np.s_[:, top : top + height, left : left + width]
            if isinstance(total, jax.Array):
                total = total.at[place].add(part)
            else:
                total[place] += part
        if total is None:
            raise ValueError(f"{self.count} views need the logits of as many views, not none.")
        return total / self._views_of_cells()[None, :, :, None]

    def _views_of_cells(self) -> np.ndarray:
        """float32 [h, w], the number of views that cover a cell."""
        count = np.zeros(self.grid, np.float32)
        for top, left in self._corners():
            count[top : top + self.cells[0], left : left + self.cells[1]] += 1 + self.flip
        return count

    def _corners(self) -> list[tuple[int, int]]:
        """(row, column) of the first cell of every crop, row by row."""
        return [
            (row * self._step(0), column * self._step(1))
            for row in range(self.crop_grid[0])
            for column in range(self.crop_grid[1])
        ]

    def _step(self, axis: int) -> int:
        """Cells from one crop to the next."""
        return self.cells[axis] - math.floor(OVERLAP * self.cells[axis] + 0.5)

    def _cells(self, axis: int) -> int:
        """Cells of the image."""
        return (self.crop_grid[axis] - 1) * self._step(axis) + self.cells[axis]

    def _pixels(self, cells: int, axis: int) -> int:
        """The pixels of a number of cells, rounded."""
        return math.floor(cells * self.crop[axis] / self.cells[axis] + 0.5)
