"""Affinity pooling. Oracles: the whole matrix in float64, and identities of both methods."""

import numpy as np
import pytest

from calmclip.models.flow import Array
from calmclip.models.segmenters import affinity
from calmclip.models.segmenters.affinity import Rule, over, over_mean, pooled, strips

RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.standard_normal((5, 7, 3)).astype(np.float32)
SHARED = RANDOM.standard_normal(6)  # keys share a direction, as those of a tower do


def keys_of(rows: Array) -> Array:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


KEYS = keys_of(RANDOM.standard_normal((5, 7, 6)) + SHARED)
ALIKE = np.broadcast_to(KEYS[0, 0], KEYS.shape)


def matrix(keys: Array, rule: Rule) -> Array:
    return np.concatenate([weights for _, weights in strips(keys, rule)])


@pytest.mark.parametrize("gamma", [-1.0, 0.2, 0.7])
def test_pooling_is_the_definition(gamma: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(affinity, "STRIP", 3 * 35)  # strips of three rows, the last of two
    exact = KEYS.reshape(35, 6).astype(np.float64)
    weights = exact @ exact.T
    weights[weights < gamma] = 0
    wanted = weights @ FEATURES.reshape(35, 3) / (weights.sum(axis=1, keepdims=True) + 1e-6)
    assert pooled(FEATURES, KEYS, over(gamma)) == pytest.approx(wanted.reshape(5, 7, 3), abs=1e-5)


def test_the_mean_rule_is_the_definition():
    exact = KEYS.reshape(35, 6).astype(np.float64)
    cosines = exact @ exact.T
    threshold = np.minimum(1.2 * cosines.mean(axis=1, keepdims=True), 0.9)
    weights = np.where((cosines > threshold) & (cosines > 0), cosines, 0)
    wanted = weights @ FEATURES.reshape(35, 3) / weights.sum(axis=1, keepdims=True)
    assert (weights == 0).any()
    assert (threshold > 0.1).all()
    assert pooled(FEATURES, KEYS, over_mean(1.2)) == pytest.approx(wanted.reshape(5, 7, 3), abs=1e-5)


def test_alike_keys_keep_equal_features_and_average_others():
    """gamma -1 keeps every pair. Identical features stay; others become their mean."""
    equal = np.broadcast_to(FEATURES[0, 0], FEATURES.shape)
    assert pooled(equal, ALIKE, over(-1.0)) == pytest.approx(equal, rel=1e-5)
    mean = np.broadcast_to(FEATURES.mean(axis=(0, 1)), FEATURES.shape)
    assert pooled(FEATURES, ALIKE, over(-1.0)) == pytest.approx(mean, abs=1e-5)


def test_the_highest_threshold_keeps_a_patch_alone():
    assert pooled(FEATURES, KEYS, over(1.0)) == pytest.approx(FEATURES / (1 + 1e-6), rel=1e-6)


@pytest.mark.parametrize("factor", [0.0, 1.2, 10.0])
def test_constant_rows_give_the_mean_of_the_picture(factor: float):
    mean = np.broadcast_to(FEATURES.mean(axis=(0, 1)), FEATURES.shape)
    assert pooled(FEATURES, ALIKE, over_mean(factor)) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("rule", [over(0.2), over(1.0), over_mean(0.0), over_mean(1.2), over_mean(10.0)])
def test_weights_divided_by_their_sum_are_a_row_stochastic_matrix(rule: Rule):
    """No weight is negative, and each patch keeps itself: so no sum is 0, and constant features stay."""
    weights = matrix(KEYS, rule)
    assert weights.min() >= 0
    assert np.diag(weights) == pytest.approx(np.ones(35), abs=1e-6)
    constant = np.full_like(FEATURES, 3.5)
    assert pooled(constant, KEYS, rule) == pytest.approx(constant, rel=1e-5)


def test_memory_does_not_grow_with_the_square_of_the_patches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(affinity, "STRIP", 64)
    assert max(weights.shape[0] for _, weights in strips(KEYS, over(0.2))) == 1
    assert [*range(35)] == [row for part, _ in strips(KEYS, over(0.2)) for row in [*range(35)][part]]
