"""Confidence intervals by resampling pictures.

Source: Efron & Tibshirani 1993, chapters 13 (percentile) and 14 (BCa), as implemented in scipy.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import Field

from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array

_BATCH = 4_000_000  # indices drawn at once: 32 MB


class Resampling(FrozenModel):
    """``method``: percentile, or BCa, which corrects bias and skew with one more call of the statistic per picture."""

    resamples: int = Field(default=1000, ge=10, le=1_000_000)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    method: Literal["percentile", "BCa"] = "percentile"
    seed: int = Field(default=0, ge=0)


def intervals(statistic: Callable[[Array], Array], count: int, how: Resampling) -> tuple[Array, Array]:
    """``statistic(int64 [n]) -> float64 [K]`` of indices below ``count`` (at least 2) -> lower, upper float64 [K].

    Paired: all K figures use the same resamples. A resample in which a figure is NaN is skipped for this figure; the
    bounds are NaN if all are skipped. Raises ModuleNotFoundError without scipy.
    """
    from scipy.stats import bootstrap

    def vectorized(places: Array, axis: int = -1) -> Array:
        rows = [statistic(row) for row in places.reshape(-1, places.shape[-1])]
        return np.moveaxis(np.reshape(rows, (*places.shape[:-1], -1)), -1, 0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about figures that are equal in all resamples; handled below
        result = bootstrap(
            (np.arange(count),), vectorized, vectorized=True, axis=-1, n_resamples=how.resamples,
            batch=max(1, _BATCH // count), confidence_level=how.confidence, method=how.method,
            rng=np.random.default_rng(how.seed),
        )  # fmt: skip
        tail = 50 * (1 - how.confidence)
        plain = np.nanpercentile(result.bootstrap_distribution, [tail, 100 - tail], axis=-1)
    low, high = result.confidence_interval
    good = np.isfinite(low) & np.isfinite(high)
    return np.where(good, low, plain[0]), np.where(good, high, plain[1])
