"""QuantRows: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against torch in
float64."""

import ctypes

import numpy as np
import pytest
import torch

from calmclip.models.ops import reference
from calmclip.models.ops.spec import QUANT_ROWS
from tests.models.ops.harness import BYTE_ISAS, Contract, Edge, kernel, near, run

# around 8 and 16 lanes, and four times as many
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 47, 63, 64, 65, 79, 127, 130, 768, 3072]
NORMALIZED = {"normalize": 1, "epsilon": 1e-5}


def draw(seed, *shape, weighted=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, shape) * 10.0 ** rng.integers(-3, 4, (*shape[:-1], 1))  # rows of all sizes
    weight = rng.normal(0, 1, shape[-1]) if weighted else np.ones(1)
    return {"x": x.astype(np.float32), "weight": weight.astype(np.float32)}


def exact(feeds, normalize=0, epsilon=1e-6):
    """y before rounding and the scales, float64."""
    x, weight = (torch.from_numpy(array.astype(np.float64)) for array in (feeds["x"], feeds["weight"]))
    weight = weight.expand(x.shape[-1])
    z = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, epsilon) if normalize else x * weight
    scale = (z.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (z / scale + 128).numpy(), scale.numpy()


def agree(outputs, expected):
    y, scale = outputs
    return near(y, expected[0]) and np.allclose(scale, expected[1], rtol=2e-6, atol=0)


class Rows(ctypes.Structure):
    """`ScaledRows` of quant_rows.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "scale")),
        ("rows", ctypes.c_size_t), ("width", ctypes.c_size_t), ("epsilon", ctypes.c_float),
        ("normalize", ctypes.c_bool),
    ]  # fmt: skip


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Rows))


@pytest.fixture(params=BYTE_ISAS)
def rows(library, request):
    """A kernel as a function of feeds of rank 2; outputs are between guard values."""
    function = kernel(library, "quant_rows", request.param, PROTOTYPE)

    def go(feeds, normalize=0, epsilon=1e-6):
        count, width = feeds["x"].shape
        y, scale = np.full(count * width + 128, 77, np.uint8), np.full(count + 32, 77, np.float32)
        weight = feeds["weight"].ctypes.data if feeds["weight"].size == width else None
        work = Rows(
            x=feeds["x"].ctypes.data, weight=weight, y=y.ctypes.data + 64, scale=scale.ctypes.data + 64,
            rows=count, width=width, epsilon=epsilon, normalize=bool(normalize),
        )  # fmt: skip
        function(ctypes.byref(work))
        assert {*y[:64], *y[-64:]} == {77}
        assert {*scale[:16], *scale[-16:]} == {77}
        return y[64:-64].reshape(count, width), scale[16:-16].reshape(count, 1)

    return go


def test_reference_equals_torch():
    for width in WIDTHS:
        for how in ({}, NORMALIZED):
            feeds = draw(width, 3, width)
            assert agree(reference.quant_rows(**feeds, **how), exact(feeds, **how))


@pytest.mark.parametrize("how", [{}, NORMALIZED], ids=["plain", "normalized"])
def test_kernels_equal_float64(rows, how):
    for width in WIDTHS:
        for weighted in (True, False):
            feeds = draw(width, 4, width, weighted=weighted or width == 1)
            y, scale = rows(feeds, **how)
            assert agree((y, scale), exact(feeds, **how)), width
            assert (y.max(1) == 255).all() or (y.min(1) == 1).any()  # the largest number is 127 steps
            assert y.min() >= 1


def test_a_row_depends_on_that_row_alone(rows):
    """A token with huge numbers spoils no other."""
    feeds = draw(1, 3, 100)
    alone = [rows({**feeds, "x": feeds["x"][i : i + 1]}, **NORMALIZED) for i in range(3)]
    feeds["x"][1] *= 1e5
    y, scale = rows(feeds, **NORMALIZED)
    for i in (0, 2):
        assert (y[i] == alone[i][0]).all()
        assert scale[i] == alone[i][1]


def test_rows_of_zeros_and_ties(rows):
    feeds = {"x": np.zeros((2, 20), np.float32), "weight": np.ones(20, np.float32)}
    feeds["x"][1] = np.arange(20) / 2
    feeds["x"][1, -1] = 127
    for how in ({}, NORMALIZED):
        y, scale = rows(feeds, **how)
        assert (y[0] == 128).all()
        assert 0 < scale[0] < 1e-20
    y, scale = rows(feeds)
    assert scale[1] == 1
    assert y[1, :-1].tolist() == (np.rint(np.arange(19) / 2) + 128).tolist()  # half to even


@pytest.mark.parametrize("shape", [(17,), (5, 17), (2, 50, 96), (2, 3, 4, 5), (1, 1200, 64)])
def test_op_and_function_equal_float64(library, shape):
    for how in ({}, NORMALIZED):
        for weighted in (False, True):
            feeds = draw(5, *shape, weighted=weighted)
            for ops in (library, None):
                assert agree(run(QUANT_ROWS, feeds, how, library=ops), exact(feeds, **how))


def quantize_at_edge(function, edge: Edge, count: int, width: int) -> None:
    feeds = draw(0, count, width)
    ends = {name: edge.lay(array) for name, array in feeds.items()}
    ends |= {"y": edge.lay(np.zeros((count, width), np.uint8)), "scale": edge.lay(np.zeros(count, np.float32))}
    function(ctypes.byref(Rows(rows=count, width=width, epsilon=1e-5, normalize=True, **ends)))


EDGES = [("quant_rows", PROTOTYPE, quantize_at_edge, [(2, width) for width in WIDTHS])]
CONTRACTS = [
    Contract(
        QUANT_ROWS,
        lambda seed, columns: draw(seed, 2, 8, weighted=columns),
        attributes=NORMALIZED,
        refused=[
            ({"x": []}, r"x has the shape \[\]; expected \[..., columns\], at least one"),
            ({"x": [2, 0]}, r"x has the shape \[2, 0\]; expected"),
            ({"weight": [7]}, r"weight has the shape \[7\]; expected \[8\], or one number, 1"),
            ({"weight": [1, 8]}, r"weight has the shape \[1, 8\]; expected \[8\]"),
            ({"normalize": 2}, "normalize is 2; expected 0 or 1"),
            ({"epsilon": -1.0}, r"epsilon is -1\.0.*; expected a number of at least 0"),
        ],
        large=(draw(5, 1, 1200, 64), NORMALIZED),
    ),
]
