"""Maps of labels beside the truth of `models/evals/outlined.py`: maps enlarged, a figure with its deviation, and the
threshold chosen by two folds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from calmclip.models.flow import Array

Metric: TypeAlias = Callable[[Array], float]  # int64 [photographs, 3, classes] -> percent
RESAMPLES = 200  # of the photographs, for the deviation of a figure


def enlarged(labels: Array, width: int, height: int) -> Array:
    """A map of labels [h, w] -> [height, width]: each pixel has the label of the cell that its middle lies in."""
    rows, columns = (
        ((2 * np.arange(size) + 1) * cells) // (2 * size)
        for size, cells in zip((height, width), labels.shape, strict=True)
    )
    whole: Array = labels[rows[:, None], columns]
    return whole


@dataclass(frozen=True)
class Figure:
    """Percent; ``deviation``: its standard deviation over photographs, drawn with replacement; ``settings``: the
    thresholds that were chosen on one half of the photographs for the other."""

    value: float
    deviation: float
    settings: tuple[float, float]


def held_out(counts: Array, settings: Sequence[float], metric: Metric) -> tuple[Array, tuple[float, float]]:
    """``counts`` int64 [photographs, settings, 3, classes] -> [photographs, 3, classes], and the two settings: the
    photographs at even places get the setting that is best on those at odd places, and the other way round."""
    halves = np.arange(len(counts)) % 2
    chosen = [int(np.argmax([metric(counts[halves != half, s]) for s in range(len(settings))])) for half in (0, 1)]
    return counts[np.arange(len(counts)), np.array(chosen)[halves]], (settings[chosen[0]], settings[chosen[1]])


def figure(rows: Array, settings: tuple[float, float], metric: Metric) -> Figure:
    """``rows`` int64 [photographs, 3, classes] at their settings."""
    draws = np.random.default_rng(0).integers(0, len(rows), (RESAMPLES, len(rows)))
    return Figure(metric(rows), float(np.std([metric(rows[draw]) for draw in draws])), settings)
