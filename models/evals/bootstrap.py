"""Confidence intervals by resampling pictures.

Source: Efron & Tibshirani 1993, chapters 13 (percentile) and 14 (BCa), as implemented in scipy; for the least of many
figures Romano & Wolf 2005 (Econometrica 73), the studentized maximum.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
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


def intervals(
    statistic: Callable[[Array], Array], count: int, how: Resampling, least: Mapping[int, Sequence[int]] | None = None
) -> tuple[Array, Array]:
    """``statistic(int64 [n]) -> float64 [K]`` of indices below ``count`` (at least 2) -> lower, upper float64 [K].

    Paired: all K figures use the same resamples. A resample in which a figure is NaN is skipped for this figure; the
    bounds are NaN if all are skipped. ``least``: place of a figure -> places of the figures whose least it is; its
    interval is that of `_of_least`, whatever the method. Raises ModuleNotFoundError without scipy.
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
        drawn = result.bootstrap_distribution
        tail = 50 * (1 - how.confidence)
        plain = np.nanpercentile(drawn, [tail, 100 - tail], axis=-1)
        low, high = result.confidence_interval
        good = np.isfinite(low) & np.isfinite(high)
        low, high = np.where(good, low, plain[0]), np.where(good, high, plain[1])
        if least:
            values = statistic(np.arange(count))
            for place, members in least.items():
                low[place], high[place] = _of_least(values[[*members]], drawn[[*members]], how.confidence)
    return low, high


def _of_least(values: Array, drawn: Array, confidence: float) -> tuple[float, float]:
    """values [M] and ``drawn`` [M, R], of R resamples -> an interval of the least of the M true values.

    The least of many values is too low, because noise chooses it. So all M get intervals, value +- c errors, that hold
    together with the ``confidence``: c is this quantile of the largest deviation in a resample, in standard errors.
    The least true value lies between the least lower and the least upper bound. NaN without two good resamples.
    """
    errors = np.nanstd(drawn, axis=1, ddof=1)
    used = errors > 0
    if not used.any():  # the same value in each resample, or none
        return (float(np.nanmin(values)),) * 2 if (errors == 0).any() else (np.nan, np.nan)
    deviations = np.nanmax(np.abs(drawn[used] - values[used, None]) / errors[used, None], axis=0)
    width = np.nanpercentile(deviations, 100 * confidence) * np.where(used, errors, 0)
    return float(np.nanmin(values - width)), float(np.nanmin(values + width))
