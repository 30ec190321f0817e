"""QuantPatches: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against torch's
unfold in float64."""

import ctypes

import numpy as np
import pytest
import torch

from calmclip.export.functions.quant_patches import quant_patches
from calmclip.models.ops import reference
from calmclip.models.ops.spec import QUANT_PATCHES
from tests.models.ops.harness import BYTE_ISAS, Contract, Edge, kernel, load, model, near, node, run

# shape, patch, other attributes
CASES = [
    ((1, 3, 64, 96), (32, 32), {}), ((2, 3, 32, 48), (16, 16), {}), ((1, 3, 42, 28), (14, 14), {}),
    ((2, 1, 6, 35), (2, 7), {}), ((1, 4, 5, 3), (5, 1), {}), ((3, 2, 4, 66), (1, 33), {}),
    ((1, 3, 224, 224), (32, 32), {}),
    ((2, 3, 65, 50), (32, 16), {}),  # the remainder is in no patch
    ((1, 3, 260, 260), (3, 3), {"strides": (2, 2), "pads": (0, 0, 1, 1)}),
    ((2, 3, 32, 30), (3, 3), {"strides": (2, 2), "pads": (1, 1, 1, 1)}),
    ((2, 2, 9, 70), (4, 33), {"strides": (1, 5), "pads": (3, 0, 0, 2)}),
    ((1, 1, 12, 40), (2, 20), {"strides": (7, 19)}),  # strides over the height of a patch
    ((3, 2, 7, 5), (2, 1), {"strides": (0, 3), "pads": (2, 4, 5, 3)}),  # some patches are all padding
    ((1, 2, 6, 6), (5, 2), {"strides": (1, 1)}), ((2, 3, 8, 9), (7, 7), {"strides": (4, 4), "pads": (3, 3, 3, 3)}),
    ((1, 1, 3, 3), (1, 1), {"strides": (1, 1)}),
]  # fmt: skip


def draw(seed, shape, scale=0.02, zero=None):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(0, 2, shape).astype(np.float32),
        "y_scale": np.array(scale, np.float32),
        "y_zero": np.array(rng.integers(256) if zero is None else zero, np.uint8),
    }


def exact(feeds, patch, strides=(0, 0), pads=(0, 0, 0, 0)):
    top, left, bottom, right = pads
    x = torch.nn.functional.pad(torch.from_numpy(feeds["x"].astype(np.float64)), (left, right, top, bottom))
    stride = tuple(step or size for step, size in zip(strides, patch, strict=True))
    columns = torch.nn.functional.unfold(x, patch, stride=stride)
    return columns.transpose(1, 2).numpy() / float(feeds["y_scale"]) + int(feeds["y_zero"])


PROTOTYPE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float,
    ctypes.c_int32,
)  # fmt: skip


@pytest.fixture(params=BYTE_ISAS)
def cut(library, request):
    """A kernel as a function of a row: -> [count, width], between guard values."""
    function = kernel(library, "quant_patches", request.param, PROTOTYPE)

    def go(x, width, scale, zero):
        count, step = len(x) // width, width + 5
        y = np.full(count * step + 64, 77, np.uint8)
        function(x.ctypes.data, width, count, y.ctypes.data + 32, step, float(np.float32(1) / np.float32(scale)), zero)
        assert (y[:32] == 77).all()
        assert (y[-32:] == 77).all()
        rows = y[32:-32].reshape(count, step)
        assert (rows[:, width:] == 77).all()
        return rows[:, :width]

    return go


class Windows(ctypes.Structure):
    _fields_ = [("line", ctypes.c_void_p), *((n, ctypes.c_size_t) for n in ("lines", "width", "stride", "count")),
                ("y", ctypes.c_void_p)]  # fmt: skip


CUT = ctypes.CFUNCTYPE(None, ctypes.POINTER(Windows))
PAST_LINE = 32  # kPastLine
# lines, width, stride, count
WINDOWS = [(9, 3, 2, 130), (9, 3, 2, 1), (1, 1, 1, 1), (1, 1, 3, 5), (1, 2, 1, 7)]
WINDOWS += [(lines, width, 1 + width // 2, 4) for lines in (1, 4) for width in (*range(1, 36), 47, 64, 65, 97)]


@pytest.fixture(params=BYTE_ISAS)
def windows(library, request):
    """A kernel as a function of lines: -> [count, lines, width], between guard values."""
    function = kernel(library, "cut_windows", request.param, CUT)

    def go(lines, width, stride, count):
        at = np.array([line.ctypes.data for line in lines], np.uintp)
        y = np.full(64 + count * len(lines) * width, 77, np.uint8)
        task = Windows(at.ctypes.data, len(lines), width, stride, count, y.ctypes.data + 32)
        function(ctypes.byref(task))
        assert (y[:32] == 77).all()
        assert (y[-32:] == 77).all()
        return y[32:-32].reshape(count, len(lines), width)

    return go


@pytest.mark.parametrize(("shape", "patch", "more"), CASES)
def test_reference_equals_torch(shape, patch, more):
    feeds = draw(0, shape)
    assert near(reference.quant_patches(**feeds, patch=patch, **more), exact(feeds, patch, **more), most=1e-5)


def test_windows_contain_their_columns_of_the_lines(windows):
    for lines, width, stride, count in WINDOWS:
        size = (count - 1) * stride + width + PAST_LINE
        held = [np.random.default_rng(number).integers(0, 256, size).astype(np.uint8) for number in range(lines)]
        expected = [[line[p * stride : p * stride + width] for line in held] for p in range(count)]
        assert (windows(held, width, stride, count) == expected).all()


def test_kernels_equal_float64(cut):
    for width in (*range(1, 36), 47, 48, 49, 63, 64, 65, 130):
        feeds = draw(width, (3 * width,), zero=(0, 128, 255, 77)[width % 4])
        y = cut(feeds["x"], width, float(feeds["y_scale"]), int(feeds["y_zero"]))
        assert near(y.ravel(), feeds["x"].astype(np.float64) / float(feeds["y_scale"]) + int(feeds["y_zero"]))


def test_ties_are_rounded_to_even_and_other_values_are_clipped(cut):
    x = np.array(
        [-0.5, 0.5, 1.5, 2.5, -1e30, 1e30, -np.inf, np.inf, 3e9, -3e9, 126.5, 127.5, -101, -102, 154, 155], np.float32
    )
    expected = [101, 101, 103, 103, 0, 255, 0, 255, 255, 0, 227, 229, 0, 0, 255, 255]
    assert cut(x, 16, 1.0, 101)[0].tolist() == expected
    assert cut(x, 8, 1.0, 101).ravel().tolist() == expected


@pytest.mark.parametrize(("shape", "patch", "more"), CASES)
def test_op_and_function_equal_torch(library, shape, patch, more):
    feeds, how = draw(1, shape), {"patch": patch, **more}
    for ops in (library, None):
        (y,) = run(QUANT_PATCHES, feeds, how, library=ops)
        assert near(y, exact(feeds, **how), most=1e-4)


def test_a_node_without_strides_and_pads_has_patches_that_do_not_overlap(library):
    """Bundles that were exported before these attributes existed have such nodes."""
    feeds = draw(0, (2, 3, 12, 8))
    ends = {name: (array.dtype, array.shape) for name, array in feeds.items()}
    nodes = [node(QUANT_PATCHES, feeds, ["y"], patch=[4, 4])]
    proto = model(nodes, ends, {"y": (np.uint8, None)}, functions=[quant_patches()])
    for ops in (library, None):
        (y,) = load(proto, ops).run(None, feeds)
        assert near(y, exact(feeds, (4, 4)), most=1e-4)


def cut_at_edge(function, edge: Edge, count: int, width: int) -> None:
    x, y = np.zeros(count * width, np.float32), np.zeros(count * width, np.uint8)
    function(edge.lay(x), width, count, edge.lay(y), width, 1.0, 0)


def cut_windows_at_edge(function, edge: Edge, lines: int, width: int, stride: int, count: int) -> None:
    size = (count - 1) * stride + width + PAST_LINE
    at = np.array([edge.lay(np.zeros(size, np.uint8)) for _ in range(lines)], np.uintp)
    y = edge.lay(np.zeros(count * lines * width, np.uint8))
    function(ctypes.byref(Windows(edge.lay(at), lines, width, stride, count, y)))


EDGES = [
    ("quant_patches", PROTOTYPE, cut_at_edge, [(3, width) for width in range(1, 70)]),
    ("cut_windows", CUT, cut_windows_at_edge, WINDOWS),
]
CONTRACTS = [
    Contract(
        QUANT_PATCHES,
        lambda seed, columns: draw(seed, (1, 3, 8, 8)),
        attributes={"patch": (4, 4)},
        refused=[
            ({"x": [3, 8, 8]}, r"x has the shape \[3, 8, 8\]; expected \[batch, channels, height, width\]"),
            ({"patch": (4, 0)}, r"patch is \[4, 0\]; expected a height and a width"),
            ({"patch": (4, 4, 4)}, r"patch is \[4, 4, 4\]; expected a height and a width"),
            ({"strides": (1, -1)}, r"strides is \[1, -1\]; expected a stride down and one to the right"),
            ({"strides": (1, 1, 1)}, r"strides is \[1, 1, 1\]; expected a stride down"),
            ({"pads": (0, 0, 0, -1)}, r"pads is \[0, 0, 0, -1\]; expected top, left, bottom and right"),
            (
                {"strides": (1, 65537)},
                r"strides is \[1, 65537\]; expected a stride down and one to the right, up to 65536",
            ),
            ({"pads": (1, 1)}, r"pads is \[1, 1\]; expected top, left"),
        ],
        large=(draw(1, (1, 3, 260, 260)), {"patch": (3, 3), "strides": (2, 2)}),
        empty=[
            (draw(0, (0, 3, 8, 8)), {"patch": (4, 2)}, (0, 8, 24)),
            (draw(0, (2, 3, 3, 8)), {"patch": (4, 2)}, (2, 0, 24)),  # lower than a patch
            (draw(0, (2, 3, 3, 0)), {"patch": (4, 2), "pads": (1, 0, 0, 1)}, (2, 0, 24)),
            (draw(0, (2, 0, 8, 8)), {"patch": (4, 2), "strides": (1, 2)}, (2, 20, 0)),
        ],
        empty_by_function=True,
    ),
]
