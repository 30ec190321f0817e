"""Temperature scaling, cross-fitted: each half of the pictures is judged at the temperature of the other half.

Source: Guo et al. 2017 (arXiv 1706.04599), sections 2 and 4.2. The temperature is the best one of a grid
(`calmclip.models.tasks.calibrate`, whose targets keep it finite if every picture is right), so that each resample of a
bootstrap fits its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from calmclip.models.evals.classification import bins_of
from calmclip.models.flow import Array
from calmclip.models.heads import Head
from calmclip.models.tasks.calibrate import TEMPERATURES, losses, smoothed

_COARSE, _AROUND = 20, 60  # steps of 2.3 %: the first search, and how far a resample may move from its result


@dataclass(frozen=True)
class Scaled:
    """``temperature``: the geometric mean of both halves'. ``error``: the calibration error, 0 to 1. ``loss``: nats."""

    temperature: float
    error: float
    loss: float


class Scaling:
    """Logits float [N, C] before temperature, truth int64 [N]. Scores at each temperature are computed once.

    The halves are drawn alternately from the pictures of each label.
    """

    def __init__(self, logits: Array, truth: Array, head: Head[Any], bins: int) -> None:
        wide, count, labels = logits.astype(np.float64), len(truth), logits.shape[1]
        self._bins = bins
        self.half = np.empty(count, np.int64)
        self.half[np.argsort(truth, kind="stable")] = np.arange(count) % 2
        self._right = wide.argmax(axis=1) == truth
        targets, plain = np.empty(wide.shape), np.eye(labels)[truth]
        for half in (0, 1):
            targets[self.half == half] = smoothed(truth[self.half == half], labels, head.exclusive)

        def fit(temperature: float) -> Array:
            return losses(head.scores(wide / temperature), targets, head.exclusive)

        near = min(range(0, len(TEMPERATURES), _COARSE), key=lambda place: fit(TEMPERATURES[place]).mean())
        self._grid = np.array(TEMPERATURES[max(0, near - _AROUND) : near + _AROUND + 1])
        self._fit, self._loss, self._score = (np.empty((len(self._grid), count)) for _ in range(3))
        for place, temperature in enumerate(self._grid):
            scores = head.scores(wide / temperature)
            self._fit[place] = losses(scores, targets, head.exclusive)
            self._loss[place] = losses(scores, plain, head.exclusive)
            self._score[place] = scores.max(axis=1)

    def best(self, weight: Array) -> tuple[int, int] | None:
        """Places in the grid of the best temperature of half 0 and of half 1; None if a half is empty."""
        weights = [weight * (self.half == half) for half in (0, 1)]
        if not all(each.sum() for each in weights):
            return None
        first, second = (int(np.argmin(self._fit @ each)) for each in weights)
        return first, second

    def scores(self, places: tuple[int, int]) -> Array:
        """The score of each picture's best label, at the temperature of the other half."""
        return self._score[np.where(self.half == 0, places[1], places[0]), np.arange(len(self.half))]

    def of(self, weight: Array) -> Scaled:
        """If each picture counts ``weight`` [N] times."""
        places = self.best(weight)
        if places is None:
            return Scaled(*[float("nan")] * 3)
        score, total = self.scores(places), weight.sum()
        loss = self._loss[np.where(self.half == 0, places[1], places[0]), np.arange(len(self.half))]
        gaps = np.bincount(bins_of(score, self._bins), weight * (score - self._right))
        temperature = float(np.sqrt(self._grid[[*places]].prod()))
        return Scaled(temperature, float(np.abs(gaps).sum() / total), float(weight @ loss / total))
