"""Kernels touch nothing behind their tensors: these end where memory does, in a process of its own.

The sanitizers do not see what masked loads and stores touch.
"""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np

from calmclip.models.ops.library import Library, look
from tests.models.ops import test_quant_add as adding
from tests.models.ops import test_quant_attention as attention
from tests.models.ops import test_quant_depthwise as depthwise
from tests.models.ops import test_quant_layer_norm as norm
from tests.models.ops import test_quant_lookup as lookup
from tests.models.ops import test_quant_patches as patches
from tests.models.ops import test_softmax as softmax
from tests.models.ops.harness import apart, kernels

PAGES = 16


def test_kernels_touch_nothing_behind_their_tensors(library: Library):
    """Each that this processor has."""
    names = {name for name, *_ in KERNELS}
    assert int(apart(__file__, library)[0]) == sum(one.runs and one.name in names for one in library.kernels)


class Edge:
    """Memory that ends; each tensor has some of its own."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def lay(self, x: np.ndarray) -> int:
        """The address of a copy whose last byte is the last there is."""
        memory = mmap.mmap(-1, (PAGES + 1) * mmap.PAGESIZE)
        self.maps.append(memory)
        edge = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + PAGES * mmap.PAGESIZE
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        ctypes.memmove(edge - x.nbytes, x.ctypes.data, x.nbytes)
        return edge - x.nbytes


def attend(function, edge: Edge, rows: int, keys: int, dims: int) -> None:
    mask = attention.causal(rows, keys)
    mask[0] = -0.5
    feeds = attention.draw(0, 1, rows, keys, 1, dims, mask=mask)
    ends = {name: edge.lay(feeds[name]) for name in ("q", "k", "v", "mask", "y_scale", "y_zero")}
    room = np.empty(attention.scratch_bytes(keys, dims) + 64, np.uint8)
    head = attention.Head(
        y=edge.lay(np.zeros(rows * dims, np.uint8)), q_step=dims, k_step=dims, v_step=dims, y_step=dims, rows=rows,
        keys=keys, dims=dims, mask_row=keys, mask_key=1, y_scale_step=1, y_zero_step=1, scale=1e-3, v_scale=0.02,
        zeta=1.0, q_zero=9, **ends,
    )  # fmt: skip
    function(ctypes.byref(head), room.ctypes.data + -room.ctypes.data % 64)


def normalise(function, edge: Edge, rows: int, width: int) -> None:
    feeds = norm.draw(0, rows, width, columns=True)
    ends = {name: edge.lay(feeds[name]) for name in ("x", "residual", "weight", "bias")}
    room = edge.lay(np.zeros(width, np.float32))
    ends |= {name: edge.lay(np.zeros((rows, width), np.float32)) for name in ("normed", "sum")}
    ends |= {"inverse": edge.lay(feeds["y_scale"]), "zero": edge.lay(feeds["y_zero"].astype(np.int32))}
    ends |= {"y": edge.lay(np.zeros((rows, width), np.uint8))}
    function(ctypes.byref(norm.Rows(rows=rows, width=width, epsilon=1e-5, columns=True, **ends)), room)


def cut(function, edge: Edge, count: int, width: int) -> None:
    x, y = np.zeros(count * width, np.float32), np.zeros(count * width, np.uint8)
    function(edge.lay(x), width, count, edge.lay(y), width, 1.0, 0)


def cut_windows(function, edge: Edge, lines: int, width: int, stride: int, count: int) -> None:
    size = (count - 1) * stride + width + patches.PAST_LINE
    at = np.array([edge.lay(np.zeros(size, np.uint8)) for _ in range(lines)], np.uintp)
    y = edge.lay(np.zeros(count * lines * width, np.uint8))
    function(ctypes.byref(patches.Windows(edge.lay(at), lines, width, stride, count, y)))


def convolve(function, edge: Edge, channels: int, size: int, stride: int) -> None:
    """A picture that ends within a window, a strip and a tile."""
    height, width, window, strides = 6, 9, (size, size), (stride, stride)
    feeds, pads = depthwise.draw(0, (1, height, width, channels), window), (size // 2, size // 2, 0, size - 1)
    shape = depthwise.out_shape(feeds["x"].shape, feeds["weight"].shape, strides, pads)
    each = {name: depthwise.blocks(np.ones(channels, np.float32)) for name in ("scale", "bias", "inverse")}
    each |= {name: depthwise.blocks(np.ones(channels, np.int32)) for name in ("start", "zero")}
    ends = {name: edge.lay(numbers) for name, numbers in each.items()}
    y = np.zeros(shape, np.uint8)
    work = depthwise.Work(
        x=edge.lay(feeds["x"]), y=edge.lay(y), batch=1, height=height, width=width, channels=channels,
        out_height=shape[1], out_width=shape[2], top=pads[0], left=pads[1], h=size, w=size, down=stride, across=stride,
        weights=edge.lay(depthwise.packed(feeds["weight"], strides)), around=edge.lay(np.zeros(channels, np.uint8)),
        **ends,
    )  # fmt: skip
    function(ctypes.byref(work), 0, depthwise.units(y, window, strides))


def add(function, edge: Edge, rows: int, width: int) -> None:
    ends = {name: edge.lay(np.zeros(rows * width, np.uint8)) for name in "aby"}
    ends |= {name: edge.lay(np.zeros(adding.BLOCK, np.float32)) for name in ("a_factor", "b_factor", "start")}
    ends |= {"zero": edge.lay(np.zeros(adding.BLOCK, np.int32))}
    function(ctypes.byref(adding.Block(rows=rows, step=width, width=width, **ends)))


def look_up(function, edge: Edge, count: int) -> None:
    x, y, table = (edge.lay(np.zeros(size, np.uint8)) for size in (count, count, 256))
    function(x, y, count, table)


def soften(function, edge: Edge, rows: int, cols: int) -> None:
    row = edge.lay(np.zeros((rows, cols), np.float32))
    function(row, row, rows, cols, 0.0, 1.0, False)


COLUMNS = (*range(1, 70), 127, 128, 129, 319, 320, 321, 577)
KERNELS = (
    *((form, softmax.FUNCTION, soften, [(rows, cols) for rows in (1, 2, 3) for cols in COLUMNS])
      for form in softmax.FORMS),
    ("quant_attention", attention.PROTOTYPE, attend, attention.SIZES),
    ("quant_layer_norm", norm.PROTOTYPE, normalise, [(2, width) for width in norm.WIDTHS]),
    ("quant_patches", patches.PROTOTYPE, cut, [(3, width) for width in range(1, 70)]),
    ("cut_windows", patches.CUT, cut_windows, patches.WINDOWS),
    ("quant_depthwise", depthwise.PROTOTYPE, convolve,
     [(channels, size, stride) for channels in depthwise.CHANNELS for size in (2, 3, 5, 7) for stride in (1, 2)]),
    ("quant_add", adding.PROTOTYPE, add, [(3, width) for width in range(1, adding.BLOCK + 1)]),
    ("quant_lookup", lookup.PROTOTYPE, look_up, [(size,) for size in lookup.SIZES]),
)  # fmt: skip


def to_the_edge(library: Library) -> None:
    ran = 0
    for name, prototype, go, cases in KERNELS:
        for function in kernels(library, name, prototype).values():
            ran += 1
            for case in cases:
                go(function, Edge(), *case)
    print(ran, "kernels")
    sys.stdout.flush()
    os._exit(0)  # the mappings end elsewhere than Python believes


if __name__ == "__main__":
    at_hand = look(Path(sys.argv[1]))
    assert isinstance(at_hand, Library), at_hand
    to_the_edge(at_hand)
