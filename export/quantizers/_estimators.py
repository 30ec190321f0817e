"""Scales of whole tensors as the paper's code estimates them: of weights, and of activations over batches.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), appendix C.4, and the authors' code; running minima and maxima:
Krishnamoorthi 2018 (arXiv 1806.08342), section 3.1.1.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from calmclip.export.quantizers import Feeds
from calmclip.models.flow import Array

MOMENTUM = 0.9
CANDIDATES, MARGIN = 100, 0.5
_CHUNK = 1 << 16  # numbers whose errors are worked out at once: they stay in the caches

WeightRange = Literal["minmax", "mse"]


@dataclass(frozen=True)
class Grid:
    """The integers ``least`` to ``most``, which is where a range ends: int8, or uint8 where ``least`` is 0."""

    least: int
    most: int

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        return np.int8 if self.least else np.uint8

    @classmethod
    def of(cls, weight: Array, bits: int) -> "Grid":
        """Symmetric, [-2^(bits-1), 2^(bits-1) - 1]; of a tensor without a negative number [0, 2^bits - 1]."""
        if weight.size and float(weight.min()) >= 0:
            return cls(0, 2**bits - 1)
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def nearest(self, values: Array, scale: np.float32) -> Array:
        """The integers of ``values``, half to even, float32 or as wide as these."""
        return np.clip(np.rint(values / scale), self.least, self.most)


def weight_scale(weight: Array, grid: Grid, how: WeightRange) -> np.float32:
    """minmax: max|w| / 127 in 8 bits. mse: of 100 ranges, evenly over (0, max|w| + 0.5], the one of the least squared
    error, the smaller one where two are equal; the margin lets a range be wider than the weights."""
    largest = float(np.abs(weight).max()) if weight.size else 0.0
    if how == "minmax":
        return _scale(largest, grid)
    tried = [_scale((largest + MARGIN) * part / CANDIDATES, grid) for part in range(1, CANDIDATES + 1)]
    lost = np.zeros(CANDIDATES)
    flat = np.asarray(weight, np.float32).reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        lost += [float(np.square(grid.nearest(chunk, s) * s - chunk).sum(dtype=np.float64)) for s in tried]
    return tried[int(np.argmin(lost))]


def _scale(largest: float, grid: Grid) -> np.float32:
    found = np.float32(largest / grid.most)
    return found if found >= np.finfo(np.float32).tiny else np.float32(1.0)


class Running:
    """Of each tensor the range over batches: m <- 0.9 m + 0.1 (extreme of the batch), the first batch sets m.

    ``percentile`` under 100: of a batch not the extremes but the percentiles p and 100 - p of all its numbers, linear
    between two. `batches` says when one ends; within it rows may come in any order.
    """

    def __init__(self, batch: int, percentile: float) -> None:
        self.batch, self.percentile = batch, percentile
        self.ranges: dict[str, tuple[float, float]] = {}
        self._tails: dict[str, _Tails] = {}
        self._rows = 0

    def batches(self, feeds: Feeds) -> Iterator[Mapping[str, Array]]:
        """The feeds, ``batch`` at a time in their order; of one batch the longest first, whose number of values says
        how many of a tail to keep."""
        held: list[Mapping[str, Array]] = []
        for feed in feeds:
            held.append(feed)
            if len(held) == self.batch:
                yield from self._batch(held)
                held = []
        if held:
            yield from self._batch(held)

    def _batch(self, held: Sequence[Mapping[str, Array]]) -> Iterator[Mapping[str, Array]]:
        self._rows = len(held)
        yield from sorted(held, key=lambda feed: -sum(array.size for array in feed.values()))
        for name, tails in self._tails.items():
            now, before = tails.range(self.percentile), self.ranges.get(name)
            self.ranges[name] = now if before is None else _moved(before, now)
        self._tails = {}

    def see(self, name: str, values: Array) -> None:
        tails = self._tails.setdefault(name, _Tails())
        beyond = (100.0 - self.percentile) / 100
        tails.take(values.reshape(-1), ceil(beyond * values.size * self._rows) + 2 if beyond else 1)


def _moved(before: tuple[float, float], now: tuple[float, float]) -> tuple[float, float]:
    low, high = (MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(before, now, strict=True))
    return low, high


class _Tails:
    """The smallest and the largest numbers of a stream, as many as any one call asked to keep."""

    def __init__(self) -> None:
        self.low, self.high = np.empty(0, np.float32), np.empty(0, np.float32)
        self.number, self.kept = 0, 0

    def take(self, values: Array, keep: int) -> None:
        self.number += len(values)
        self.kept = max(self.kept, keep)
        self.low = _least(np.concatenate([self.low, _least(values, self.kept)]), self.kept)
        self.high = -_least(np.concatenate([-self.high, _least(-values, self.kept)]), self.kept)

    def range(self, percentile: float) -> tuple[float, float]:
        beyond = (100.0 - percentile) / 100 * (self.number - 1)
        return _at(np.sort(self.low), beyond), -_at(np.sort(-self.high), beyond)


def _least(values: Array, keep: int) -> Array:
    return values if len(values) <= keep else np.partition(values, keep - 1)[:keep]


def _at(ordered: Array, place: float) -> float:
    """Between two of ``ordered``."""
    whole = int(place)
    first, second = float(ordered[whole]), float(ordered[min(whole + 1, len(ordered) - 1)])
    return first + (place - whole) * (second - first)
