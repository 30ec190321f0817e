"""Zero-copy views of a Pillow picture's pixels, or copies of small bands of it.

Pillow stores RGB as 4 bytes a pixel. Since 11.2 it exports the buffer by the Arrow C data interface
(arrow.apache.org/docs/format/CDataInterface.html), unless the picture spans several of its memory blocks (over 16 MiB).
Such a picture is cropped into bands that fit one block each. `np.asarray` of a whole picture takes longer than the
resize.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_BAND = 8 << 20  # bytes: half of one of Pillow's blocks


@dataclass(frozen=True)
class Buffer:
    """Pixels at ``address``, valid while ``owner`` is referenced. ``strides``: bytes per row, bytes per pixel."""

    address: int
    strides: tuple[int, int]
    owner: Any


@dataclass(frozen=True)
class Band(Buffer):
    """``rows`` rows of a picture from ``first`` on: the input of the output rows ``outputs`` = (first, end)."""

    first: int
    rows: int
    outputs: tuple[int, int]


def fits_bands(image: Image.Image, reach: float) -> bool:
    """Whether two neighbouring bands share at most one band's bytes, so `in_bands` copies a row at most twice.

    False for a wide picture that shrinks to few rows.
    """
    return min(image.height, 2 * reach) * image.width * 4 <= _BAND


def in_bands(
    image: Image.Image, outputs: int, centre: Callable[[int], float], reach: float, use: Callable[[Band], None]
) -> None:
    """Pass an RGB picture to ``use`` in as few bands as possible, in order; each is freed before the next.

    Output row i of ``outputs`` depends on the source rows within ``reach`` of ``centre(i)``. A row whose centre lies
    below the picture is padding.
    """
    image.load()
    width, height = image.size
    if width * height * 4 <= _BAND or borrow(image):
        use(_band(image, 0, (0, outputs)))
        return
    step = max(1, int(_BAND / (width * 4) / max(centre(1) - centre(0), 1e-9)))
    for first in range(0, outputs, step):
        last = min(first + step, outputs)
        low = min(max(math.floor(centre(first) - reach), 0), height - 1)
        high = max(min(math.ceil(centre(last - 1) + reach), height), low + 1)
        use(_band(image.crop((0, low, width, high)), low, (first, last)))


def _band(part: Image.Image, first: int, outputs: tuple[int, int]) -> Band:
    """All rows of ``part``, which begins at row ``first`` of its picture."""
    buffer = borrow(part) or copy(part)
    return Band(buffer.address, buffer.strides, buffer.owner, first, part.height, outputs)


def copy(image: Image.Image) -> Buffer:
    """A numpy copy, 3 bytes a pixel."""
    array = np.ascontiguousarray(np.asarray(image, np.uint8))
    return Buffer(array.ctypes.data, (array.strides[0], array.strides[1]), array)


class _Schema(ctypes.Structure):
    """ArrowSchema, up to the last field that is read."""


class _Array(ctypes.Structure):
    """ArrowArray, up to the last field that is read."""


_Schema._fields_ = [
    ("format", ctypes.c_char_p),
    ("name", ctypes.c_char_p),
    ("metadata", ctypes.c_void_p),
    ("flags", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("children", ctypes.POINTER(ctypes.POINTER(_Schema))),
]
_Array._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_Array))),
]


def borrow(image: Image.Image) -> Buffer | None:
    """A zero-copy view, 4 bytes a pixel; None if Pillow exports no buffer, or one of another layout."""
    if image.mode != "RGB" or not hasattr(image, "__arrow_c_array__"):
        return None
    try:
        schema_capsule, array_capsule = image.__arrow_c_array__()
        schema = _Schema.from_address(_pointer(schema_capsule, b"arrow_schema"))
        array = _Array.from_address(_pointer(array_capsule, b"arrow_array"))
    except Exception:  # several blocks, or another mode: the caller copies instead
        return None
    pixels = image.width * image.height
    if schema.format != b"+w:4" or schema.n_children != 1 or schema.children[0].contents.format != b"C":
        return None  # not lists of 4 uint8
    if array.length != pixels or array.offset or array.n_children != 1:
        return None
    values = array.children[0].contents
    if values.length != 4 * pixels or values.offset or values.n_buffers != 2 or not values.buffers[1]:
        return None
    return Buffer(values.buffers[1], (image.width * 4, 4), (schema_capsule, array_capsule))


def _pointer(capsule: object, name: bytes) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, name))
