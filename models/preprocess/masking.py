"""Tokens that a masked language model is asked for."""

from collections.abc import Sequence

import numpy as np

from calmclip.models.flow import Array

IGNORED = -100  # a target that does not count


def masked(
    rows: Array, draw: np.random.Generator, mask: int, words: int, spared: Sequence[int], rate: float = 0.15
) -> tuple[Array, Array]:
    """-> ids and targets like ``rows``; a target that is not asked for is `IGNORED`.

    Of the tokens, but for those ``spared``, ``rate`` are asked for: of these 80 % become ``mask``, 10 % any of the
    ``words`` tokens, 10 % stay. Source: Devlin et al. 2018 (arXiv 1810.04805), section 3.1.
    """
    asked = (draw.random(rows.shape) < rate) & ~np.isin(rows, spared)
    what = draw.random(rows.shape)
    ids = np.where(asked & (what < 0.8), mask, rows)
    ids = np.where(asked & (what >= 0.9), draw.integers(0, words, rows.shape), ids)
    return ids, np.where(asked, rows, IGNORED)
