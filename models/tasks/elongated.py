"""An elongated picture -> its regions: the graph `regions` runs on the whole picture and on overlapping slices of it.

A graph's input is a square, in which the short side of an elongated picture has few pixels and small things vanish. A
slice keeps them; the whole picture keeps what is longer than a slice.

Source: Akyon, Altinuc and Temizel 2022 (arXiv 2202.06934), sections 3 and 3.1: slicing and full inference. The measured
constants are in docs/performance.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import numpy as np

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.flow import Array, Arrays, Call, Flow, Work
from calmclip.models.preprocess.image import Picture, load, whole_size
from calmclip.models.preprocess.placement import Frame

ELONGATED = 2.0  # a picture whose long side / short side is larger is sliced
LENGTH, OVERLAP = 1.5, 0.5  # of a slice, along the long side, in short sides
MOST = 8  # slices; those of a picture over MOST + OVERLAP short sides long are longer
EDGE = 0.01  # short sides: a box so near to the cut of a slice is cut

Part = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright picture


@dataclass(frozen=True)
class View:
    """A part of a picture. ``feeds``: of the graph `regions`; ``frame`` maps their boxes to the whole picture;
    ``uncut`` float32 [4]: the least x0 and y0 and the most x1 and y1 of a box that lies whole in the part."""

    feeds: Arrays
    frame: Frame
    uncut: Array


def slices(width: int, height: int) -> list[Part]:
    """The parts of a picture of ``width`` x ``height`` pixels that are looked at alone; none if it is not elongated.

    They cover the picture at equal distances, and a thing of half the short side lies whole in one of them.
    """
    long, short = max(width, height), min(width, height)
    if long <= ELONGATED * short:
        return []
    count = min(MOST, ceil(long / short - OVERLAP))
    length = ceil(max(LENGTH * short, (long + (count - 1) * OVERLAP * short) / count))
    starts = np.linspace(0, long - length, count).round().astype(int).tolist()
    if width < height:
        return [(0, start, width, start + length) for start in starts]
    return [(start, 0, start + length, height) for start in starts]


def views(bundle: Bundle, image: Picture) -> Flow[Sequence[View]]:
    """The whole picture, followed by its `slices`. Raises `BadImage`, `ImageTooLarge`."""
    picture = yield Work("decode", lambda: load(image, max_pixels=bundle.max_pixels))
    preparer = bundle.image("regions")
    size = whole_size(picture)
    whole = (0, 0, *picture.size)
    pixels, frame = yield Work("preprocess", partial(preparer.prepare, picture))
    prepared = [View({preparer.spec.input: pixels}, frame, _uncut(whole, whole))]
    step = round(max(size) / max(picture.size))  # more than 1 if the decoder made the picture smaller
    for part in slices(*picture.size):
        pixels, frame = yield Work("preprocess", partial(preparer.prepare, picture.crop(part)))
        frame = _moved(frame, part, *picture.size).enlarged(*size)
        prepared.append(View({preparer.spec.input: pixels}, frame, _uncut(part, whole) * np.float32(step)))
    return prepared


def look(views: Sequence[View]) -> Flow[tuple[Arrays, Frame]]:
    """`run` and `merged`."""
    rows, frame, _ = merged(views, (yield from run(views)))
    return rows, frame


def run(views: Sequence[View]) -> Flow[list[Arrays]]:
    """-> outputs of the graph `regions` for each of the `views` of one picture.

    If the graph knows no objectness (1 in each row), rows have no order, and the whole picture alone answers.
    """
    outputs = [(yield Call("regions", views[0].feeds))]
    if len(views) > 1 and outputs[0]["objectness"].min() < 1:
        for view in views[1:]:
            outputs.append((yield Call("regions", view.feeds)))
    return outputs


def merged(views: Sequence[View], outputs: Sequence[Arrays]) -> tuple[Arrays, Frame, Array]:
    """-> one row [1, P, ...] for each box, as many as for a picture that is not sliced; the frame of the boxes; and for
    each row int [P], the index of its view. An output of another shape is that of the first view.

    Of all rows those of the highest objectness stay.
    """
    count = outputs[0]["objectness"].shape[1]
    if len(outputs) == 1:
        return outputs[0], views[0].frame, np.zeros(count, np.int64)
    answers = [{**answer, **_placed(view, answer)} for view, answer in zip(views, outputs, strict=True)]
    names = [name for name, array in answers[0].items() if array.shape[:2] == (1, count)]
    rows = {name: np.concatenate([answer[name] for answer in answers], axis=1) for name in names}
    best = np.argsort(-rows["objectness"][0], kind="stable")[:count]
    frame = replace(views[0].frame, scale=(1.0, 1.0), offset=(0.0, 0.0))
    return {**outputs[0], **{name: array[:, best] for name, array in rows.items()}}, frame, best // count


def _placed(view: View, outputs: Arrays) -> dict[str, Array]:
    """Boxes in pixels of the picture, and their objectness: 0 for a box that is cut or lies in the padding."""
    boxes = view.frame.to_original(outputs["boxes"][0])
    whole = (boxes[:, :2] >= view.uncut[:2]) & (boxes[:, 2:] <= view.uncut[2:]) & (boxes[:, :2] < boxes[:, 2:])
    return {"boxes": boxes[None], "objectness": outputs["objectness"] * whole.all(axis=1)}


def _moved(frame: Frame, part: Part, width: int, height: int) -> Frame:
    """The frame of a part as a frame of the whole picture."""
    scale, offset = frame.scale, frame.offset
    return Frame(width, height, scale, (offset[0] - part[0] * scale[0], offset[1] - part[1] * scale[1]))


def _uncut(part: Part, whole: Part) -> Array:
    """An edge of the part that is also one of the picture cuts no box."""
    margin = EDGE * min(whole[2:])
    inner = np.array(part) != whole
    edges = np.where(inner, np.array(part) + margin * np.array([1, 1, -1, -1]), [-np.inf, -np.inf, np.inf, np.inf])
    return edges.astype(np.float32)
