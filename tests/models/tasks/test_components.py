"""Connected components beside scipy's, in another order of work: there a flood, here runs that are joined."""

import numpy as np
import pytest
from scipy import ndimage

from calmclip.models.flow import Array
from calmclip.models.tasks.components import components

SPIRAL = """
    #######.
    #.....#.
    #.###.#.
    #.#...#.
    #.#####.
    #.......
    ########"""


def drawn(text: str) -> Array:
    """0 for "#", -1 for "."."""
    return np.array([[0 if mark == "#" else -1 for mark in line.strip()] for line in text.strip().splitlines()])


@pytest.mark.parametrize(("shape", "density"), [((40, 60), 0.3), ((40, 60), 0.6), ((1, 50), 0.5), ((50, 1), 0.5)])
def test_they_are_those_of_scipy(shape: tuple[int, int], density: float):
    draw = np.random.default_rng(0)
    names = np.where(draw.random(shape) < density, draw.integers(0, 3, shape), -1)
    values = draw.random(shape).astype(np.float32)
    parts = components(names, values)
    answer = {
        (int(name), *map(int, box), int(area), round(float(total), 6))
        for name, box, area, total in zip(parts.names, parts.boxes, parts.areas, parts.sums, strict=True)
    }
    want = set()
    for name in range(3):
        numbered, count = ndimage.label(names == name, np.ones((3, 3)))
        for number, (y, x) in enumerate(ndimage.find_objects(numbered), start=1):
            inside = numbered == number
            total = values[inside].astype(np.float64).sum()
            want.add((name, x.start, y.start, x.stop, y.stop, int(inside.sum()), round(float(total), 6)))
        assert (parts.names == name).sum() == count
    assert answer == want


def test_a_spiral_is_one_component():
    """Its arms meet only at the end of many rows of separate runs."""
    names = drawn(SPIRAL)
    parts = components(names, np.ones(names.shape))
    assert parts.boxes.tolist() == [[0, 0, 8, 7]]
    assert parts.areas.tolist() == [(names == 0).sum()] == parts.sums.tolist()


def test_corners_connect_and_names_part():
    names = np.array([[0, -1, 1], [-1, 0, 1], [2, -1, 0]])
    parts = components(names, np.ones((3, 3)))
    assert parts.names.tolist() == [0, 1, 2]
    assert parts.areas.tolist() == [3, 2, 1]
    assert parts.boxes.tolist() == [[0, 0, 3, 3], [2, 0, 3, 2], [0, 2, 1, 3]]


def test_there_may_be_none():
    parts = components(np.full((3, 4), -1), np.ones((3, 4)))
    assert (parts.names.shape, parts.boxes.shape, parts.sums.shape) == ((0,), (0, 4), (0,))
