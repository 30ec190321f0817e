import numpy as np

from calmclip.models.preprocess.masking import IGNORED, masked


def test_masked_words_are_berts_shares():
    rows = np.full((400, 500), 7, np.int64)
    rows[:, 0], rows[:, -1] = 2, 3
    ids, targets = masked(rows, np.random.default_rng(0), mask=4, words=1000, spared=[2, 3])
    asked = targets != IGNORED
    assert not asked[:, 0].any()
    assert not asked[:, -1].any()
    assert (ids[~asked] == rows[~asked]).all()
    assert (targets[asked] == 7).all()
    inner = 400 * 498
    assert abs(asked.sum() / inner - 0.15) < 0.004  # five standard deviations of the share
    kinds = [(ids[asked] == 4).mean(), (ids[asked] == 7).mean()]
    assert np.allclose(kinds, [0.8, 0.1], atol=0.012)
