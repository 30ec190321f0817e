"""Maps of scores on a picture: from the cells of a graph to the upright picture, smoothed, and as PNG."""

from io import BytesIO
from math import ceil

import numpy as np
from PIL import Image

from calmclip.models.flow import Array
from calmclip.models.preprocess.placement import Frame
from calmclip.models.tasks.cells import Cells

MAP_SIDE = 128  # cells of the longer side of a map
_BAND = 1 << 20  # pixels that are enlarged at once


def on_picture(plane: Array, where: Cells, frame: Frame, side: int = MAP_SIDE) -> Array:
    """``plane`` float32 [rows, columns], of the cells of ``where`` -> float32 in the picture's proportions, its longer
    side ``side``: bilinear between the middles of cells, as they are beyond the outer ones."""
    ratio = side / max(frame.width, frame.height)
    width, height = (max(1, round(ratio * pixels)) for pixels in (frame.width, frame.height))
    x0, y0, x1, y1 = where.box
    before = max(0, ceil(-x0)), max(0, ceil(-y0))
    after = max(0, ceil(x1 - where.columns)), max(0, ceil(y1 - where.rows))
    wide = np.pad(plane.astype(np.float32), ((before[1], after[1]), (before[0], after[0])), mode="edge")
    box = (x0 + before[0], y0 + before[1], x1 + before[0], y1 + before[1])
    picture = Image.fromarray(wide).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(picture, np.float32)


def smoothed(plane: Array, sigma: tuple[float, float]) -> Array:
    """A Gaussian of ``sigma`` cells down and across, cut at 4 sigma; beyond a border the plane is mirrored."""
    for axis, width in enumerate(sigma):
        reach = int(4 * width + 0.5)
        if not reach:
            continue
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
        padded = np.pad(plane, [(reach, reach) if axis == a else (0, 0) for a in (0, 1)], mode="symmetric")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(weights), axis=axis)
        plane = windows @ (weights / weights.sum()).astype(np.float32)
    return plane


def png(plane: Array, size: tuple[int, int], low: float, high: float) -> bytes:
    """``plane`` float32 [h, w] enlarged bilinearly to ``size``, width and height, as a PNG of 256 colours: black for
    ``low`` and below, then red, yellow, and white for ``high`` and above.

    Memory: a byte for each pixel of ``size``, beside a band of rows.
    """
    width, height = size
    heat = Image.fromarray(np.clip((plane - low) / max(high - low, 1e-12), 0.0, 1.0).astype(np.float32) * 255)
    picture = Image.new("P", size)
    picture.putpalette(_palette())
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        box = (0, top * heat.height / height, heat.width, bottom * heat.height / height)
        band = heat.resize((width, bottom - top), Image.Resampling.BILINEAR, box=box)
        picture.paste(Image.fromarray((np.asarray(band) + 0.5).astype(np.uint8)), (0, top))
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _palette() -> list[int]:
    """Black, red, yellow, white: each colour in turn takes a third of the levels to rise."""
    levels = np.arange(256) * (3 / 255)
    colours = np.clip(levels[:, None] - np.arange(3), 0, 1) * 255
    return [*map(int, colours.round().ravel())]
