"""QuantLookup: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against Python's
`bytes.translate`."""

import ctypes

import numpy as np
import pytest

from calmclip.models.ops import build, reference
from calmclip.models.ops.spec import QUANT_LOOKUP
from tests.models.ops.harness import Contract, Edge, kernel, run

ISAS = build.isas("TABLE_")
PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
SIZES = (*range(70), 95, 96, 97, 127, 128, 129, 191, 192, 193, 1000)
SHAPES = [(1,), (256,), (7, 13), (2, 3, 5, 7), (1, 1, 1, 1, 65), (3, 0, 4), (0,), ()]


def draw(seed, shape):
    rng = np.random.default_rng(seed)
    return {"x": np.asarray(rng.integers(0, 256, shape), np.uint8), "table": rng.integers(0, 256, 256).astype(np.uint8)}


def exact(feeds):
    y = feeds["x"].tobytes().translate(feeds["table"].tobytes())
    return np.frombuffer(y, np.uint8).reshape(feeds["x"].shape)


@pytest.fixture(params=ISAS)
def look(library, request):
    """A kernel as a function of bytes and table, between guard values."""
    function = kernel(library, "quant_lookup", request.param, PROTOTYPE)

    def go(x, table, at=32, in_place=False):
        y = np.full(at + x.size + 64, 77, np.uint8)
        if in_place:
            y[at : at + x.size] = x
        function(y.ctypes.data + at if in_place else x.ctypes.data, y.ctypes.data + at, x.size, table.ctypes.data)
        assert (y[:at] == 77).all()
        assert (y[at + x.size :] == 77).all()
        return y[at : at + x.size]

    return go


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_translate(shape):
    feeds = draw(0, shape)
    np.testing.assert_array_equal(reference.quant_lookup(**feeds), exact(feeds))


@pytest.mark.parametrize("in_place", [False, True])
def test_kernels_equal_translate_at_any_size_and_place(look, in_place):
    for size in SIZES:
        feeds = draw(size, (size,))
        np.testing.assert_array_equal(look(**feeds, at=32 + size % 5, in_place=in_place), exact(feeds))


def test_kernels_look_up_every_byte_at_every_place_of_a_vector(look):
    """Each byte at each of 64 positions; each table is another permutation."""
    table = np.random.default_rng(0).permutation(256).astype(np.uint8)
    for place in range(64):
        x = np.roll(np.arange(256, dtype=np.uint8), place)
        np.testing.assert_array_equal(look(x, table), exact({"x": x, "table": table}))


@pytest.mark.parametrize("shape", SHAPES)
def test_op_and_function_equal_translate(library, shape):
    feeds = draw(1, shape)
    for ops in (library, None):
        (y,) = run(QUANT_LOOKUP, feeds, {}, library=ops)
        np.testing.assert_array_equal(y, exact(feeds), strict=True)


def look_up_at_edge(function, edge: Edge, count: int) -> None:
    x, y, table = (edge.lay(np.zeros(size, np.uint8)) for size in (count, count, 256))
    function(x, y, count, table)


EDGES = [("quant_lookup", PROTOTYPE, look_up_at_edge, [(size,) for size in SIZES])]
CONTRACTS = [
    Contract(
        QUANT_LOOKUP,
        lambda seed, columns: draw(seed, (2, 8)),
        refused=[
            *(
                ({"table": list(shape)}, rf"table has the shape \[{sides}\]; expected \[256\]")
                for shape, sides in (((255,), "255"), ((257,), "257"), ((1, 256), "1, 256"), ((0,), "0"), ((), ""))
            ),
        ],
        large=(draw(2, (3, 300_001)), {}),
        in_place=("x",),
        any_side=("x",),
    ),
]
