"""The cells of the graph `dense` that show a picture, and where the picture lies in them."""

from dataclasses import dataclass
from math import ceil

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import Graph
from calmclip.models.errors import TaskNotServed
from calmclip.models.flow import Array, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.preprocess.placement import Frame
from calmclip.models.tasks import dense
from calmclip.models.tasks.features import unit


@dataclass(frozen=True)
class Cells:
    """The cells of a graph's map that show the picture: ``rows`` and ``columns`` of them, from ``top`` and ``left`` on.
    ``box``: x0 y0 x1 y1 of the picture in these cells."""

    top: int
    left: int
    rows: int
    columns: int
    box: tuple[float, float, float, float]

    def of(self, plane: Array) -> Array:
        """The part of ``plane`` [h, w, ...] that shows the picture."""
        return plane[self.top : self.top + self.rows, self.left : self.left + self.columns]


def cells(frame: Frame, size: tuple[int, int], grid: tuple[int, ...]) -> Cells:
    """``size``: rows and columns of the graph's input in pixels; ``grid``: of its map. A cell counts if its middle lies
    in the picture; of a picture that is thinner than a cell, the nearest one."""
    corners = frame.to_input(np.array([[0, 0, frame.width, frame.height]], np.float32))[0]
    x0, y0, x1, y1 = (float(value) for value in corners * (np.array([*grid[1::-1]] * 2) / np.array([*size[::-1]] * 2)))
    left, columns = _span(x0, x1, grid[1])
    top, rows = _span(y0, y1, grid[0])
    return Cells(top, left, rows, columns, (x0 - left, y0 - top, x1 - left, y1 - top))


def _span(low: float, high: float, count: int) -> tuple[int, int]:
    """The first cell whose middle lies in [low, high], and how many there are; at least one."""
    first = min(max(0, ceil(low - 0.5)), count - 1)
    return first, max(1, min(count, ceil(high - 0.5)) - first)


@dataclass(frozen=True)
class Look:
    """``patches`` float32 [h, w, D], not normalized: those of the cells ``where``. ``frame``: of the graph's input."""

    patches: Array
    where: Cells
    frame: Frame

    @property
    def rows(self) -> Array:
        """float32 [h * w, D], unit rows."""
        return unit(self.patches.reshape(-1, self.patches.shape[-1]))


def require_dense(bundle: Bundle) -> Graph:
    """Raises `TaskNotServed`."""
    if "dense" not in bundle.manifest.graphs:
        raise TaskNotServed(
            f"bundle {bundle.name!r} has no graph 'dense'; export the checkpoint with --dense values",
            known=sorted(bundle.manifest.graphs),
        )
    return bundle.graph("dense")


def look(bundle: Bundle, image: Picture) -> Flow[Look]:
    """Raises `TaskNotServed` without the graph `dense`, and the `InputError`s of pictures."""
    require_dense(bundle)
    feeds, frame = yield from dense.views(bundle, image)
    outputs = yield from dense.look(feeds)
    patches = outputs["patches"][0]
    where = cells(frame, bundle.image("dense").spec.size, patches.shape[:2])
    return Look(where.of(patches), where, frame)
