"""Rows of several widths are cut into runs of the least cost; the costs below are added up by hand or by trying all."""

from itertools import combinations

import numpy as np
import pytest

from calmclip.models.preprocess.slices import MOST_TOKENS, RUN_TOKENS, slices


def shapes(widths: list[int]) -> list[tuple[int, int]]:
    """(rows, width) of each run."""
    return [(len(run), max(widths[i] for i in run)) for run in slices(widths)]


def test_a_long_row_runs_alone_and_pads_no_other():
    """255 rows of 8 and one of 108: 255 x 8 + 108 = 2148 tokens; padded to one width they were 256 x 108 = 27648."""
    widths = [8] * 100 + [108] + [8] * 155
    assert shapes(widths) == [(128, 8), (127, 8), (1, 108)]
    assert slices(widths)[2].tolist() == [100]


def test_few_rows_join_wider_ones_when_a_run_of_their_own_costs_more():
    """Four rows of 4 in a run of 8 waste 16 tokens, which is what a run costs: a tie, and one run is kept. Five rows
    waste 20."""
    assert RUN_TOKENS == 16
    assert shapes([4] * 4 + [8] * 10) == [(14, 8)]
    assert shapes([4] * 5 + [8] * 10) == [(5, 4), (10, 8)]
    assert shapes([8, 4, 8]) == [(3, 8)]


def test_a_run_has_few_tokens_or_one_row():
    assert MOST_TOKENS == 1024
    assert shapes([77] * 30) == [(13, 77), (13, 77), (4, 77)]  # 13 x 77 = 1001
    assert shapes([5000, 5000]) == [(1, 5000), (1, 5000)]
    assert slices([]) == []


def test_rows_of_one_width_keep_their_order():
    """A tower of fixed width runs its texts as they come."""
    runs = slices([77] * 40)
    assert np.concatenate(runs).tolist() == [*range(40)]


@pytest.mark.parametrize("seed", range(20))
def test_the_cuts_have_the_least_cost_of_all_cuts(seed: int):
    """Every way to cut between the distinct widths is tried."""
    draw = np.random.default_rng(seed)
    widths = draw.choice([4, 8, 12, 20, 24, 60, 108], draw.integers(1, 200), p=draw.dirichlet([0.5] * 7)).tolist()
    distinct = sorted(set(widths))

    def cost(cuts: tuple[int, ...]) -> int:
        total = 0
        for first, last in zip((0, *cuts), (*cuts, len(distinct)), strict=True):
            width = distinct[last - 1]
            rows = sum(distinct[first] <= each <= width for each in widths)
            total += rows * width + 16 * -(-rows // (1024 // width))
        return total

    places = range(1, len(distinct))
    least = min(cost(cuts) for count in range(len(distinct)) for cuts in combinations(places, count))
    runs = slices(widths)
    assert sorted(np.concatenate(runs).tolist()) == [*range(len(widths))]
    # a run that is cut for its tokens may be narrower than its slice
    assert sum(rows * width + 16 for rows, width in shapes(widths)) <= least
    assert all(rows * width <= 1024 for rows, width in shapes(widths))
