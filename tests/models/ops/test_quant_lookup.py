"""QuantLookup: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, byte by byte in
Python's own `bytes.translate`."""

import ctypes
import platform

import numpy as np
import pytest

from calmclip.models.ops import build, reference
from calmclip.models.ops.spec import QUANT_LOOKUP
from tests.models.ops.quantized import kernel, run, session

ISAS = build.TABLE_ISAS.get(platform.machine(), ("scalar",))
PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
SIZES = (*range(70), 95, 96, 97, 127, 128, 129, 191, 192, 193, 1000)
SHAPES = [(1,), (256,), (7, 13), (2, 3, 5, 7), (1, 1, 1, 1, 65), (3, 0, 4), (0,), ()]


def draw(seed, shape):
    rng = np.random.default_rng(seed)
    return {"x": np.asarray(rng.integers(0, 256, shape), np.uint8), "table": rng.integers(0, 256, 256).astype(np.uint8)}


def exact(feeds):
    found = feeds["x"].tobytes().translate(feeds["table"].tobytes())
    return np.frombuffer(found, np.uint8).reshape(feeds["x"].shape)


@pytest.fixture(params=ISAS)
def look(library, request):
    """A kernel as a function of bytes and table, between guards that it must not touch."""
    function = kernel(library, "quant_lookup", request.param, PROTOTYPE)
    if function is None:
        pytest.skip(f"no {request.param} here")

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


def test_kernels_know_every_byte_at_every_place_of_a_vector(look):
    """Each byte at each of 64 places, and a table that is another permutation of all."""
    table = np.random.default_rng(0).permutation(256).astype(np.uint8)
    for place in range(64):
        x = np.roll(np.arange(256, dtype=np.uint8), place)
        np.testing.assert_array_equal(look(x, table), exact({"x": x, "table": table}))


@pytest.mark.parametrize("shape", SHAPES)
def test_op_and_function_equal_translate(library, shape):
    feeds = draw(1, shape)
    for given in (library, None):
        (y,) = run(QUANT_LOOKUP, feeds, {}, library=given)
        np.testing.assert_array_equal(y, exact(feeds), strict=True)


def test_threads_share_a_large_tensor(library):
    feeds = draw(2, (3, 300_001))
    for threads in (1, 2, 3):
        (y,) = run(QUANT_LOOKUP, feeds, {}, library=library, threads=threads)
        np.testing.assert_array_equal(y, exact(feeds), strict=True)


def test_a_table_may_be_a_constant(library):
    """Elsewhere it is fed."""
    feeds = draw(3, (5, 33))
    for given in (library, None):
        opened = session(QUANT_LOOKUP, feeds, {}, library=given, constants=("table",))
        for seed in (4, 5):
            x = draw(seed, (5, 33))["x"]
            np.testing.assert_array_equal(opened.run(None, {"x": x})[0], exact(feeds | {"x": x}), strict=True)


@pytest.mark.parametrize("shape", [(255,), (257,), (1, 256), (0,), ()])
def test_op_refuses_a_table_of_another_shape(library, shape):
    feeds = draw(0, (8,)) | {"table": np.zeros(shape, np.uint8)}
    said = ", ".join(map(str, shape))
    with pytest.raises(Exception, match=rf"QuantLookup: table has the shape \[{said}\]; expected \[256\]"):
        run(QUANT_LOOKUP, feeds, {}, library=library)


@pytest.mark.parametrize("name", ["x", "table"])
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float32])
def test_op_takes_bytes_only(library, name, dtype):
    feeds = draw(0, (8,))
    feeds[name] = feeds[name].astype(dtype)
    kind = {"int8": "int8", "int32": "int32", "float32": "float"}[np.dtype(dtype).name]
    with pytest.raises(Exception, match=rf"tensor\({kind}\).* '?\(?{name}\)?'?.*invalid"):
        run(QUANT_LOOKUP, feeds, {}, library=library)
