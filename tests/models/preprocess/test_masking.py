import numpy as np

from calmclip.models.preprocess.masking import IGNORED, masked


def test_fractions_of_masked_words_are_those_of_bert():
    rows = np.full((400, 500), 7, np.int64)
    rows[:, 0], rows[:, -1] = 2, 3
    ids, targets = masked(rows, np.random.default_rng(0), mask=4, words=1000, spared=[2, 3])
    chosen = targets != IGNORED
    assert not chosen[:, 0].any()
    assert not chosen[:, -1].any()
    assert (ids[~chosen] == rows[~chosen]).all()
    assert (targets[chosen] == 7).all()
    inner = 400 * 498
    assert abs(chosen.sum() / inner - 0.15) < 0.004  # five standard deviations of the fraction
    kinds = [(ids[chosen] == 4).mean(), (ids[chosen] == 7).mean()]
    assert np.allclose(kinds, [0.8, 0.1], atol=0.012)
