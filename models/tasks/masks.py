"""`Mask`: pixels of a picture as run lengths, its text as in COCO, and its pictures as PNG.

A run counts equal pixels down the columns, from left to right; the first run counts pixels outside of the mask. The
text is that of `pycocotools.mask`: each count in groups of 5 bits; from the fourth on, the difference to the count
before the last.

Source: the COCO API, Lin et al. 2014 (arXiv 1405.0312), `rleToString`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from calmclip.models.flow import Array

_GROUPS = 7  # of 5 bits: a count has fewer than 2^34


@dataclass(frozen=True)
class Mask:
    """``counts`` int64 [R]: lengths of runs of a picture of ``width`` x ``height`` pixels, which they sum to."""

    width: int
    height: int
    counts: Array

    @cached_property
    def area(self) -> int:
        """Pixels in the mask."""
        return int(self.counts[1::2].sum())

    def pixels(self) -> Array:
        """bool [height, width]."""
        inside = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(inside, self.counts).reshape(self.width, self.height).T

    def rle(self) -> dict[str, Any]:
        """The mask as COCO writes it in JSON: ``size`` [height, width], ``counts`` a text."""
        return {"size": [self.height, self.width], "counts": compressed(self.counts)}

    def png(self) -> bytes:
        """Of one bit a pixel: white inside the mask."""
        return _png(Image.fromarray(self.pixels()).convert("1"))


class Painted:
    """Names of pixels, int [h, w], enlarged to ``width`` x ``height`` pixels as the nearest neighbour -> masks.

    Memory grows with the runs, not with the pixels: of columns that become several equal ones, one is looked at.
    ``runs``: at least so many runs have the masks of all names from 0 on together, to within one run per column.
    """

    def __init__(self, names: Array, width: int, height: int) -> None:
        self.columns, self.width, self.height = names.T, width, height
        self.times = np.diff(starts(width, names.shape[1]))  # of each column in the picture
        self.rows = starts(height, names.shape[0])
        self.x, self.y = np.nonzero(self.columns[:, 1:] != self.columns[:, :-1])
        self.upper, self.lower = self.columns[self.x, self.y], self.columns[self.x, self.y + 1]
        sides = (self.upper >= 0).astype(np.int64) + (self.lower >= 0)
        self.runs = int(self.times[self.x] @ sides)

    def mask(self, name: int) -> Mask:
        edges = np.flatnonzero((self.upper == name) | (self.lower == name))
        source = np.repeat(np.arange(len(self.times)), self.times)
        each = np.bincount(self.x[edges], minlength=len(self.times))
        counts = each[source]
        ends = np.cumsum(counts)
        taken = edges[np.arange(ends[-1]) + np.repeat((np.cumsum(each) - each)[source] - (ends - counts), counts)]
        inside = np.repeat(np.arange(self.width), counts) * self.height + self.rows[self.y[taken] + 1]
        first, last = (self.columns[source, side] == name for side in (0, -1))
        between = np.flatnonzero(first[1:] != last[:-1]) + 1
        places = np.sort(np.concatenate((inside, between * self.height)))
        start = [0, 0] if first[0] else [0]
        return Mask(self.width, self.height, np.diff(np.concatenate((start, places, [self.width * self.height]))))


def starts(size: int, cells: int) -> Array:
    """int64 [cells + 1]: the first of ``size`` pixels of each of ``cells``, and the end. A pixel belongs to the cell
    that its middle lies in."""
    return -((cells - 2 * size * np.arange(cells + 1)) // (2 * cells))


def compressed(counts: Array) -> str:
    """int64 [R] -> COCO's text of run lengths."""
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    rest = values[:, None] >> (5 * np.arange(_GROUPS + 1))
    groups, after = rest[:, :-1] & 31, rest[:, 1:]
    more = after != np.where(groups & 16, -1, 0)
    kept = np.concatenate((np.ones((len(values), 1), bool), more[:, :-1]), axis=1)
    characters: Array = ((groups | 32 * more) + 48)[kept].astype(np.uint8)
    return characters.tobytes().decode("ascii")


def palette(count: int) -> Array:
    """uint8 [count, 3]: colours that differ, the first of them the most."""
    hues = np.arange(count) * 0.61803398875 % 1
    levels = np.where(np.arange(count) // 8 % 2, 0.65, 0.95)[:, None]
    waves = np.clip(np.abs((hues[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    colours: Array = (255 * levels * (0.25 + 0.75 * waves) + 0.5).astype(np.uint8)
    return colours


def indexed_png(
    width: int, height: int, masks: Sequence[tuple[int, Mask]], colours: Array, labels: Mapping[int, str]
) -> bytes:
    """One picture of palette indices: 0 outside of all masks. ``masks``: an index from 1 on, and its mask; where masks
    overlap, the last is shown. ``colours`` uint8 [N, 3]: of the indices from 1 on. ``labels``: index -> label; the
    file has it as JSON in its text `labels`."""
    columns = np.zeros((width, height), np.uint8)  # in the order of the runs, which is much faster
    for index, mask in masks:
        np.copyto(columns, index, where=mask.pixels().T)
    picture = Image.fromarray(columns.T)
    picture.putpalette([0, 0, 0, *colours.ravel().tolist()])
    texts = PngInfo()
    texts.add_itxt("labels", json.dumps(labels, ensure_ascii=False))
    return _png(picture, texts)


def _png(picture: Image.Image, texts: PngInfo | None = None) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1, pnginfo=texts)
    return file.getvalue()
