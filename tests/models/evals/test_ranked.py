"""Rankings beside scikit-learn, and hard negatives by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from calmclip.models.evals import ranked as module
from calmclip.models.evals.ranked import before, ranked


@pytest.mark.parametrize("block", [3, 256])
def test_ranks_and_precisions_are_those_of_scikit_learn(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", block)
    draw = np.random.default_rng(3)
    queries, gallery = draw.standard_normal((7, 5)), draw.standard_normal((20, 5))
    right = draw.random((7, 20)) < 0.2
    right[:, 0] = True
    ranking = ranked(queries, gallery, lambda rows: right[rows], margin=2.0, count=4)
    cosines = queries @ gallery.T
    for query in range(7):
        assert ranking.precision[query] == pytest.approx(average_precision_score(right[query], cosines[query]))
        order = np.argsort(-cosines[query])
        assert ranking.rank[query] == np.flatnonzero(right[query][order])[0]


def test_a_much_better_negative_is_no_hard_one():
    """Cosines with the query (1, 0): .9, .75, .7 of the match, .6, .1. Those above .7 + margin are left out."""
    gallery = np.array([[c, np.sqrt(1 - c * c)] for c in (0.9, 0.75, 0.7, 0.6, 0.1)])
    right = np.array([[False, False, True, False, False]])

    def chosen(margin: float, count: int = 2) -> tuple[list[int], bool]:
        ranking = ranked(np.array([[1.0, 0.0]]), gallery, lambda rows: right[rows], margin, count)
        return ranking.negatives[0].tolist(), bool(ranking.hard[0])

    assert chosen(0.1) == ([1, 3], False)
    assert chosen(0.0) == ([3, 4], True)
    assert chosen(1.0) == ([0, 1], False)
    assert chosen(0.1, count=4) == ([1, 3, 4, -1], False)
    twins = ranked(np.eye(2)[:1], np.eye(2)[[0, 0]], lambda rows: np.array([[False, True]]), 0.1, 1)
    assert (twins.rank.tolist(), twins.precision.tolist(), twins.hard.tolist()) == ([0], [1.0], [True])


def test_hard_negatives_of_another_model_are_judged_by_the_own_cosines():
    queries, gallery = np.eye(2), np.array([[1.0, 0.5], [0.8, 0.4], [0.9, 0.6]])  # matches: rows 0 and 1
    right = np.array([[True, False, False], [False, True, False]])
    ranking = before(queries, gallery, lambda rows: right[rows], np.array([[1, -1], [2, 0]]))
    assert ranking.tolist() == [True, False]  # .8 and none against 1; .6 against .4
    assert before(queries, gallery, lambda rows: right[rows], np.array([[2, 1], [-1, -1]])).tolist() == [True, True]
