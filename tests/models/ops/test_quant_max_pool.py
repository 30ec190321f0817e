"""QuantMaxPool: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against torch."""

import ctypes

import numpy as np
import pytest
import torch

from calmclip.models.ops import reference
from calmclip.models.ops.spec import QUANT_MAX_POOL
from tests.models.ops.harness import BYTE_ISAS, Contract, Edge, kernel, run, session

NONE = (0, 0, 0, 0)
# x, window, strides, pads: channels below, at and above vectors; windows that end outside of the picture
CASES = [
    ((1, 9, 11, 32), (3, 3), (2, 2), (1, 1, 1, 1)), ((2, 8, 7, 65), (2, 2), (2, 2), NONE),
    ((1, 5, 6, 1), (2, 3), (1, 2), (0, 1, 1, 0)), ((1, 6, 5, 17), (1, 4), (3, 1), (0, 3, 0, 2)),
    ((1, 3, 3, 130), (3, 3), (1, 1), NONE), ((1, 4, 5, 16), (2, 3), (1, 1), NONE),
    ((1, 4, 5, 31), (3, 2), (2, 1), NONE),
    ((1, 4, 4, 63), (2, 2), (1, 2), (1, 1, 0, 1)), ((1, 3, 4, 64), (3, 3), (1, 1), NONE),
]  # fmt: skip


class Work(ctypes.Structure):
    """`MaxPoolWork` of csrc/kernels/quant_max_pool.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *(
            (name, ctypes.c_size_t)
            for name in ("height", "width", "channels", "out_height", "out_width", "top", "left")
        ),
        *((name, ctypes.c_size_t) for name in ("high", "wide", "down", "across")),
    )


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Work), ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)


def draw(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def pooled(x, window, strides, pads):
    """torch pads with -inf, which no byte is below; here windows outside of the picture give 0."""
    top, left, bottom, right = pads
    first = torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(first, (left, right, top, bottom))
    return torch.nn.functional.max_pool2d(padded, window, strides).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def attributes(window, strides, pads):
    return {"window": window, "strides": strides, "pads": pads}


def work_of(x, y, window, strides, pads, lay):
    return Work(
        x=lay(x), y=lay(y), height=x.shape[1], width=x.shape[2], channels=x.shape[3], out_height=y.shape[1],
        out_width=y.shape[2], top=pads[0], left=pads[1], high=window[0], wide=window[1], down=strides[0],
        across=strides[1],
    )  # fmt: skip


@pytest.mark.parametrize("isa", BYTE_ISAS)
@pytest.mark.parametrize(("shape", "window", "strides", "pads"), CASES)
def test_kernels_equal_torch(library, isa, shape, window, strides, pads):
    x, function = draw(0, shape), kernel(library, "quant_max_pool", isa, PROTOTYPE)
    exact = pooled(x, window, strides, pads)
    y, line = np.full((*exact.shape[:3], shape[3]), 99, np.uint8), np.zeros(shape[2] * shape[3], np.uint8)
    rows = exact.shape[0] * exact.shape[1]
    for first, last in ((0, 1), (1, rows)):
        function(work_of(x, y, window, strides, pads, lambda array: array.ctypes.data), first, last, line.ctypes.data)
    assert (y == exact).all()


@pytest.mark.parametrize(("shape", "window", "strides", "pads"), CASES)
def test_reference_op_and_function_equal_torch(library, shape, window, strides, pads):
    x, how = draw(1, shape), attributes(window, strides, pads)
    exact = pooled(x, window, strides, pads)
    assert (reference.quant_max_pool(x, **how) == exact).all()
    for ops in (library, None):
        (y,) = run(QUANT_MAX_POOL, {"x": x}, how, library=ops)
        assert y.shape == exact.shape
        assert (y == exact).all()


def test_windows_outside_of_the_picture_are_0(library):
    """The first and the last two places lie in the pads alone."""
    how = attributes((1, 2), (1, 1), (1, 3, 0, 3))
    x = np.full((1, 1, 1, 3), 7, np.uint8)
    for y in (reference.quant_max_pool(x, **how), run(QUANT_MAX_POOL, {"x": x}, how, library=library)[0]):
        assert y[..., 0].tolist() == [[[0] * 6, [0, 0, 7, 7, 0, 0]]]


def test_shapes_flow(library):
    x, how = draw(0, (2, 6, 7, 5)), attributes((3, 2), (2, 1), (1, 0, 0, 1))

    def known(shape):
        return session(QUANT_MAX_POOL, {"x": x}, how, library=library, shapes={"x": shape}).get_outputs()[0].shape

    assert known(("b", 6, 7, 5)) == ["b", 3, 7, 5]
    assert known((2, 1, 7, "c")) == [2, 0, 7, "c"]
    shape = known(("b", "h", 7, 5))
    assert [shape[0], *shape[2:]] == ["b", 7, 5]


def pool_at_edge(function, edge: Edge, shape, window, strides, pads) -> None:
    x = draw(0, shape)
    y, line = np.zeros(pooled(x, window, strides, pads).shape, np.uint8), np.zeros(shape[2] * shape[3], np.uint8)
    work = work_of(x, y, window, strides, pads, edge.lay)
    function(ctypes.byref(work), 0, y.shape[0] * y.shape[1], edge.lay(line))


EDGES = [("quant_max_pool", PROTOTYPE, pool_at_edge, CASES)]
CONTRACTS = [
    Contract(
        QUANT_MAX_POOL,
        lambda seed, columns: {"x": draw(seed, (2, 6, 7, 5))},
        attributes={"pads": (1, 0, 0, 1)},
        refused=[
            ({"x": [6, 7, 5]}, r"x has the shape \[6, 7, 5\]; expected \[batch, height, width, channels\]"),
            ({"window": (2,)}, r"window is \[2\]; expected 2 numbers, 1 to 2147483647"),
            ({"window": (0, 2)}, r"window is \[0, 2\]; expected 2 numbers, 1 to"),
            ({"strides": (1, 0)}, r"strides is \[1, 0\]; expected 2 numbers, 1 to"),
            ({"pads": (0, 0)}, r"pads is \[0, 0\]; expected 4 numbers, 0 to"),
            ({"pads": (0, -1, 0, 0)}, r"pads is \[0, -1, 0, 0\]; expected 4 numbers"),
        ],
        large=({"x": draw(2, (2, 120, 90, 64))}, {"window": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
        any_side=("x",),
        empty=[
            ({"x": draw(0, shape)}, {"pads": NONE}, y)
            for shape, y in (((0, 5, 5, 8), (0, 4, 4, 8)), ((1, 5, 5, 0), (1, 4, 4, 0)), ((1, 1, 5, 8), (1, 0, 4, 8)))
        ],
    ),
]
