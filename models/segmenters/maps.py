"""The graph `dense` over a picture -> its maps, which segmenters read."""

from dataclasses import dataclass, replace
from functools import partial
from math import ceil, floor
from typing import Any

import numpy as np
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.bundle.manifest import ImagePreprocess, Manifest
from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array, Arrays, Flow, Together, Work
from calmclip.models.preprocess.image import ImagePreparer, whole_size
from calmclip.models.preprocess.placement import Frame
from calmclip.models.segmenters import ScoreMap, Windows
from calmclip.models.segmenters.windows import Splice, plan, whole, window
from calmclip.models.tasks.dense import DENSE, look, roles, views
from calmclip.models.tasks.features import unit

MAPS = ("patches", "keys", "objectness")  # outputs of `dense`
TOGETHER = 4  # windows that a driver may run at once
EDGE = 1e-3  # cells: an edge of the picture so near to one of a cell is on it


@dataclass(frozen=True)
class Maps:
    """Outputs of the graph `dense` for a whole picture. ``patches`` float32 [h, w, D], not normalized; ``keys`` float32
    [h, w, C], unit vectors whose cosine says how alike two patches are; ``objectness`` float32 [h, w] in [0, 1]; the
    last two are None if the graph does not answer them. ``frame`` maps the upright picture to cells."""

    patches: Array
    frame: Frame
    keys: Array | None = None
    objectness: Array | None = None


def dense_maps(bundle: Bundle, image: Image.Image, windows: Windows | None = None) -> Flow[Maps]:
    """``windows`` None: the graph sees the whole picture at once. Otherwise a driver may run up to `TOGETHER` windows
    at once, and memory grows with the map of the whole picture. Raises `BadRequest` for impossible windows."""
    if windows is not None:
        return (yield from _spliced(bundle, image, windows))
    feeds, frame = yield from views(bundle, image)
    outputs = yield from look(feeds)
    return maps_of(outputs, frame, bundle.image(DENSE).spec.size)


def _spliced(bundle: Bundle, image: Image.Image, windows: Windows) -> Flow[Maps]:
    """The maps of windows as those of one picture. The mean of unit keys is made a unit vector again."""
    specs = {role: bundle.image(role).spec for role in roles(bundle)}
    cells = bundle.graph(DENSE).outputs["patches"].shape[1:3]
    if not (isinstance(cells[0], int) and isinstance(cells[1], int)):
        raise BadRequest(f"windows need a map of one size; that of {bundle.name!r} has the shape {list(cells)}")
    windowed = plan(windows, image.width, image.height, specs[DENSE].size, (cells[0], cells[1]))
    pixels: dict[str, Array] = {}
    for role, spec in specs.items():
        preparer = ImagePreparer(whole(spec, windowed.size_for(spec.size)), bundle.image(role).library)
        pixels[role], _ = yield Work("preprocess", partial(preparer.prepare, image))
    splice = Splice(windowed.grid)
    for start in range(0, len(windowed.places), TOGETHER):
        places = windowed.places[start : start + TOGETHER]
        seen = [{role: window(specs[role], windowed, place, pixels[role]) for role in specs} for place in places]
        answers: list[Arrays] = yield Together([look(feeds) for feeds in seen])
        for place, outputs in zip(places, answers, strict=True):
            splice.add({name: outputs[name] for name in MAPS if name in outputs}, place)
    means = splice.mean()
    if "keys" in means:
        means["keys"] = unit(means["keys"])
    return Maps(frame=windowed.frame(*whole_size(image)), **means)


def maps_of(outputs: Arrays, frame: Frame, size: tuple[int, int]) -> Maps:
    """Outputs of one run of `dense` [1, h, w, ...]. ``frame`` maps the picture to the pixels of the graph's input,
    which has ``size`` rows and columns."""
    patches = outputs["patches"][0]
    maps: dict[str, Any] = {name: outputs[name][0] for name in MAPS if name in outputs}
    return Maps(frame=in_cells(frame, size, patches.shape[:2]), **maps)


def inside(maps: Maps) -> Maps:
    """Without the rows and columns that lie in the padding: no patch is pooled with those."""
    frame, (rows, columns) = maps.frame, maps.patches.shape[:2]
    left, right = _covered(frame.width, frame.scale[0], frame.offset[0], columns)
    top, bottom = _covered(frame.height, frame.scale[1], frame.offset[1], rows)
    part = np.s_[top:bottom, left:right]
    moved = replace(frame, offset=(frame.offset[0] - left, frame.offset[1] - top))
    kept: dict[str, Any] = {name: array if (array := getattr(maps, name)) is None else array[part] for name in MAPS}
    return Maps(frame=moved, **kept)


def _covered(pixels: int, scale: float, offset: float, cells: int) -> tuple[int, int]:
    """The first of ``cells`` along a side of a picture, and the one after the last; at least one."""
    first = min(max(floor(offset + EDGE), 0), cells - 1)
    return first, max(min(ceil(pixels * scale + offset - EDGE), cells), first + 1)


def in_cells(frame: Frame, size: tuple[int, int], grid: tuple[int, ...]) -> Frame:
    """A frame of an input of ``size`` rows and columns of pixels -> the frame of its map of ``grid`` rows and
    columns."""
    y, x = (cells / pixels for cells, pixels in zip(grid, size, strict=True))
    scale, offset = frame.scale, frame.offset
    return Frame(frame.width, frame.height, (scale[0] * x, scale[1] * y), (offset[0] * x, offset[1] * y))


def compared(patches: Array, text: Array, background: Array, scale: float, bias: float, frame: Frame) -> ScoreMap:
    """``scale`` * cosine of each patch [h, w, D] with each label [C, D]; the background's logit is that of its best
    word [K, D] + ``bias``."""
    rows, columns, width = patches.shape
    units = unit(patches.reshape(-1, width))
    logits = np.float32(scale) * (text @ units.T)
    others = np.full(rows * columns, -np.inf, np.float32)
    if len(background):
        others = np.float32(scale) * (background @ units.T).max(axis=0) + np.float32(bias)
    return ScoreMap(logits.reshape(-1, rows, columns), others.reshape(rows, columns), frame)


def without_dense(manifest: Manifest) -> str | None:
    """What a bundle lacks for a method that compares patches with texts; None if it lacks nothing."""
    graph = manifest.graphs.get("dense")
    if graph is None or "text" not in manifest.graphs:
        return "it has no graphs 'dense' and 'text'; export the checkpoint with --dense"
    if "patches" not in graph.outputs or not isinstance(graph.preprocess, ImagePreprocess):
        return "its graph 'dense' takes no pictures, or has no output 'patches'"
    return None
