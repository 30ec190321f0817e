"""The bytes of a Pillow picture without a copy, or with the smallest that serves.

Pillow keeps RGB as 4 bytes a pixel and, since 11.2, lends them by the Arrow C data interface
(arrow.apache.org/docs/format/CDataInterface.html). It refuses a picture that spans several of its memory blocks (over
16 MiB); such a one is cut into bands, each of which it copies row by row. `np.asarray` takes longer than the resize.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_BAND = 8 << 20  # bytes: half a block of Pillow's


@dataclass(frozen=True)
class Memory:
    """Bytes that stay where they are as long as ``owner`` is held. ``strides``: bytes of a row, of a pixel."""

    address: int
    strides: tuple[int, int]
    owner: Any


@dataclass(frozen=True)
class Band(Memory):
    """``rows`` rows of a picture from ``first`` on: all that the rows ``outputs`` = (first, last) are made of."""

    first: int
    rows: int
    outputs: tuple[int, int]


def worth_it(image: Image.Image, reach: float) -> bool:
    """Whether what two neighbouring bands share is no larger than a band.

    Then `in_bands` copies a row twice at most, and Pillow lends the band. Not so of wide pictures that become few rows.
    """
    return min(image.height, 2 * reach) * image.width * 4 <= _BAND


def in_bands(
    image: Image.Image, outputs: int, centre: Callable[[int], float], reach: float, use: Callable[[Band], None]
) -> None:
    """Hand an RGB picture to ``use`` in as few bands as it takes, in order, each gone before the next is made.

    Output row i of ``outputs`` is made of the source rows within ``reach`` of ``centre(i)``; rows whose centre lies
    past the picture's end are of padding.
    """
    image.load()
    whole = borrow(image)
    width, height = image.size
    if whole or width * height * 4 <= _BAND:
        whole = whole or copy(image)
        use(Band(whole.address, whole.strides, whole.owner, 0, height, (0, outputs)))
        return
    step = max(1, int(_BAND / (width * 4) / max(centre(1) - centre(0), 1e-9)))
    for first in range(0, outputs, step):
        last = min(first + step, outputs)
        low = min(max(math.floor(centre(first) - reach), 0), height - 1)
        high = max(min(math.ceil(centre(last - 1) + reach), height), low + 1)
        use(_band(image, low, high, (first, last)))


def _band(image: Image.Image, low: int, high: int, outputs: tuple[int, int]) -> Band:
    part = image.crop((0, low, image.width, high))
    memory = borrow(part) or copy(part)
    return Band(memory.address, memory.strides, memory.owner, low, high - low, outputs)


def copy(image: Image.Image) -> Memory:
    """As numpy reads it: 3 bytes a pixel."""
    array = np.ascontiguousarray(np.asarray(image, np.uint8))
    return Memory(array.ctypes.data, (array.strides[0], array.strides[1]), array)


class _Schema(ctypes.Structure):
    """ArrowSchema, up to what is read."""


class _Array(ctypes.Structure):
    """ArrowArray, up to what is read."""


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


def borrow(image: Image.Image) -> Memory | None:
    """The picture's own bytes, 4 a pixel; None where Pillow does not lend them, or not as they are expected."""
    if image.mode != "RGB" or not hasattr(image, "__arrow_c_array__"):
        return None
    try:
        schema_capsule, array_capsule = image.__arrow_c_array__()
        schema = _Schema.from_address(_pointer(schema_capsule, b"arrow_schema"))
        array = _Array.from_address(_pointer(array_capsule, b"arrow_array"))
    except Exception:  # several blocks, a mode it does not lend: whatever it says, there is another way
        return None
    pixels = image.width * image.height
    if schema.format != b"+w:4" or schema.n_children != 1 or schema.children[0].contents.format != b"C":
        return None  # not lists of 4 uint8
    if array.length != pixels or array.offset or array.n_children != 1:
        return None
    values = array.children[0].contents
    if values.length != 4 * pixels or values.offset or values.n_buffers != 2 or not values.buffers[1]:
        return None
    return Memory(values.buffers[1], (image.width * 4, 4), (schema_capsule, array_capsule))


def _pointer(capsule: object, name: bytes) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, name))
