"""The library's `ImageToPixels` kernel, called without ONNX Runtime. It runs without Python's global lock."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from calmclip.models.flow import Array
from calmclip.models.ops.library import Library

MAX_SIDE = 65_536  # kMaxSide of csrc/kernels/image_to_pixels.h

_FILTERS = {"bilinear": 0, "bicubic": 1}


class Picture(ctypes.Structure):
    """`Picture` of csrc/kernels/image_to_pixels.h: ``data`` holds ``rows`` of the ``height`` rows, from ``first`` on.

    Strides are in bytes. A pixel has 3 bytes, or 4 of which the last is ignored.
    """

    _fields_ = [  # ctypes requires a list
        ("data", ctypes.c_void_p),
        ("height", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("row_stride", ctypes.c_size_t),
        ("pixel_stride", ctypes.c_size_t),
        ("first", ctypes.c_size_t),
        ("rows", ctypes.c_size_t),
    ]


class Placement(ctypes.Structure):
    """`Placement` of the same file."""

    _fields_ = [  # ctypes requires a list
        ("resized_height", ctypes.c_size_t),
        ("resized_width", ctypes.c_size_t),
        ("top", ctypes.c_size_t),
        ("left", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("pad", ctypes.c_uint8),
    ]


def image_to_pixels(
    library: Library,
    picture: Picture,
    placement: Placement,
    resample: Literal["bilinear", "bicubic"],
    gain: Array,
    bias: Array,
    out: Array,
    outputs: tuple[int, int] | None = None,
    *,
    isa: str | None = None,
) -> None:
    """Write the rows ``outputs`` = (first, last), or all, of ``out`` float32 [..., 3, height, width], C-contiguous.

    ``gain``, ``bias``: float32, 3 numbers. ``isa``: the instruction set of the kernels; the best one by default.
    Raises ValueError for numbers out of range, and MemoryError.
    """
    shape = (3, placement.height, placement.width)
    if out.dtype != "float32" or not out.flags.c_contiguous or out.size != 3 * placement.height * placement.width:
        raise ValueError(f"the output is {out.dtype} {list(out.shape)}; expected contiguous float32 {list(shape)}")
    for name, array in (("gain", gain), ("bias", bias)):
        if array.dtype != "float32" or not array.flags.c_contiguous or array.size != 3:
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; expected 3 float32")
    first, last = outputs or (0, placement.height)
    kernels = {kernel.name: kernel.address for kernel in library.kernels if isa and kernel.isa == isa}
    status = _function(library.handle)(
        ctypes.byref(picture),
        ctypes.byref(placement),
        _FILTERS[resample],
        gain.ctypes.data,
        bias.ctypes.data,
        first,
        last,
        out.ctypes.data,
        kernels["resize_rows"] if isa else None,
        kernels["resize_columns"] if isa else None,
    )
    if status == 1:
        raise MemoryError("the picture kernel has no memory; reduce the number of threads or the size of the picture")
    if status:
        raise ValueError(
            f"the picture kernel refused rows {first} to {last} of {list(shape)}; expected rows within the output"
        )


@cache  # a process loads one library
def _function(handle: ctypes.CDLL) -> Callable[..., int]:
    function: Any = handle.calmclip_image_to_pixels
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, pointer, ctypes.c_int, pointer, pointer, size, size, pointer, pointer, pointer]
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]
