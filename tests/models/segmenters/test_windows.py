"""Windows over pictures: places worked out by hand, the mean where they overlap, and identities."""

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.errors import BadRequest
from calmclip.models.preprocess.image import ImagePreparer
from calmclip.models.segmenters import Windows
from calmclip.models.segmenters.windows import MOST, Plan, Splice, plan, whole, window

TRIDENT = Windows(size=1.0, stride=2 / 3)  # windows of 336 pixels, 224 apart, over a short side of 336


def tops(places: Plan) -> list[int]:
    return sorted({top for top, _ in places.places})


def lefts(places: Plan) -> list[int]:
    return sorted({left for _, left in places.places})


def test_tridents_windows():
    """640 x 480 becomes 448 x 336: 28 x 21 cells, and the second window, 14 cells on, is shifted back to end at 28."""
    places = plan(TRIDENT, 640, 480, (336, 336), (21, 21))
    assert (places.size, places.grid) == ((336, 448), (21, 28))
    assert places.places == ((0, 0), (0, 7))
    assert lefts(plan(TRIDENT, 1600, 480, (336, 336), (21, 21))) == [0, 14, 28, 42, 49]  # 1120 pixels, 70 cells


def test_smaller_windows_cover_both_axes():
    """Half the short side: 100 x 60 becomes 80 x 48 pixels of cells of 6, that is 13 x 8 cells."""
    places = plan(Windows(size=0.5, stride=0.5), 100, 60, (24, 24), (4, 4))
    assert (places.grid, places.size) == ((8, 13), (48, 78))
    assert (tops(places), lefts(places)) == ([0, 2, 4], [0, 2, 4, 6, 8, 9])


def test_a_square_picture_is_one_window():
    assert plan(TRIDENT, 999, 999, (336, 336), (21, 21)).places == ((0, 0),)


@pytest.mark.parametrize("size", [(30, 20), (120, 33), (33, 120), (97, 101)])
@pytest.mark.parametrize("windows", [Windows(), TRIDENT, Windows(size=0.7, stride=1.0)])
def test_every_cell_is_seen_and_no_window_leaves_the_map(size: tuple[int, int], windows: Windows):
    places = plan(windows, *size, (32, 48), (4, 6))
    splice = Splice(places.grid)
    for place in places.places:
        assert place[0] + 4 <= places.grid[0]
        assert place[1] + 6 <= places.grid[1]
        splice.add({"patches": np.ones((1, 4, 6, 2), np.float32), "objectness": np.ones((1, 4, 6), np.float32)}, place)
    assert splice.visits.min() >= 1
    means = splice.mean()
    assert means["patches"].tolist() == np.ones((*places.grid, 2)).tolist()
    assert means["objectness"].tolist() == np.ones(places.grid).tolist()


def test_overlapping_cells_are_the_mean_of_their_windows():
    splice = Splice((1, 3))
    splice.add({"patches": np.array([[[[2.0], [4.0]]]], np.float32)}, (0, 0))
    splice.add({"patches": np.array([[[[8.0], [6.0]]]], np.float32)}, (0, 1))
    assert splice.mean()["patches"][0, :, 0].tolist() == [2, 6, 6]


def test_maps_that_agree_where_they_overlap_are_put_together_unchanged():
    """The parts of one map give that map."""
    whole = np.random.default_rng(0).standard_normal((8, 13, 3)).astype(np.float32)
    places = plan(Windows(size=0.5, stride=0.5), 100, 60, (24, 24), (4, 4))
    splice = Splice(places.grid)
    for top, left in places.places:
        splice.add({"patches": whole[None, top : top + 4, left : left + 4]}, (top, left))
    assert splice.mean()["patches"] == pytest.approx(whole, abs=1e-6)


def test_a_window_is_the_same_part_of_the_picture_for_graphs_of_two_sizes():
    """Pixels are numbered by the eighth of the picture's width that they show."""
    windowed = plan(TRIDENT, 40, 20, (24, 24), (4, 4))
    parts = []
    for side in (24, 60):
        rows, columns = windowed.size_for((side, side))
        assert (rows, columns) == (side, 2 * side)
        eighths = np.broadcast_to(np.arange(columns) * 8 // columns, (1, 3, rows, columns)).astype(np.float32)
        spec = ImagePreprocess(size=(side, side), resize="exact", mean=(0, 0, 0), std=(1, 1, 1))
        parts.append(window(spec, windowed, (0, 2), eighths)["pixels"])
    assert [part.shape for part in parts] == [(1, 3, 24, 24), (1, 3, 60, 60)]
    assert [np.unique(part).tolist() for part in parts] == [[2, 3, 4, 5]] * 2


def test_a_graph_that_prepares_pictures_gets_those_of_the_windows():
    spec = ImagePreprocess(size=(24, 24), shortest=24, mean=(0.5,) * 3, std=(0.2,) * 3, in_graph=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 48, 3), np.uint8))
    windowed = plan(TRIDENT, 48, 24, (24, 24), (4, 4))
    pixels, _ = ImagePreparer(whole(spec, windowed.size)).prepare(image)
    part = window(spec, windowed, (0, 4), pixels)["pixels"]
    assert part.dtype == np.uint8
    assert part.tolist() == np.asarray(image)[:, 24:].tolist()


def test_the_frame_maps_pixels_to_cells():
    places = plan(Windows(size=0.5, stride=0.5), 100, 60, (24, 24), (4, 4))
    assert places.frame(100, 60).to_input(np.array([[0, 0, 100, 60]])).tolist() == [[0, 0, 13, 8]]


@pytest.mark.parametrize("windows", [Windows(size=0), Windows(size=1.5), Windows(size=float("nan"))])
def test_an_impossible_size_is_refused(windows: Windows):
    with pytest.raises(BadRequest, match=r"windows: size is .*; expected a number from 0.1 to 1"):
        plan(windows, 10, 10, (8, 8), (2, 2))


def test_windows_are_bounded():
    assert len(plan(Windows(size=0.25, stride=0.5), 100, 100, (32, 32), (4, 4)).places) == 49 <= MOST
    with pytest.raises(BadRequest, match=r"100 x 900 pixels makes \d+ windows over .*Use a larger size"):
        plan(Windows(size=0.25, stride=0.5), 100, 900, (32, 32), (4, 4))
    assert len(plan(Windows(size=0.4, stride=1.0), 100, 100, (448, 448), (28, 28)).places) == 9
    with pytest.raises(BadRequest, match=r"16 windows over 1792 x 1792 pixels and 112 x 112 cells; .* 6000 cells"):
        plan(Windows(size=0.25, stride=1.0), 100, 100, (448, 448), (28, 28))
