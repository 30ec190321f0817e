"""Masked tokens for a masked language model."""

from collections.abc import Sequence

import numpy as np

from calmclip.models.flow import Array

IGNORED = -100  # the target of a token that is not predicted


def masked(
    rows: Array, draw: np.random.Generator, mask: int, words: int, spared: Sequence[int], rate: float = 0.15
) -> tuple[Array, Array]:
    """-> ids and targets like ``rows``; the target of a token that is not selected is `IGNORED`.

    A fraction ``rate`` of the tokens is selected, without those in ``spared``: 80 % of these become ``mask``, 10 %
    become a random one of the ``words`` tokens, 10 % stay. Source: Devlin et al. 2018 (arXiv 1810.04805), section 3.1.
    """
    selected = (draw.random(rows.shape) < rate) & ~np.isin(rows, spared)
    action = draw.random(rows.shape)
    ids = np.where(selected & (action < 0.8), mask, rows)
    ids = np.where(selected & (action >= 0.9), draw.integers(0, words, rows.shape), ids)
    return ids, np.where(selected, rows, IGNORED)
