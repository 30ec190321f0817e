"""Connected components of pixels with names, and their boxes. Pixels of one name are connected if they touch at a side
or a corner.

Source: runs of rows that touch are joined, as in Rosenfeld and Pfaltz 1966; the joining in rounds of hooking and
pointer jumping, Shiloach and Vishkin 1982.
"""

from dataclasses import dataclass

import numpy as np

from calmclip.models.flow import Array


@dataclass(frozen=True)
class Components:
    """``names`` int64 [N]: of their pixels. ``boxes`` int64 [N, 4] x0 y0 x1 y1 in pixels, x1 and y1 outside; ``areas``
    int64 [N] in pixels; ``sums`` float64 [N]: the values of their pixels, added. In the order of their first pixels,
    row by row."""

    names: Array
    boxes: Array
    areas: Array
    sums: Array


def components(names: Array, values: Array) -> Components:
    """``names`` int [h, w]: pixels of one name are connected, those below 0 are left out; ``values`` float [h, w]."""
    rows, columns = names.shape
    firsts = np.ones(names.shape, bool)
    firsts[:, 1:] = names[:, 1:] != names[:, :-1]
    places = np.flatnonzero(firsts)  # of all runs, row by row
    ends = np.append(places[1:], rows * columns)
    kept = names.reshape(-1)[places] >= 0
    name, row, start = names.reshape(-1)[places][kept].astype(np.int64), *np.divmod(places[kept], columns)
    end = start + (ends - places)[kept]
    if not len(row):
        return Components(row, np.empty((0, 4), np.int64), row, np.empty(0))
    first, index = np.unique(_joined(len(row), *_touching(name, row, start, end, columns)), return_inverse=True)
    boxes = np.empty((len(first), 4), np.int64)
    boxes[:, :2], boxes[:, 2:] = max(rows, columns), 0
    for column, least in ((0, start), (1, row)):
        np.minimum.at(boxes[:, column], index, least)
    for column, most in ((2, end), (3, row + 1)):
        np.maximum.at(boxes[:, column], index, most)
    sums = np.bincount(index, np.add.reduceat(values.reshape(-1), places, dtype=np.float64)[kept])
    return Components(name[first], boxes, np.bincount(index, end - start).astype(np.int64), sums)


def _touching(name: Array, row: Array, start: Array, end: Array, columns: int) -> tuple[Array, Array]:
    """Pairs of runs of one name in neighbouring rows that touch: their numbers, upper and lower. Runs lie row by row,
    left to right."""
    wide = columns + 2
    first = np.searchsorted(row * wide + end, (row - 1) * wide + start)  # of the runs above, the first that touches
    last = np.searchsorted(row * wide + start, (row - 1) * wide + end, side="right")
    counts = np.maximum(last - first, 0)
    lower = np.repeat(np.arange(len(row)), counts)
    ends = np.cumsum(counts)
    upper = np.arange(len(lower)) + np.repeat(first - (ends - counts), counts)
    same = name[upper] == name[lower]
    return upper[same], lower[same]


def _joined(count: int, upper: Array, lower: Array) -> Array:
    """int64 [count]: the least number of the runs that each run is connected to."""
    names = np.arange(count)
    while not np.array_equal(a := names[upper], b := names[lower]):
        np.minimum.at(names, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(next_names := names[names], names):
            names = next_names
    return names
