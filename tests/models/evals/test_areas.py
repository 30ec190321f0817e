import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from calmclip.models.evals.areas import Areas, Subset, adjusted

DRAW = np.random.default_rng(0)


def one(scores, positive, copies=None):
    count = len(scores)
    places = np.arange(count)
    measured = Areas([Subset(places, np.array(scores, float), np.array(positive, bool))])(
        np.ones(count) if copies is None else np.array(copies)
    )
    return [float(each[0]) for each in (measured.auroc, measured.precision, measured.adjusted)]


def test_areas_of_resamples_are_scikit_learns_with_and_without_ties():
    count = 300
    subsets = []
    for number in range(12):
        places = DRAW.permutation(count)[: DRAW.integers(30, count)]
        scores = DRAW.normal(size=len(places)).round(1 if number % 2 else 12)  # one decimal gives many ties
        subsets.append(Subset(places, scores, DRAW.random(len(places)) < 0.3))
    for part in (subsets, subsets[::2]):  # the second has no tie at all
        areas = Areas(part, len(part) - 1)
        for _ in range(3):
            copies = np.bincount(DRAW.integers(0, count, count), minlength=count)
            measured = areas(copies)
            for place, subset in enumerate(part):
                here = np.repeat(np.arange(len(subset.places)), copies[subset.places])
                positive, scores = subset.positive[here], subset.scores[here]
                assert measured.auroc[place] == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
                assert measured.prevalence[place] == pytest.approx(positive.mean(), abs=1e-12)
                expected = average_precision_score(positive, scores) if place < len(part) - 1 else np.nan
                assert measured.precision[place] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_perfect_reversed_and_equal_scores():
    truth = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert one(range(10), truth) == [1.0, 1.0, 1.0]
    assert one(range(10, 0, -1), truth)[:2] == [0.0, 0.1]  # the only positive is the last of ten
    assert one([5] * 10, truth) == [0.5, 0.1, 0.0]  # chance: one threshold, whose precision is the prevalence
    # the positive is the second of ten: precision 1/2 at a prevalence of 1/10
    assert one([0, 1, 2, 3, 4, 5, 6, 7, 9, 8], truth) == pytest.approx([8 / 9, 0.5, 0.69897], abs=1e-6)
    assert adjusted(np.array([0.5]), np.array([0.1]))[0] == pytest.approx(0.69897, abs=1e-6)


def test_chance_has_an_adjusted_precision_near_zero():
    truth = DRAW.random(200_000) < 0.1
    assert one(DRAW.random(len(truth)), truth) == pytest.approx([0.5, 0.1, 0.0], abs=0.01)


def test_without_positives_or_negatives_there_is_no_area():
    assert np.isnan(one([1, 2, 3], [0, 0, 0])).all()
    auroc, precision, corrected = one([1, 2, 3], [1, 1, 1])
    assert (np.isnan(auroc), precision, np.isnan(corrected)) == (True, 1.0, True)
    assert np.isnan(one([1, 2, 3], [1, 0, 0], [0, 4, 1])).all()  # a resample without the only positive
    assert len(Areas([])(np.ones(3)).auroc) == 0
