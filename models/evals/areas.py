"""Areas under curves of many subsets of pictures at once, for any number of copies of each picture.

Source: Fawcett 2006 (Pattern Recognition Letters 27), section 7: the AUROC is the probability that a positive scores
above a negative, and a tie counts one half. Average precision, sum over thresholds of (R_n - R_{n-1}) P_n, as in
scikit-learn; pictures with equal scores share one threshold. Adjusted AUPRC: 1 - ln(AUPRC) / ln(prevalence), the
protocol of TheoSourget/clip_cxr_fairness.

Cost: scores are sorted once. A call is a dozen passes over the pictures of all subsets, O(sum of their sizes).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from calmclip.models.flow import Array


class Subset(NamedTuple):
    """``places`` int [n], n >= 1: the pictures; ``scores`` float [n] and ``positive`` bool [n] of them."""

    places: Array
    scores: Array
    positive: Array


class Measured(NamedTuple):
    """float64 [S], one for each subset; NaN without positives, and, but for ``precision``, without negatives."""

    auroc: Array
    precision: Array
    prevalence: Array

    @property
    def adjusted(self) -> Array:
        return adjusted(self.precision, self.prevalence)


def adjusted(precision: Array, prevalence: Array) -> Array:
    """1 - ln(precision) / ln(prevalence): 0 at chance, 1 at perfect; NaN for a prevalence of 0 or 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = (prevalence > 0) & (prevalence < 1)
        value: Array = np.where(inside, 1 - np.log(precision) / np.log(prevalence), np.nan)
    return value


class Areas:
    """``areas(copies)``: copies float [N] of each picture, such as its count in a resample -> `Measured`.

    ``precise``: the first so many subsets have a precision; None: all. It takes half of the time.
    """

    def __init__(self, subsets: Sequence[Subset], precise: int | None = None) -> None:
        orders = [np.argsort(subset.scores, kind="stable") for subset in subsets]
        self._places = _flat([s.places[order] for s, order in zip(subsets, orders, strict=True)], np.int64)
        self._positive = _flat([s.positive[order] for s, order in zip(subsets, orders, strict=True)], np.float64)
        # a run holds the pictures of one subset with one score; runs and subsets are slices of what is flat
        starts = [_starts(s.scores[order]) for s, order in zip(subsets, orders, strict=True)]
        begins = np.cumsum([0, *(len(s.places) for s in subsets)])
        self._runs = _flat([start + begin for start, begin in zip(starts, begins[:-1], strict=True)], np.int64)
        self._counts = np.array([len(start) for start in starts], np.int64)  # runs of each subset
        self._subsets = np.cumsum(self._counts) - self._counts
        self._precise = len(subsets) if precise is None else precise

    def __call__(self, copies: Array) -> Measured:
        if not len(self._subsets):
            return Measured(*np.empty((3, 0)))
        alls = copies.astype(np.float64)[self._places]
        positives = alls * self._positive
        if len(self._runs) < len(alls):  # there are ties
            positives, alls = np.add.reduceat(positives, self._runs), np.add.reduceat(alls, self._runs)
        negatives = alls - positives
        total, all_positive = (np.add.reduceat(each, self._subsets) for each in (alls, positives))
        # Counts are whole numbers, so sums over all subsets are exact, and those of earlier subsets can be taken off.
        below = np.cumsum(negatives)
        earlier = below[self._subsets] - negatives[self._subsets]
        below -= negatives / 2  # a tie is half a win
        wins = np.add.reduceat(below * positives, self._subsets) - earlier * all_positive
        with np.errstate(divide="ignore", invalid="ignore"):
            auroc = wins / (all_positive * (total - all_positive))
            return Measured(auroc, self._precision(positives, alls, all_positive, total), all_positive / total)

    def _precision(self, positives: Array, alls: Array, all_positive: Array, total: Array) -> Array:
        """float64 [S], NaN after the precise ones. The threshold of a run keeps the run and all runs above it."""
        subsets, counts = self._subsets[: self._precise], self._counts[: self._precise]
        precision = np.full(len(self._subsets), np.nan)
        if not len(subsets):
            return precision
        end = subsets[-1] + counts[-1]
        kept, right = (
            np.repeat(np.cumsum(sums)[: self._precise], counts) - np.cumsum(runs[:end]) + runs[:end]
            for sums, runs in ((total, alls), (all_positive, positives))
        )
        parts = np.divide(right, kept, out=np.zeros(end), where=kept > 0) * positives[:end]
        precision[: self._precise] = np.add.reduceat(parts, subsets) / all_positive[: self._precise]
        return precision


def _flat(parts: Sequence[Array], dtype: type) -> Array:
    return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)


def _starts(scores: Array) -> Array:
    """Where a run of equal sorted scores starts."""
    return np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
