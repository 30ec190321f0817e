"""Pictures and boxes -> vectors of regions, in the space of the bundle's pictures and texts.

The graph `dense` gives a vector for each cell of the picture. The vector of a box is their mean, each weighted by the
part of it that lies in the box. A bundle may replace the mean by a graph `prompter` with weights of its own:

    patches float32 [1, h, w, D]; boxes float32 [1, N, 4], x0 y0 x1 y1 in cells of the map -> region_embeds [1, N, D]

No published prompter is known, so no layout of one is read; such a graph is added by hand.

Source: CLOC, Chen et al. 2024 (arXiv 2410.02746), section 3; the half-pixel alignment of RoIAlign, He et al. 2017
(arXiv 1703.06870), with the exact area instead of samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest
from calmclip.models.errors import BadRequest, TaskNotServed
from calmclip.models.flow import Array, Call, Flow
from calmclip.models.preprocess.image import Picture
from calmclip.models.preprocess.placement import Frame
from calmclip.models.tasks import elongated, exactly
from calmclip.models.tasks.dense import Views, check_guide, look, views
from calmclip.models.tasks.examples import pick
from calmclip.models.tasks.features import unit

Boxes = Sequence[Sequence[float]] | Array
MAX_WINDOWS = 1000  # of a grid
PROMPTER = ("patches", "boxes")  # inputs of `prompter`


@dataclass(frozen=True)
class Grid:
    """Windows that slide over a picture. ``sizes``: sides of squares as parts of the picture's shorter side; a ratio
    makes a square wider (over 1) or higher at the same area. ``stride``: between neighbours, as a part of the window.
    The whole picture is the first window."""

    sizes: Sequence[float] = (0.25, 0.5, 0.75)
    ratios: Sequence[float] = (0.5, 1.0, 2.0)
    stride: float = 0.5

    def windows(self, width: int, height: int) -> Array:
        """-> float32 [N, 4] x0 y0 x1 y1 in pixels. Raises `BadRequest` for impossible settings, and above
        `MAX_WINDOWS`."""
        for name, values, most in (("sizes", self.sizes, 1.0), ("ratios", self.ratios, 10.0)):
            if not len(values) or not all(isfinite(value) and 0.02 <= value <= most for value in values):
                raise BadRequest(f"grid: {name} is {[*values]}; expected numbers from 0.02 to {most:g}, at least one")
        if not 0.1 <= self.stride <= 1.0:
            raise BadRequest(f"grid: stride is {self.stride}; expected a number from 0.1 to 1")
        rows = [np.array([[0, 0, width, height]], np.float64)]
        for side, ratio in ((size * min(width, height), ratio) for size in self.sizes for ratio in self.ratios):
            box = np.array([min(side * ratio**0.5, width), min(side / ratio**0.5, height)])
            x, y = (
                np.linspace(0, whole - part, 1 + ceil(round((whole - part) / (self.stride * part), 6)))
                for whole, part in zip((width, height), box, strict=True)
            )
            corners = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
            rows.append(np.concatenate((corners, corners + box), axis=1))
            if (count := sum(map(len, rows))) > MAX_WINDOWS:
                raise BadRequest(
                    f"grid: it makes {count} windows or more of a picture of {width} x {height} pixels; at most "
                    f"{MAX_WINDOWS} are compared. Use larger sizes, fewer of them, or a longer stride"
                )
        return np.concatenate(rows).astype(np.float32)


@dataclass(frozen=True)
class Located:
    """A picture that is prepared for `dense`, and boxes float32 [N, 4] in its pixels, clipped to it."""

    feeds: Views
    frame: Frame
    boxes: Array


def region_vectors(bundle: Bundle, image: Picture, boxes: Boxes | None = None) -> Flow[tuple[Array, Array]]:
    """-> vectors float32 [R, D] unit rows, and their boxes float32 [R, 4], x0 y0 x1 y1 in pixels of the upright
    picture.

    ``boxes`` in the same pixels: a vector for each, in their order, by `dense`, or without such a graph that of the
    nearest proposal; the boxes come back clipped to the picture. None: the proposals of the graph `regions`, best
    first, or without such a graph the windows of `Grid`.

    Raises `TaskNotServed` if the bundle has neither graph; `BadRequest` for boxes that are impossible or lie outside of
    the picture, with the number of the box; the `InputError`s of pictures.
    """
    graphs = bundle.manifest.graphs
    if "regions" not in graphs or ("dense" in graphs and boxes is not None):
        place = yield from located(bundle, image, Grid() if boxes is None else boxes)
        return (yield from vectors_of(bundle, place)), place.boxes
    wanted = None if boxes is None else checked(boxes)
    views = yield from elongated.views(bundle, image)
    inside = None if wanted is None else clipped(wanted, views[0].frame)
    outputs, frame = yield from elongated.look(views)
    if inside is not None:
        rows = [pick(outputs, box, drawn=True)[0] for box in frame.to_input(inside)]
        return unit(np.stack(rows)), inside
    proposed = frame.to_original(outputs["boxes"][0])
    objectness = outputs["objectness"][0]
    real = (objectness > 0) & (proposed[:, :2] < proposed[:, 2:]).all(axis=1)  # not in the padding
    order = np.argsort(-objectness, kind="stable")
    order = order[real[order]]
    return unit(outputs["class_embeds"][0][order]), proposed[order]


def located(bundle: Bundle, image: Picture, where: Boxes | Grid) -> Flow[Located]:
    """Boxes in pixels of the picture, or its windows. Raises as `region_vectors`."""
    if "dense" not in bundle.manifest.graphs:
        raise TaskNotServed(
            f"bundle {bundle.name!r} has no graph 'dense', which gives boxes their vectors; export the checkpoint with "
            "--dense values",
            known=bundle.manifest.graphs,
        )
    given = None if isinstance(where, Grid) else checked(where)
    feeds, frame = yield from views(bundle, image)
    if isinstance(where, Grid):
        return Located(feeds, frame, where.windows(frame.width, frame.height))
    assert given is not None
    return Located(feeds, frame, clipped(given, frame))


def vectors_of(bundle: Bundle, place: Located) -> Flow[Array]:
    """-> float32 [N, D], a unit row for each box."""
    outputs = yield from look(place.feeds)
    patches, size = outputs["patches"][0], bundle.image("dense").spec.size
    if "prompter" not in bundle.manifest.graphs:
        return region_embedding(patches, place.boxes, place.frame, size)
    boxes = in_cells(place.boxes, place.frame, size, patches.shape[:2])
    answer = yield Call("prompter", {"patches": patches[None], "boxes": boxes[None]})
    return unit(answer["region_embeds"][0])


def region_embedding(patches: Array, boxes: Array, frame: Frame, size: tuple[int, int]) -> Array:
    """Patches [h, w, D] and boxes [N, 4] in pixels of the picture -> float32 [N, D] unit rows; see `pooled`. ``size``:
    rows and columns of the graph's input in pixels, which ``frame`` maps the picture to."""
    return unit(pooled(patches, in_cells(boxes, frame, size, patches.shape[:2])))


def in_cells(boxes: Array, frame: Frame, size: tuple[int, int], grid: tuple[int, ...]) -> Array:
    """Boxes [N, 4] in pixels of the picture -> float32 [N, 4] in cells of a map of ``grid`` rows and columns."""
    rows, columns = (cells / pixels for cells, pixels in zip(grid, size, strict=True))
    moved: Array = (frame.to_input(boxes) * np.array([columns, rows] * 2)).astype(np.float32)
    return moved


def pooled(patches: Array, boxes: Array) -> Array:
    """Patches [h, w, D] and boxes [N, 4] in cells -> float32 [N, D]: the mean over each box, not normalized.

    A cell is weighted by the area of it that lies in the box. So the mean is linear in the patches; the whole map gives
    the mean of all patches, and a box of whole cells the mean of its slice. A box of less than a hundredth of a cell in
    one direction counts as that wide.
    """
    rows, columns, width = patches.shape
    tall, wide = _cover(boxes[:, 1], boxes[:, 3], rows), _cover(boxes[:, 0], boxes[:, 2], columns)
    weights = (tall[:, :, None] * wide[:, None, :]).reshape(len(boxes), -1)
    means: Array = (weights @ patches.reshape(-1, width)).astype(np.float32)
    return means


def _cover(low: Array, high: Array, cells: int) -> Array:
    """float32 [N, cells], rows of sum 1: the part of [low, high] that lies in each cell."""
    edges = np.arange(cells)
    middle = np.clip((low + high) / 2, 0.005, cells - 0.005)[:, None]
    half = np.maximum((high - low) / 2, 0.005)[:, None]
    covered = np.clip(np.minimum(middle + half, edges + 1) - np.maximum(middle - half, edges), 0.0, None)
    parts: Array = (covered / covered.sum(axis=1, keepdims=True)).astype(np.float32)
    return parts


def checked(boxes: Boxes) -> Array:
    """-> float64 [N, 4]. Raises `BadRequest` with the number of the first impossible box, or if there is none."""
    if not len(boxes):
        raise BadRequest("boxes is empty; expected at least one box x0, y0, x1, y1")
    for number, box in enumerate(boxes):
        values = [*map(float, box)]
        if len(values) != 4 or not all(map(isfinite, values)) or not (values[0] < values[2] and values[1] < values[3]):
            raise BadRequest(f"box {number} is {values}; expected x0, y0, x1, y1 in pixels, x0 < x1 and y0 < y1")
    return np.array([[*map(float, box)] for box in boxes], np.float64)


def clipped(boxes: Array, frame: Frame) -> Array:
    """-> float32 [N, 4]: the parts of the boxes inside the picture. Raises `BadRequest` if one has none."""
    cut: Array = np.clip(boxes, 0.0, [frame.width, frame.height] * 2).astype(np.float32)
    outside = np.flatnonzero((cut[:, 2:] <= cut[:, :2]).any(axis=1))
    if outside.size:
        number, size = outside[0], f"{frame.width} x {frame.height} pixels"
        raise BadRequest(f"box {number}, {boxes[number].tolist()}, lies outside of its picture, {size}")
    return cut


def check_dense(manifest: Manifest) -> None:
    """Raises `ValueError` if the manifest's `dense` is not one that `located` can feed, or its `prompter` is not."""
    if (graph := manifest.graphs.get("dense")) is None:
        return
    exactly("dense", "outputs", graph.outputs, ("patches",), also=graph.outputs)
    if len(graph.outputs["patches"].shape) != 4 or not isinstance(graph.preprocess, ImagePreprocess):
        raise ValueError("graph 'dense' must take pictures, and its output 'patches' must be float32 [B, h, w, D]")
    check_guide(manifest)
    if prompter := manifest.graphs.get("prompter"):
        exactly("prompter", "inputs", prompter.inputs, PROMPTER)
        exactly("prompter", "outputs", prompter.outputs, ("region_embeds",))
