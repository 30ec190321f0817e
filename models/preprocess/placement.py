"""Where a picture lies in a graph's input: the size it is resized to, its offset, and the way back for boxes."""

from dataclasses import dataclass

import numpy as np

from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.flow import Array


@dataclass(frozen=True)
class Frame:
    """Maps boxes between a picture of ``width`` x ``height`` pixels (upright) and a graph's input.

    input = original * scale + offset, per axis (x, y).
    """

    width: int
    height: int
    scale: tuple[float, float]
    offset: tuple[float, float]

    def to_original(self, boxes: Array) -> Array:
        """float32 [N, 4] x0 y0 x1 y1 in pixels of the input -> in pixels of the original, clipped to the picture."""
        scale = np.array(self.scale * 2, np.float32)
        offset = np.array(self.offset * 2, np.float32)
        limit = np.array([self.width, self.height] * 2, np.float32)
        original: Array = np.clip((boxes - offset) / scale, 0.0, limit).astype(np.float32)
        return original

    def to_input(self, boxes: Array) -> Array:
        """float32 [N, 4] in pixels of the original -> in pixels of the input."""
        moved: Array = boxes * np.array(self.scale * 2, np.float32) + np.array(self.offset * 2, np.float32)
        return moved.astype(np.float32)

    def enlarged(self, width: int, height: int) -> "Frame":
        """The frame of the picture of ``width`` x ``height`` pixels of which this frame's was decoded: a pixel here is
        a square of whole pixels there; the last ones may reach over the border."""
        step = round(width / self.width) if self.width < width else round(height / self.height)
        scale = (self.scale[0] / step, self.scale[1] / step)
        return Frame(width, height, scale, self.offset) if step > 1 else self


@dataclass(frozen=True)
class Placement:
    """A picture is resized to ``width`` x ``height``; its part from (``left``, ``top``) on fills the graph's input."""

    width: int
    height: int
    left: int = 0
    top: int = 0


def place(spec: ImagePreprocess, width: int, height: int) -> tuple[Placement, Frame]:
    """The placement of a picture of ``width`` x ``height`` pixels, and the frame that maps its boxes."""
    (rows, cols), left, top = spec.size, 0, 0
    source = (max(width, height),) * 2 if spec.resize == "square" else (width, height)
    if spec.resize in ("exact", "square") or (spec.keep_square and width == height):
        w, h = cols, rows
    elif spec.resize == "letterbox":
        ratio = min(cols / width, rows / height)
        w, h = max(1, round(width * ratio)), max(1, round(height * ratio))
    else:
        assert spec.shortest is not None  # the manifest is valid
        longer = int(spec.shortest * max(source) / min(source))
        w, h = (spec.shortest, longer) if width <= height else (longer, spec.shortest)
        left, top = _margin(spec, w - cols), _margin(spec, h - rows)
    frame = Frame(width, height, (w / source[0], h / source[1]), (0.0 - left, 0.0 - top))
    return Placement(w, h, left, top), frame


def columns_first(width: int, height: int, to_width: int, to_height: int) -> bool:
    """Whether the height is resized before the width, as in Pillow 13: if it shrinks by more than twice as many pixels.

    The order changes the result, because values are rounded to 8 bits between the two passes.
    """
    return height > to_height and height - to_height > 2 * (width - to_width)


def source_range(start: int, count: int, scale: float, side: int) -> tuple[float, float, range]:
    """The source samples that ``count`` outputs from ``start`` on need, and where the outputs begin and end in them."""
    low, high, reach = start / scale, (start + count) / scale, 2 * max(1 / scale, 1.0) + 2
    within = range(max(int(low - reach), 0), min(int(high + reach) + 1, side))
    return low - within.start, min(high, side) - within.start, within


def _margin(spec: ImagePreprocess, spare: int) -> int:
    return spare // 2 if spec.crop_offset == "floor" else round(spare / 2.0)
