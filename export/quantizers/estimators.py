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
_CHUNK = 1 << 16  # numbers whose errors are computed at once, so that they stay in the caches

WeightRange = Literal["minmax", "mse"]


@dataclass(frozen=True)
class Grid:
    """The integers from ``least`` to ``most``, the ends of a range: uint8 if ``least`` is 0, else int8."""

    least: int
    most: int

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        return np.int8 if self.least else np.uint8

    @classmethod
    def of(cls, weight: Array, bits: int) -> "Grid":
        """[0, 2^bits - 1] for a tensor without negative numbers, else symmetric: [-2^(bits-1), 2^(bits-1) - 1]."""
        if weight.size and float(weight.min()) >= 0:
            return cls(0, 2**bits - 1)
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def nearest(self, values: Array, scale: np.float32) -> Array:
        """Round ``values`` to integers, half to even; same dtype, at least float32."""
        return np.clip(np.rint(values / scale), self.least, self.most)


def weight_scale(weight: Array, grid: Grid, how: WeightRange) -> np.float32:
    """minmax: max|w| / 127 in 8 bits. mse: the range of the least squared error among 100 ranges, evenly over
    (0, max|w| + 0.5], the smaller one of two equals; the margin allows a range wider than the weights."""
    largest = float(np.abs(weight).max()) if weight.size else 0.0
    if how == "minmax":
        return _scale(largest, grid)
    candidates = [_scale((largest + MARGIN) * part / CANDIDATES, grid) for part in range(1, CANDIDATES + 1)]
    errors = np.zeros(CANDIDATES)
    flat = np.asarray(weight, np.float32).reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        errors += [float(np.square(grid.nearest(chunk, s) * s - chunk).sum(dtype=np.float64)) for s in candidates]
    return candidates[int(np.argmin(errors))]


def _scale(largest: float, grid: Grid) -> np.float32:
    scale = np.float32(largest / grid.most)
    return scale if scale >= np.finfo(np.float32).tiny else np.float32(1.0)


class Running:
    """The range of each tensor over batches: m <- 0.9 m + 0.1 (extreme of the batch); the first batch sets m.

    With ``percentile`` p under 100, a batch's extremes are the percentiles 100 - p and p of all its numbers, linearly
    interpolated. `batches` ends a batch; within a batch rows may come in any order.
    """

    def __init__(self, batch: int, percentile: float) -> None:
        self.batch, self.percentile = batch, percentile
        self.ranges: dict[str, tuple[float, float]] = {}
        self._tails: dict[str, _Tails] = {}
        self._rows = 0

    def batches(self, feeds: Feeds) -> Iterator[Mapping[str, Array]]:
        """The feeds in their order, ``batch`` at a time. Within a batch the longest comes first, because its number of
        values bounds how many numbers of a tail to keep."""
        batch: list[Mapping[str, Array]] = []
        for feed in feeds:
            batch.append(feed)
            if len(batch) == self.batch:
                yield from self._batch(batch)
                batch = []
        if batch:
            yield from self._batch(batch)

    def _batch(self, batch: Sequence[Mapping[str, Array]]) -> Iterator[Mapping[str, Array]]:
        self._rows = len(batch)
        yield from sorted(batch, key=lambda feed: -sum(array.size for array in feed.values()))
        for name, tails in self._tails.items():
            now, before = tails.range(self.percentile), self.ranges.get(name)
            if before is not None:
                low, high = (MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(before, now, strict=True))
            self.ranges[name] = now if before is None else (low, high)
        self._tails = {}

    def add(self, name: str, values: Array) -> None:
        """Take the values of a tensor for one feed into the current batch."""
        tails = self._tails.setdefault(name, _Tails())
        beyond = (100.0 - self.percentile) / 100
        tails.add(values.reshape(-1), ceil(beyond * values.size * self._rows) + 2 if beyond else 1)


class _Tails:
    """The smallest and the largest numbers of a stream: as many as the largest ``keep`` of a call."""

    def __init__(self) -> None:
        self.low, self.high = np.empty(0, np.float32), np.empty(0, np.float32)
        self.count, self.keep = 0, 0

    def add(self, values: Array, keep: int) -> None:
        self.count += len(values)
        self.keep = max(self.keep, keep)
        self.low = _least(np.concatenate([self.low, _least(values, self.keep)]), self.keep)
        self.high = -_least(np.concatenate([-self.high, _least(-values, self.keep)]), self.keep)

    def range(self, percentile: float) -> tuple[float, float]:
        beyond = (100.0 - percentile) / 100 * (self.count - 1)
        return _at(np.sort(self.low), beyond), -_at(np.sort(-self.high), beyond)


def _least(values: Array, keep: int) -> Array:
    return values if len(values) <= keep else np.partition(values, keep - 1)[:keep]


def _at(ordered: Array, place: float) -> float:
    """The number at a fractional position of ``ordered``, linearly interpolated."""
    floor = int(place)
    first, second = float(ordered[floor]), float(ordered[min(floor + 1, len(ordered) - 1)])
    return first + (place - floor) * (second - first)
