"""Rows of several widths -> runs of nearly one width, because a run pads its rows to the widest.

The cost of a run is rows x width tokens, padding included, and `RUN_TOKENS` for the run itself. Measured on the text
graph of `mini`, 8 to 256 tokens wide: a token costs the same within a tenth, INT8 and float; attention's square is
small beside the products. A run costs as much as 2 tokens (INT8) or 8 (float, which reads the weights), and a call of
the service about 10 more.
"""

from collections.abc import Sequence

import numpy as np

from calmclip.models.flow import Array

RUN_TOKENS = 16  # what a run costs beside its tokens, in tokens
MOST_TOKENS = 1024  # of one run, with padding: larger runs take more time a token in float, and more memory


def slices(widths: Sequence[int]) -> list[Array]:
    """Runs of row numbers, the narrowest run first; each row is in one run, and a run keeps the order of its rows.

    A run has at most `MOST_TOKENS` tokens, or one row. The cuts between widths have the least cost (dynamic
    programming: rows of one width need no cut between them). Time grows with the rows (a sort) and the square of the
    distinct widths, of which a context of 256 with multiples of 4 has 64.
    """
    if not len(widths):
        return []
    order = np.argsort(widths, kind="stable")
    distinct, counts = np.unique(widths, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])  # rows of the k narrowest widths
    least, cut = np.zeros(len(ends)), np.zeros(len(ends), np.int64)
    for k, width in enumerate(distinct, start=1):
        rows = ends[k] - ends[:k]  # of a slice that ends with this width, for each place where it may begin
        costs = least[:k] + rows * width + RUN_TOKENS * -(-rows // _most(width))
        cut[k] = costs.argmin()
        least[k] = costs.min()
    runs: list[Array] = []
    k = len(distinct)
    while k:
        first, last, most = ends[cut[k]], ends[k], _most(distinct[k - 1])
        runs[:0] = [np.sort(order[start : min(start + most, last)]) for start in range(first, last, most)]
        k = int(cut[k])
    return runs


def _most(width: int) -> int:
    """Rows in one run."""
    return max(1, MOST_TOKENS // int(width))
