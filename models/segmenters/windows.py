"""A picture in overlapping windows, and their maps as one map.

The graph `dense` has an input of one size, in which a large or long picture loses its small things. So the picture is
resized until a part of it fills the input; the graph sees each part, and cells that several parts have seen get the
mean of their answers.

Source: Trident, Shi et al. 2025 (arXiv 2411.09219), section 3.2 and its code: the last window of a row ends at the
picture's edge; overlapping features are added and divided by the number of visits.
"""

from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

import numpy as np

from calmclip.models.bundle.manifest import MAX_SIDE, ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import Windows

MOST = 64  # windows of one picture
MOST_CELLS = 6000  # of the whole map: the time of affinity grows with their square
Size = tuple[int, int]  # rows and columns


@dataclass(frozen=True)
class Plan:
    """``size``: rows and columns of pixels that the whole picture is resized to; ``grid``: cells of its map;
    ``window``: cells of one window; ``places``: the first row and column of each window, in cells."""

    size: Size
    grid: Size
    window: Size
    places: tuple[tuple[int, int], ...]

    def size_for(self, input: Size) -> Size:
        """Rows and columns of pixels of the whole picture for a graph whose input has ``input`` rows and columns."""
        rows, columns = (
            round(cells * side / window) for cells, side, window in zip(self.grid, input, self.window, strict=True)
        )
        return rows, columns

    def frame(self, width: int, height: int) -> Frame:
        """Maps a picture of ``width`` x ``height`` pixels to the cells of the whole map."""
        return Frame(width, height, (self.grid[1] / width, self.grid[0] / height), (0.0, 0.0))


def plan(windows: Windows, width: int, height: int, input: Size, window: Size) -> Plan:
    """The windows over a picture of ``width`` x ``height`` pixels, for a graph whose input has ``input`` rows and
    columns of pixels and whose map has ``window`` rows and columns of cells.

    A window has the shape of the input; a picture of another shape is covered in whole cells, so it may be stretched by
    half a cell. Raises `BadRequest` for impossible settings, and above `MOST` windows or `MOST_CELLS` cells.
    """
    for name, value, least in (("size", windows.size, 0.1), ("stride", windows.stride, 0.1)):
        if not (isfinite(value) and least <= value <= 1.0):
            raise BadRequest(f"windows: {name} is {value}; expected a number from {least:g} to 1")
    # at size 1 the picture just covers a window
    scale = max(input[0] / height, input[1] / width) / windows.size
    rows, columns = (
        max(cells, round(side * scale * cells / pixels))
        for side, cells, pixels in zip((height, width), window, input, strict=True)
    )
    tops, lefts = _starts(rows, window[0], windows.stride), _starts(columns, window[1], windows.stride)
    size = round(rows * input[0] / window[0]), round(columns * input[1] / window[1])
    count = len(tops) * len(lefts)
    if count > MOST or rows * columns > MOST_CELLS or max(size) > MAX_SIDE:
        raise BadRequest(
            f"windows: a picture of {width} x {height} pixels makes {count} windows over {size[1]} x {size[0]} pixels "
            f"and {columns} x {rows} cells; at most {MOST} windows, {MOST_CELLS} cells and sides of {MAX_SIDE} pixels "
            "are looked at. Use a larger size or a longer stride, or leave windows out"
        )
    return Plan(size, (rows, columns), window, tuple((top, left) for top in tops for left in lefts))


def _starts(whole: int, part: int, stride: float) -> list[int]:
    """The first cell of each window along one side; the last one ends at the edge."""
    step = max(1, round(stride * part))
    count = 1 + ceil((whole - part) / step)
    return [min(i * step, whole - part) for i in range(count)]


def whole(spec: ImagePreprocess, size: Size) -> ImagePreprocess:
    """``spec`` for the whole picture, resized to ``size``. A graph that prepares pictures itself takes one window after
    another as a picture, so this gives the pixels of the picture unchanged: 0 to 255."""
    changed: dict[str, Any] = {"size": size, "resize": "exact", "shortest": None, "keep_square": False}
    if spec.resample == "gaussian":
        changed["resample"] = "bilinear"
    if spec.in_graph:
        changed |= {"in_graph": False, "mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
    return ImagePreprocess.model_validate(spec.model_dump() | changed)


def window(spec: ImagePreprocess, windowed: Plan, place: Size, pixels: Array) -> dict[str, Array]:
    """The feeds of one window, whose first cell is ``place``. ``pixels`` [1, 3, H, W]: the whole picture, prepared by
    `whole` of ``spec``."""
    rows, columns = spec.size
    top, left = round(place[0] * rows / windowed.window[0]), round(place[1] * columns / windowed.window[1])
    part = pixels[:, :, top : top + rows, left : left + columns]
    if spec.in_graph:
        part = part[0].transpose(1, 2, 0).round().astype(np.uint8)
    return {spec.input: np.ascontiguousarray(part)}


class Splice:
    """Adds the maps of windows on one grid; each cell of the result is the mean over the windows that see it."""

    def __init__(self, grid: Size) -> None:
        self.grid = grid
        self.sums: dict[str, Array] = {}
        self.visits = np.zeros(grid, np.float32)

    def add(self, maps: Arrays, place: Size) -> None:
        """``maps``: by name [1, h, w] or [1, h, w, C], of the window whose first cell is ``place``."""
        top, left = place
        for name, array in maps.items():
            rows, columns = array.shape[1:3]
            if name not in self.sums:
                self.sums[name] = np.zeros((*self.grid, *array.shape[3:]), np.float32)
            self.sums[name][top : top + rows, left : left + columns] += array[0]
        self.visits[top : top + rows, left : left + columns] += 1

    def mean(self) -> dict[str, Array]:
        """By name [H, W] or [H, W, C], in the memory of the sums. Call it once, when every cell has been seen."""
        visits = {2: self.visits, 3: self.visits[:, :, None]}
        return {name: np.divide(total, visits[total.ndim], out=total) for name, total in self.sums.items()}
