"""Zero-copy views of Pillow's pixels through the Arrow interface, against numpy's copy."""

import ctypes
import gc
import math

import numpy as np
import PIL
import pytest
from PIL import Image

from calmclip.models.flow import Array
from calmclip.models.preprocess import memory
from calmclip.models.preprocess.memory import Band, Buffer, borrow, copy, fits_bands, in_bands

exports = pytest.mark.skipif(
    not hasattr(Image.Image, "__arrow_c_array__"), reason=f"Pillow {PIL.__version__} exports no buffer"
)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def read(buffer: Buffer, rows: int, columns: int) -> Array:
    """-> uint8 [rows, columns, 3], read from its address."""
    row, pixel = buffer.strides
    flat = np.frombuffer((ctypes.c_uint8 * (row * (rows - 1) + pixel * columns)).from_address(buffer.address), np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns, 3), (row, pixel, 1)).copy()


@exports
@pytest.mark.parametrize("size", [(640, 480), (1, 1), (1, 300), (300, 1), (17, 13)])
def test_a_view_has_the_pixels_of_the_picture(size: tuple[int, int]):
    image = picture(*size)
    view = borrow(image)
    assert view is not None
    assert view.strides == (size[0] * 4, 4)
    assert np.array_equal(read(view, *size[::-1]), np.asarray(image))


@exports
def test_a_view_outlives_the_picture():
    image = picture(640, 480)
    expected, view = np.asarray(image), borrow(image)
    del image
    gc.collect()
    others = [picture(640, 480) for _ in range(5)]  # would reuse its memory
    assert view is not None
    assert np.array_equal(read(view, 480, 640), expected)
    assert others


@exports
def test_views_leak_no_memory():
    image = picture(64, 64)
    for _ in range(3):
        borrow(image)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        borrow(image)
    assert len(gc.get_objects()) - before < 50


def test_only_rgb_in_one_block_is_borrowed():
    assert borrow(picture(4, 4).convert("L")) is None
    assert borrow(picture(4, 4).convert("RGBA")) is None
    assert borrow(Image.new("RGB", (3000, 2000))) is None  # 24 MB: two blocks


def test_without_the_arrow_interface_nothing_is_borrowed(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Image.Image) -> None:
        raise ValueError("of no interest")

    monkeypatch.setattr(Image.Image, "__arrow_c_array__", refuse, raising=False)
    assert borrow(picture(4, 4)) is None
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    assert borrow(picture(4, 4)) is None


@exports
def test_another_layout_is_not_borrowed(monkeypatch: pytest.MonkeyPatch):
    plain = Image.Image.__arrow_c_array__
    for other in (picture(4, 4).convert("L"), picture(5, 5)):  # 1 byte a pixel; more pixels
        monkeypatch.setattr(Image.Image, "__arrow_c_array__", lambda self, other=other: plain(other))
        assert borrow(picture(4, 4)) is None
    image = picture(4, 4)
    monkeypatch.setattr(
        Image.Image, "__arrow_c_array__", lambda self: plain(self)[::-1]
    )  # the capsules' names are wrong
    assert borrow(image) is None


@exports
def test_the_picture_can_be_written_to_afterwards():
    image = picture(4, 4)
    view = borrow(image)
    del view
    image.putpixel((1, 2), (1, 2, 3))
    assert image.getpixel((1, 2)) == (1, 2, 3)


def test_a_copy_has_three_bytes_a_pixel():
    image = picture(7, 5)
    assert copy(image).strides == (21, 3)
    assert np.array_equal(read(copy(image), 5, 7), np.asarray(image))


@pytest.mark.parametrize(
    ("height", "shared"), [(9, 5 * 30 * 4), (3, 3 * 30 * 4)]
)  # bytes of the rows within 2.5 of one
def test_bands_are_refused_if_neighbours_share_more_than_one_holds(
    monkeypatch: pytest.MonkeyPatch, height: int, shared: int
):
    for band, fits in ((shared, True), (shared - 1, False)):
        monkeypatch.setattr(memory, "_BAND", band)
        assert fits_bands(picture(30, height), 2.5) is fits


@pytest.mark.parametrize("zero_copy", [True, False])
@pytest.mark.parametrize(("height", "outputs"), [(500, 50), (50, 500), (333, 100), (1, 40), (40, 1)])
def test_bands_hold_what_their_rows_need(monkeypatch: pytest.MonkeyPatch, height: int, outputs: int, zero_copy: bool):
    monkeypatch.setattr(memory, "_BAND", 1)
    monkeypatch.setattr(memory, "borrow", lambda image: borrow(image) if zero_copy and image.height < height else None)
    image, scale, reach, done = picture(30, height), height / outputs, 3.5, 0

    def use(band: Band) -> None:
        nonlocal done
        first, last = band.outputs
        assert first == done
        assert band.first <= max(math.floor((first + 0.5) * scale - reach), 0)
        assert band.first + band.rows >= min(math.ceil((last - 0.5) * scale + reach), height)
        expected = np.asarray(image)[band.first : band.first + band.rows]
        assert np.array_equal(read(band, band.rows, 30), expected)
        done = last

    in_bands(image, outputs, lambda row: (row + 0.5) * scale, reach, use)
    assert done == outputs
