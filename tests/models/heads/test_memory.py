"""The memory of normal pictures, beside brute force in float64."""

import numpy as np
import pytest

from calmclip.models.errors import BadRequest
from calmclip.models.flow import Array
from calmclip.models.heads import BoundHead, Examples, memory

LABELS, TEXT = ("normal", "damaged"), np.eye(2, 8, dtype=np.float32)


def units(seed: int, *shape: int) -> Array:
    rows = np.random.default_rng(seed).standard_normal((*shape, 8))
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def shown(*patches: Array, truth: tuple[int, ...] = ()) -> Examples:
    """``patches``: of each picture [V, P, D]."""
    labels = np.array(truth or [0] * len(patches))
    return Examples(np.stack([rows[0, 0] for rows in patches]), labels, LABELS, TEXT, patches=patches)


def brute(rows: Array, others: Array) -> float:
    """The largest of the distances of each row to its nearest."""
    return max(min((1 - float(a.astype(np.float64) @ b)) / 2 for b in others) for a in rows)


def test_the_memory_is_all_patches_and_each_picture_is_compared_with_the_others():
    patches = [units(seed, 2, 3 + seed) for seed in range(3)]  # of 3, 4 and 5 cells, each with a crop
    assets = memory.fit(shown(*patches), memory.Params())
    flat = [rows.reshape(-1, 8) for rows in patches]
    assert np.array_equal(assets["patches"], np.concatenate(flat))
    wanted = [brute(rows[0], np.concatenate(flat[:i] + flat[i + 1 :])) for i, rows in enumerate(patches)]
    assert assets["distances"] == pytest.approx(wanted, abs=1e-6)
    assert memory.threshold(assets, memory.Params()) == pytest.approx(max(wanted), abs=1e-6)
    assert memory.threshold(assets, memory.Params(quantile=0.5)) == pytest.approx(sorted(wanted)[1], abs=1e-6)
    rows = units(9, 4)
    assert memory.distances(rows, assets["patches"]) == pytest.approx(
        [brute(row[None], np.concatenate(flat)) for row in rows], abs=1e-6
    )


def test_damaged_pictures_are_not_remembered_but_reported():
    """Normal pictures have the axes 0 to 3, and 0 to 2: the threshold is .5, cosine 0. The damaged one: cosine -.35."""
    axes = np.eye(8, dtype=np.float32)
    normal, damaged = [axes[None, :4], axes[None, [0, 1, 2, 0]]], -np.ones((1, 1, 8), np.float32) / 8**0.5
    examples = shown(*normal, damaged, truth=(0, 0, 1))
    assets = memory.fit(examples, memory.Params())
    assert len(assets["patches"]) == 8
    assert memory.notes(examples, memory.Params(), assets)[-1] == "1 of 1 damaged pictures are above it"


def test_a_coreset_has_a_patch_of_each_cluster():
    """20 clusters of 50 rows far apart: 20 rows that are far from each other are of 20 clusters."""
    draw = np.random.default_rng(0)
    rows = np.repeat(10 * draw.standard_normal((20, 100)), 50, axis=0) + 0.01 * draw.standard_normal((1000, 100))
    chosen = memory.coreset(rows.astype(np.float32), 20, seed=3)
    assert len({*(chosen // 50).tolist()}) == 20
    assert np.array_equal(memory.coreset(rows.astype(np.float32), 20, seed=3), chosen)
    assert np.array_equal(memory.coreset(rows[:7].astype(np.float32), 7, seed=3), np.arange(7))


def test_a_coreset_that_is_too_small_for_all_patches_looks_at_a_part_of_them():
    rows = units(4, 100)
    chosen = memory.coreset(rows, 3, seed=0)  # of 8 x 3 rows
    assert len({*chosen.tolist()}) == 3


def test_logits_change_their_sign_at_the_threshold():
    assets = memory.fit(shown(units(1, 1, 5), units(2, 1, 5)), memory.Params())
    head = BoundHead("memory", {"scale": 10.0}, assets, LABELS)
    rows = units(3, 6)
    logits = head.logits(rows, head.columns(LABELS, TEXT))
    beyond = memory.distances(rows, assets["patches"]) - assets["distances"].max()
    assert logits == pytest.approx(10 * np.stack([-beyond, beyond], axis=1), abs=1e-5)


def test_one_picture_has_no_threshold_and_no_normal_picture_is_an_error():
    examples = shown(units(1, 1, 5))
    assets = memory.fit(examples, memory.Params())
    assert memory.threshold(assets, memory.Params()) is None
    assert memory.notes(examples, memory.Params(), assets)[-1].startswith("there is no threshold")
    with pytest.raises(BadRequest, match="the label 'normal' has no picture"):
        memory.fit(shown(units(1, 1, 5), truth=(1,)), memory.Params())
