"""Patches pooled over the patches that are like them.

The affinity of two patches is the cosine of their keys. A rule turns a row of cosines into weights; a patch's new
vector is the mean of all patches by these weights. The matrix of N x N weights is never whole in memory: it is computed
in strips of rows.

Source: CLIP-DINOiser, Wysoczanska et al. 2024 (arXiv 2312.12359), section 3.2 and its code; Trident, Shi et al. 2025
(arXiv 2411.09219), section 3.3 and its code.
"""

from collections.abc import Callable, Iterator

import numpy as np

from calmclip.models.flow import Array

STRIP = 2**21  # weights at once: 8 MB
ROUNDING = 1e-6  # two cosines that differ by less count as equal: a unit vector's cosine with itself is not exactly 1
EPS = 1e-6  # added to the sum of a row's weights
MOST = 0.9  # the highest threshold of `over_mean`: a patch always keeps itself

Rule = Callable[[Array], Array]  # cosines [n, N], rows of the matrix -> weights [n, N]


def over(gamma: float) -> Rule:
    """The cosine where it is at least ``gamma``, else 0."""
    return lambda cosines: np.where(cosines >= np.float32(gamma - ROUNDING), cosines, np.float32(0))


def over_mean(factor: float) -> Rule:
    """The cosine where it is above ``factor`` times the mean of its row, else 0; never one of 0 or less."""

    def weights(cosines: Array) -> Array:
        threshold = np.clip(factor * cosines.mean(axis=1, keepdims=True), 0.0, MOST).astype(np.float32)
        return np.where(cosines > threshold, cosines, np.float32(0))

    return weights


def pooled(features: Array, keys: Array, rule: Rule) -> Array:
    """features [h, w, D] and unit keys [h, w, C] -> float32 [h, w, D]: sum_j A_ij F_j / (sum_j A_ij + `EPS`)."""
    rows = features.reshape(-1, features.shape[-1])
    mixed = np.empty(rows.shape, np.float32)
    for part, weights in strips(keys, rule):
        mixed[part] = (weights @ rows) / (weights.sum(axis=1, keepdims=True) + np.float32(EPS))
    return mixed.reshape(features.shape)


def strips(keys: Array, rule: Rule) -> Iterator[tuple[slice, Array]]:
    """The rows of the matrix of weights, as many at once as `STRIP` holds."""
    units = keys.reshape(-1, keys.shape[-1])
    count = max(1, STRIP // len(units))
    for start in range(0, len(units), count):
        part = slice(start, start + count)
        yield part, rule(units[part] @ units.T)
