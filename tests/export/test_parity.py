import numpy as np
import pytest

from calmclip.export.parity import compare, require
from calmclip.models.errors import ParityLost


def test_numbers_worked_out_by_hand():
    # rows (3, 4) against (4, 3): cosine 24/25; noise 2, signal 25 -> 10 log10(12.5) = 10.97 dB
    found = compare(lambda f: {"y": np.array([[3.0, 4.0]])}, lambda f: {"y": np.array([[4.0, 3.0]])}, [{}])["y"]
    assert found["max_abs"] == 1.0
    assert found["cosine"] == pytest.approx(0.96)
    assert found["sqnr_db"] == pytest.approx(10.97, abs=0.01)


def test_the_worst_row_is_kept_beside_the_mean():
    left, right = np.eye(2), np.array([[1.0, 0.0], [1.0, 0.0]])
    found = compare(lambda f: {"y": left}, lambda f: {"y": right}, [{}])["y"]
    assert (found["cosine"], found["cosine_min"]) == (0.5, 0.0)


def test_equal_outputs_are_equal():
    found = compare(lambda f: {"y": np.ones((2, 3))}, lambda f: {"y": np.ones((2, 3))}, [{}, {}])
    require(found, max_abs=0.0, what="same")
    assert found["y"]["cosine_min"] == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [2.0, np.nan])
def test_a_difference_over_tolerance_and_a_nan_are_both_lost_parity(bad: float):
    found = compare(lambda f: {"y": np.ones((1, 2))}, lambda f: {"y": np.array([[1.0, bad]])}, [{}])
    with pytest.raises(ParityLost, match="'y' differs"):
        require(found, max_abs=1e-4, what="torch against ONNX")


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_row_that_came_to_nothing_is_no_agreement(bad: float):
    """The first row is the same on both sides, of the second nothing is left: (1 + 0) / 2."""
    left, right = np.eye(2), np.array([[1.0, 0.0], [bad, bad]])
    found = compare(lambda f: {"y": left}, lambda f: {"y": right}, [{}])["y"]
    assert (found["cosine"], found["cosine_min"]) == (0.5, 0.0)
    assert found["sqnr_db"] == (3.01 if bad == 0 else -999.0)  # 10 log10(2 / 1)


def test_rows_that_are_zero_on_both_sides_do_not_count():
    left, right = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])
    found = compare(lambda f: {"y": left}, lambda f: {"y": right}, [{}])["y"]
    assert (found["cosine"], found["cosine_min"]) == (0.0, 0.0)


def test_feeds_of_several_lengths_are_one_sum():
    """Two rows lost by 1 and one by 2: noise 1 + 1 + 4, signal 9 + 9 + 9; the largest is that of the second feed."""
    rows = iter([np.full((2, 1), 3.0), np.full((2, 1), 2.0), np.full((1, 1), 3.0), np.full((1, 1), 1.0)])
    found = compare(lambda f: {"y": next(rows)}, lambda f: {"y": next(rows)}, [{}, {}])["y"]
    assert found["max_abs"] == 2.0
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(27 / 6), abs=0.01)


def test_of_large_numbers_the_tolerance_is_their_part():
    """Logits up to 20 may differ by 20 times as much as vectors of length 1 may."""
    left = np.array([[20.0, -3.0]])
    near = compare(lambda f: {"y": left}, lambda f: {"y": left + 1.9e-3}, [{}])
    require(near, max_abs=1e-4, what="torch against ONNX")
    far = compare(lambda f: {"y": left}, lambda f: {"y": left + 2.1e-3}, [{}])
    with pytest.raises(ParityLost, match=r"differs by 2\.10e-03; at most 2e-03 is rounding"):
        require(far, max_abs=1e-4, what="torch against ONNX")


def test_an_infinite_reference_allows_nothing():
    found = compare(lambda f: {"y": np.array([[np.inf, 1.0]])}, lambda f: {"y": np.array([[1.0, 1.0]])}, [{}])
    with pytest.raises(ParityLost, match="'y' differs by inf"):
        require(found, max_abs=1e-4, what="torch against ONNX")
