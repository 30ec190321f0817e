import numpy as np
import pytest

from calmclip.export.parity import compare, require
from calmclip.models.errors import ParityLost


def agreement(reference, output):
    """`compare` of two outputs y."""
    return compare(lambda feed: {"y": np.array(reference)}, lambda feed: {"y": np.array(output)}, [{}])


EYE = [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("reference", "output", "expected"),
    [
        # noise 2, signal 25: 10 log10(12.5) dB
        ([[3.0, 4.0]], [[4.0, 3.0]], {"max_abs": 1.0, "cosine": 24 / 25, "cosine_min": 24 / 25, "sqnr_db": 10.97}),
        (EYE, [[1.0, 0.0], [1.0, 0.0]], {"cosine": 0.5, "cosine_min": 0.0}),
        # a lost row has the cosine 0
        (EYE, [[1.0, 0.0], [0.0, 0.0]], {"cosine": 0.5, "cosine_min": 0.0, "sqnr_db": 3.01}),  # 10 log10(2 / 1)
        (EYE, [[1.0, 0.0], [np.nan, np.nan]], {"cosine": 0.5, "cosine_min": 0.0, "sqnr_db": -999.0}),
        (EYE, [[1.0, 0.0], [np.inf, np.inf]], {"cosine": 0.5, "cosine_min": 0.0, "sqnr_db": -999.0}),
        # rows that are zero on both sides do not count
        ([[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]], {"cosine": 0.0, "cosine_min": 0.0}),
    ],
)
def test_numbers_computed_by_hand(reference, output, expected: dict[str, float]):
    numbers = agreement(reference, output)["y"]
    assert {name: numbers[name] for name in expected} == expected


def test_equal_outputs_are_equal():
    equal = compare(lambda f: {"y": np.ones((2, 3))}, lambda f: {"y": np.ones((2, 3))}, [{}, {}])
    require(equal, max_abs=0.0, what="same")
    assert equal["y"]["cosine_min"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("reference", "output", "message"),
    [
        ([[1.0, 1.0]], [[1.0, 2.0]], "'y' differs"),
        ([[1.0, 1.0]], [[1.0, np.nan]], "'y' differs"),
        ([[np.inf, 1.0]], [[1.0, 1.0]], "'y' differs by inf"),
        # the tolerance is relative to the greatest number: 20 times that of unit vectors
        ([[20.0, -3.0]], [[20.0 + 2.1e-3, -3.0 + 2.1e-3]], r"differs by 2\.10e-03; at most 2e-03 is rounding"),
    ],
)
def test_a_difference_over_the_tolerance_is_an_error(reference, output, message: str):
    with pytest.raises(ParityLost, match=message):
        require(agreement(reference, output), max_abs=1e-4, what="torch against ONNX")
    require(agreement([[20.0, -3.0]], [[20.0 + 1.9e-3, -3.0 + 1.9e-3]]), max_abs=1e-4, what="torch against ONNX")


def test_feeds_of_several_lengths_are_one_sum():
    """Two rows lost by 1 and one by 2: noise 1 + 1 + 4, signal 9 + 9 + 9; the largest is that of the second feed."""
    rows = iter([np.full((2, 1), 3.0), np.full((2, 1), 2.0), np.full((1, 1), 3.0), np.full((1, 1), 1.0)])
    numbers = compare(lambda f: {"y": next(rows)}, lambda f: {"y": next(rows)}, [{}, {}])["y"]
    assert numbers["max_abs"] == 2.0
    assert numbers["sqnr_db"] == pytest.approx(10 * np.log10(27 / 6), abs=0.01)
