"""Maps of pictures through an invented graph whose patches are the mean colours of its cells."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calmclip.models.bundle.bundle import Bundle
from calmclip.models.flow import Array, Arrays, Call, Done, Together, Walk, drive
from calmclip.models.preprocess.image import decode
from calmclip.models.preprocess.placement import Frame
from calmclip.models.runtime.clock import Stopwatch
from calmclip.models.segmenters import Windows
from calmclip.models.segmenters.maps import TOGETHER, Maps, dense_maps, inside

Png = Callable[..., bytes]
RANDOM = np.random.default_rng(0)


def cells(pixels: Array) -> Array:
    """[1, 3, 8, 8] -> the means of 2 x 2 cells, [1, 2, 2, 3]."""
    return pixels.reshape(-1, 3, 2, 4, 2, 4).mean(axis=(3, 5)).transpose(0, 2, 3, 1)


def run(call: Call) -> Arrays:
    patches = cells(call.feeds["pixels"])
    keys = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
    return {"patches": patches, "keys": keys, "objectness": patches[..., 0]}


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), np.uint8))


def test_a_local_map_does_not_depend_on_the_windows(mapped: Bundle):
    """A cell's patch is its own mean colour, so each window that sees it says the same."""
    image = picture(8, 20)
    maps = drive(dense_maps(mapped, image, Windows(size=1.0, stride=0.5)), run)
    wanted = np.asarray(image, np.float32).reshape(2, 4, 5, 4, 3).mean(axis=(1, 3)) / 255
    assert maps.patches == pytest.approx(wanted, abs=1e-5)
    assert maps.objectness == pytest.approx(wanted[..., 0], abs=1e-5)
    assert np.linalg.norm(maps.keys, axis=-1) == pytest.approx(np.ones((2, 5)), abs=1e-6)
    assert maps.frame == Frame(20, 8, (5 / 20, 2 / 8), (0.0, 0.0))


def test_the_frame_of_a_picture_that_the_decoder_made_smaller(mapped: Bundle, halved):
    image = decode(halved(40, 16))
    assert image.size == (20, 8)
    maps = drive(dense_maps(mapped, image, Windows(size=1.0, stride=0.5)), run)
    assert (maps.patches.shape, maps.frame) == ((2, 5, 3), Frame(40, 16, (5 / 40, 2 / 16), (0.0, 0.0)))


def test_one_window_is_the_picture_without_windows(mapped: Bundle):
    image = picture(30, 30)
    alone, windowed = (drive(dense_maps(mapped, image, each), run) for each in (None, Windows(size=1.0)))
    assert windowed.frame == alone.frame
    assert windowed.patches.tolist() == alone.patches.tolist()
    assert windowed.objectness.tolist() == alone.objectness.tolist()  # type: ignore[union-attr]
    assert windowed.keys == pytest.approx(alone.keys, abs=1e-6)


@pytest.mark.parametrize("windows", [Windows(), Windows(size=1.0, stride=2 / 3), Windows(size=0.3, stride=0.9)])
def test_a_constant_picture_has_a_constant_map(mapped: Bundle, png: Png, windows: Windows):
    image = Image.open(BytesIO(png((255, 51, 0), (33, 20)))).convert("RGB")
    maps = drive(dense_maps(mapped, image, windows), run)
    assert maps.patches == pytest.approx(np.broadcast_to([1, 0.2, 0], maps.patches.shape), abs=1e-6)


def test_keys_that_windows_see_another_way_are_unit_vectors_again(mapped: Bundle):
    """The left column of each window answers the first axis, the right one the second: a cell that is both gets
    (1, 1) / sqrt(2)."""
    keys = np.broadcast_to(np.eye(2, dtype=np.float32), (1, 2, 2, 2))
    answers = {"patches": np.ones((1, 2, 2, 3), np.float32), "keys": keys}
    maps = drive(dense_maps(mapped, picture(8, 12), Windows(size=1.0, stride=0.5)), lambda call: answers)
    half = 0.5**0.5
    assert maps.keys == pytest.approx(np.array([[[1, 0], [half, half], [0, 1]]] * 2), abs=1e-6)


def test_few_windows_run_at_once(mapped: Bundle):
    """A driver that splits gets at most `TOGETHER` flows, each with one window."""
    groups: list[int] = []
    walk: Any = Walk(dense_maps(mapped, picture(8, 40), Windows(size=1.0, stride=0.5)), Stopwatch(), splits=True)
    state = walk.step()
    while isinstance(state, Together):
        groups.append(len(state.flows))
        state = walk.step([drive(flow, run) for flow in state.flows])
    assert isinstance(state, Done)
    assert groups == [TOGETHER, TOGETHER, 1]  # 10 cells wide: windows of 2 at each of 9 cells


def test_padding_is_cut_off():
    """16 x 6 pixels in 4 x 4 cells of 4 pixels: the last two rows show nothing of the picture."""
    patches = RANDOM.standard_normal((4, 4, 3)).astype(np.float32)
    maps = Maps(patches, Frame(16, 6, (0.25, 0.25), (0.0, 0.0)), objectness=patches[..., 0])
    cut = inside(maps)
    assert cut.patches.tolist() == patches[:2].tolist()
    assert cut.objectness.tolist() == patches[:2, :, 0].tolist()  # type: ignore[union-attr]
    assert cut.keys is None
    assert cut.frame == maps.frame
    middle = inside(Maps(patches, Frame(4, 8, (0.5, 0.5), (1.0, 0.0))))
    assert middle.patches.tolist() == patches[:, 1:3].tolist()
    assert middle.frame.offset == (0.0, 0.0)
