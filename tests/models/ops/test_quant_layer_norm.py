"""QuantLayerNorm: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against torch in
float64."""

import ctypes

import numpy as np
import pytest
import torch

from calmclip.export.functions import BODIES
from calmclip.models.ops import reference
from calmclip.models.ops.spec import QUANT_LAYER_NORM
from tests.models.ops.harness import BYTE_ISAS, Contract, Edge, kernel, kernels, load, model, near, node, run

# around 8 and 16 lanes, and four times as many
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 79, 127, 128, 130, 512, 768, 1000]
HOW = {"epsilon": 1e-5}


def draw(seed, *shape, columns=False, residual=True, offset=0.0):
    rng = np.random.default_rng(seed)
    width = shape[-1]
    normal = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)  # noqa: E731
    scale = rng.uniform(0.01, 0.05, width if columns else ()).astype(np.float32)
    return {
        "x": normal(*shape) + np.float32(offset),
        "residual": normal(*shape) if residual else np.zeros(1, np.float32),
        "weight": normal(width),
        "bias": normal(width),
        "y_scale": np.asarray(scale, np.float32),
        "y_zero": np.asarray(rng.integers(0, 256, scale.shape), np.uint8),
    }


def exact(feeds, epsilon=1e-5):
    """y before rounding, the normalized rows, the sum: float64."""
    wide = {name: torch.from_numpy(x.astype(np.float64)) for name, x in feeds.items()}
    total = wide["x"] + wide["residual"]
    normed = torch.nn.functional.layer_norm(total, total.shape[-1:], wide["weight"], wide["bias"], epsilon)
    return (normed / wide["y_scale"] + wide["y_zero"]).numpy(), normed.numpy(), total.numpy()


def agree(outputs, expected):
    y, normed, total = outputs
    return (
        near(y, expected[0])
        and np.allclose(normed, expected[1], rtol=1e-5, atol=1e-5)
        and np.allclose(total, expected[2], rtol=1e-6, atol=1e-6)
    )


class Rows(ctypes.Structure):
    """`NormRows` of quant_rows.h."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("x", "residual", "weight", "bias", "inverse", "zero", "y", "normed", "sum")),
        ("rows", ctypes.c_size_t), ("width", ctypes.c_size_t), ("added", ctypes.c_float), ("epsilon", ctypes.c_float),
        ("columns", ctypes.c_bool),
    ]  # fmt: skip


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Rows), ctypes.c_void_p)


def of_rows(function):
    """A kernel as a function of feeds of rank 2; outputs are between guard values."""

    def go(feeds, *, epsilon=1e-5, wants=(True, True)):
        shape = feeds["x"].shape
        size, one_residual = feeds["x"].size, feeds["residual"].size == 1 and feeds["x"].size != 1
        outputs = [np.full(size + 32, 77, dtype) for dtype in (np.uint8, np.float32, np.float32)]
        room = np.full(shape[1] + 16, 77, np.float32)
        inverse = (1 / np.atleast_1d(feeds["y_scale"])).astype(np.float32)
        zero = np.atleast_1d(feeds["y_zero"]).astype(np.int32)
        at = [x.ctypes.data + 16 * x.itemsize for x in outputs]
        rows = Rows(
            x=feeds["x"].ctypes.data, residual=None if one_residual else feeds["residual"].ctypes.data,
            weight=feeds["weight"].ctypes.data, bias=feeds["bias"].ctypes.data, inverse=inverse.ctypes.data,
            zero=zero.ctypes.data, y=at[0], normed=at[1] if wants[0] else None, sum=at[2] if wants[1] else None,
            rows=shape[0], width=shape[1], added=float(feeds["residual"].flat[0]) if one_residual else 0.0,
            epsilon=epsilon, columns=feeds["y_scale"].ndim == 1,
        )  # fmt: skip
        function(ctypes.byref(rows), room.ctypes.data)
        assert (room[shape[1] :] == 77).all()
        for x, wanted in zip(outputs, (True, *wants), strict=True):
            assert (x[:16] == 77).all()
            assert (x[16 + size if wanted else 0 :] == 77).all()
        return [x[16:-16].reshape(shape) for x in outputs]

    return go


@pytest.fixture(params=BYTE_ISAS)
def norm(library, request):
    return of_rows(kernel(library, "quant_layer_norm", request.param, PROTOTYPE))


def test_reference_equals_torch():
    for width in WIDTHS:
        feeds = draw(width, 3, width, columns=width % 2 == 0, offset=5)
        assert agree(reference.quant_layer_norm(**feeds, **HOW), exact(feeds))


def test_kernels_equal_float64(norm):
    for width in WIDTHS:
        for columns in (False, True):
            for residual in (False, True):
                feeds = draw(width, 4, width, columns=columns, residual=residual)
                assert agree(norm(feeds), exact(feeds)), width
    feeds = draw(1, 5, 50) | {"residual": np.full(1, 2.5, np.float32)}  # one number for all
    assert agree(norm(feeds), exact(feeds))


def test_every_instruction_set_gives_the_same_bits(library):
    """Of floats, too: a step more or less of one number would change every later layer of an INT8 tower."""
    norms = [of_rows(function) for function in kernels(library, "quant_layer_norm", PROTOTYPE).values()]
    for width in WIDTHS:
        for residual in (False, True):
            feeds = draw(width, 4, width, columns=residual, residual=residual, offset=1)
            outputs = {b"".join(output.tobytes() for output in norm(feeds)) for norm in norms}
            assert len(outputs) == 1, width


def test_kernels_write_the_requested_outputs_and_the_same_bytes(norm):
    feeds = draw(0, 5, 77)
    y, normed, total = norm(feeds)
    for wants in ((False, False), (True, False), (False, True)):
        outputs = norm(feeds, wants=wants)
        assert (outputs[0] == y).all()
        assert not wants[0] or (outputs[1] == normed).all()
        assert not wants[1] or (outputs[2] == total).all()


def test_a_mean_far_from_0_and_rows_without_variance(norm):
    feeds = draw(2, 3, 768, residual=False, offset=300)
    feeds["x"][1] = 7
    y, _, _ = norm(feeds)
    expected, _, _ = exact(feeds)
    assert near(y, expected, most=0.02)  # float32 holds deviations from 300 to 3e-5, 1e-3 of a step


def test_values_outside_8_bits_are_clipped(norm):
    feeds = draw(3, 2, 40)
    feeds["weight"] *= np.float32(1e30)
    y, normed, _ = norm(feeds)
    assert (y == np.where(normed > 0, 255, 0)).all()


def test_ties_are_rounded_to_even(norm):
    """A row of 1 and -1: normed is bias in float32."""
    feeds = draw(4, 1, 64, residual=False)
    feeds["x"][0], feeds["weight"][:] = np.tile([1, -1], 32), 0
    feeds["bias"], feeds["y_scale"], feeds["y_zero"] = (
        np.arange(-32, 32, dtype=np.float32) / 2,
        np.array(1, np.float32),
        np.array(33, np.uint8),
    )
    assert norm(feeds)[0][0].tolist() == (np.rint(np.arange(-32, 32) / 2) + 33).tolist()


@pytest.mark.parametrize("shape", [(17,), (5, 17), (2, 50, 96), (2, 3, 4, 5), (1, 1200, 64)])
def test_op_and_function_equal_float64(library, shape):
    for columns in (False, True):
        for residual in (False, True):
            feeds = draw(5, *shape, columns=columns, residual=residual)
            for ops in (library, None):
                assert agree(run(QUANT_LAYER_NORM, feeds, HOW, library=ops), exact(feeds))


def test_op_and_function_give_the_outputs_that_a_node_names(library):
    """A node names all three, "" for an unused one, because ONNX Runtime requires it for a function."""
    feeds = draw(6, 2, 3, 20)
    everything = dict(zip(QUANT_LAYER_NORM.outputs, exact(feeds), strict=True))
    body = BODIES[QUANT_LAYER_NORM.name]()
    inputs = {name: (x.dtype, ["B", "T", 20] if x.ndim == 3 else x.shape) for name, x in feeds.items()}
    for names in (["y", "", ""], ["y", "", "sum"], ["y", "normed", ""], ["y", "normed", "sum"]):
        outputs = {name: (QUANT_LAYER_NORM.outputs[name].dtype, None) for name in names if name}
        proto = model([node(QUANT_LAYER_NORM, feeds, names, **HOW)], inputs, outputs, functions=[body])
        for ops in (library, None):
            session = load(proto, ops)
            assert [output.shape for output in session.get_outputs()] == [["B", "T", 20]] * len(outputs)
            answer = dict(zip(outputs, session.run(None, feeds), strict=True))
            assert near(answer.pop("y"), everything["y"])
            for name, x in answer.items():
                assert np.allclose(x, everything[name], atol=1e-5)


def normalize_at_edge(function, edge: Edge, rows: int, width: int) -> None:
    feeds = draw(0, rows, width, columns=True)
    ends = {name: edge.lay(feeds[name]) for name in ("x", "residual", "weight", "bias")}
    room = edge.lay(np.zeros(width, np.float32))
    ends |= {name: edge.lay(np.zeros((rows, width), np.float32)) for name in ("normed", "sum")}
    ends |= {"inverse": edge.lay(feeds["y_scale"]), "zero": edge.lay(feeds["y_zero"].astype(np.int32))}
    ends |= {"y": edge.lay(np.zeros((rows, width), np.uint8))}
    function(ctypes.byref(Rows(rows=rows, width=width, epsilon=1e-5, columns=True, **ends)), room)


EDGES = [("quant_layer_norm", PROTOTYPE, normalize_at_edge, [(2, width) for width in WIDTHS])]
CONTRACTS = [
    Contract(
        QUANT_LAYER_NORM,
        lambda seed, columns: draw(seed, 2, 8, columns=columns),
        attributes=HOW,
        refused=[
            ({"x": []}, r"x has the shape \[\]; expected \[..., columns\], at least one"),
            ({"x": [2, 0]}, r"x has the shape \[2, 0\]; expected"),
            ({"residual": [1, 8]}, r"residual has the shape \[1, 8\]; expected that of x, \[2, 8\], or \[1\]"),
            ({"residual": [2]}, r"residual has the shape \[2\]"),
            ({"weight": [7]}, r"weight has the shape \[7\]; expected \[8\]"),
            ({"bias": [1, 8]}, r"bias has the shape \[1, 8\]; expected \[8\]"),
            ({"y_scale": [7]}, r"y_scale has the shape \[7\]; expected one number, or \[8\]"),
            ({"y_zero": [9]}, r"y_zero has the shape \[9\]; expected one number, or \[8\]"),
            ({"epsilon": -1.0}, r"epsilon is -1\.0.*; expected a number of at least 0"),
        ],
        large=(draw(5, 1, 1200, 64, columns=True), HOW),
        any_side=("x", "residual"),
        empty=[(draw(0, 2, 0, 8), HOW, (2, 0, 8))],
    ),
]
