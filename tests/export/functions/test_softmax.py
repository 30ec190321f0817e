"""Softmax as a local function in a plain ONNX Runtime: against the reference, torch, and the library."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from calmclip.export.functions.softmax import OPSET, softmax
from calmclip.models.ops import reference
from calmclip.models.ops.spec import DOMAIN, SOFTMAX, VERSION

LOWEST = np.finfo(np.float32).min
SETTINGS = [{}, {"gamma": -0.03}, {"gamma": -0.1, "zeta": 1.1}, {"zeta": 1.03}]


def model(shape=None, **attributes):
    node = helper.make_node(SOFTMAX.name, ["x"], ["y"], domain=DOMAIN, **attributes)
    declare = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    graph = helper.make_graph([node], "alone", [declare("x")], [declare("y")])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    proto = helper.make_model(graph, functions=[softmax()], opset_imports=opsets, ir_version=10)
    if shape is not None:  # the checker asks for one
        onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def session(content, library=None, optimised=None):
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library.path))
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def rows(seed, shape):
    """Values with both kinds of masks, and a fully masked row along each axis."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 4, shape).astype(np.float32)
    x[rng.random(shape) < 0.2] = -np.inf
    x[rng.random(shape) < 0.1] = LOWEST
    x[0], x[:, 1], x[..., 2] = -np.inf, LOWEST, -np.inf
    return x


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("shape", [(3, 4), (4, 5, 6), (2, 3, 50, 50), (2, 64, 77)])
def test_equals_the_reference(shape, how):
    x = rows(0, shape)
    for axis in range(-len(shape), len(shape)):
        y = session(model(shape, axis=axis, **how)).run(None, {"x": x})[0]
        assert np.abs(y - reference.softmax(x, axis, **how)).max() <= 1e-6


def test_equals_torch():
    x = np.random.default_rng(1).normal(0, 4, (12, 50, 50)).astype(np.float32)
    for axis in range(3):
        expected = torch.softmax(torch.from_numpy(x).double(), axis).numpy()
        assert np.allclose(session(model(axis=axis)).run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("how", SETTINGS)
def test_a_bad_value_makes_only_its_row_nan(how):
    """Max and Clip of some runtimes drop NaN; vector code and the end of a row may differ."""
    opened = session(model(**how))
    for cols in range(1, 70):
        x = np.random.default_rng(cols).normal(0, 3, (cols + 1, cols)).astype(np.float32)
        for bad in (np.nan, np.inf):
            x[np.arange(cols), np.arange(cols)] = bad
            y = opened.run(None, {"x": x})[0]
            assert np.isnan(y[:cols]).all()
            assert np.isfinite(y[cols]).all()


def test_large_values():
    x = np.array([[1e30, -1e30, LOWEST, -LOWEST], [1e30] * 4, [-np.inf, LOWEST, -1e38, -1e38]], np.float32)
    assert session(model()).run(None, {"x": x})[0].tolist() == [[0, 0, 0, 1], [0.25] * 4, [0, 0, 0.5, 0.5]]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_empty(shape):
    assert session(model(axis=0)).run(None, {"x": np.empty(shape, np.float32)})[0].shape == shape


LENGTH = ["Shape", "Gather", "Greater", "Clip", "If"]
IN_FLOAT64 = ["Clip", "Softmax", "Cast", "ReduceSum", "Cast", "Div"]
CLIPPED = ["Mul", "Add", "Clip"]


@pytest.mark.parametrize(
    ("shape", "how", "op_types"),
    [
        ([3, 1024], {}, ["Clip", "Softmax"]),
        ([3, 1024], SETTINGS[1], ["Clip", "Softmax", *CLIPPED]),
        ([3, 1025], {}, IN_FLOAT64),
        ([1025, 3], {"axis": 0}, IN_FLOAT64),
        (["a", "b"], {}, LENGTH),
        (["a", "b"], SETTINGS[1], [*LENGTH, *CLIPPED]),
    ],
)
def test_op_types_after_optimization(tmp_path, shape, how, op_types):
    """ONNX Runtime removes each If whose condition it knows. For short rows only the Clip of -inf stays."""
    session(model(shape, **how), optimised=tmp_path / "left.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "left.onnx").graph.node] == op_types


def long_row(kind, columns):
    """``uneven``: equal terms beside a larger one, all of whose partial sums round the same way in float32."""
    if kind == "uneven":
        x = np.full((1, columns), -0.36, np.float32)
        x[0, columns // 2] = 0
        return x
    return np.random.default_rng(11).normal(0, 3, (1, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "uneven"])
@pytest.mark.parametrize("columns", [1024, 1025, 65_537, 1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_the_error_does_not_grow_with_the_row(columns, kind):
    """ONNX Runtime's Softmax alone is off by 7e-5 (normal) and 2e-4 (uneven) at a million columns, 1e-3 and
    4e-3 at ten million."""
    x = long_row(kind, columns)
    expected = reference.softmax(x)  # float64
    opened = session(model())
    assert np.abs(opened.run(None, {"x": x})[0] / expected - 1).max() <= 2e-6
    if columns == 65_537:
        across = session(model(axis=1)).run(None, {"x": x.reshape(1, -1, 1)})[0]
        assert np.abs(across.reshape(1, -1) / expected - 1).max() <= 2e-6
        x[0, 7], x[0, 9] = -np.inf, np.nan
        assert np.isnan(opened.run(None, {"x": x})[0]).all()
        masked = opened.run(None, {"x": np.full_like(x, -np.inf)})[0]
        assert np.abs(masked * columns - 1).max() <= 1e-6


@pytest.mark.parametrize("how", SETTINGS)
def test_the_library_gives_the_same_on_the_same_file(library, how, tmp_path):
    content = model(**how)
    plain, fast = session(content), session(content, library, tmp_path / "fast.onnx")
    assert [(n.op_type, n.domain) for n in onnx.load(tmp_path / "fast.onnx").graph.node] == [(SOFTMAX.name, DOMAIN)]
    for shape in ((1, 1), (600, 50), (64, 77), (100, 197), (40, 577), (2, 5000), (3, 0)):
        x = rows(2, shape) if min(shape) > 2 else np.random.default_rng(3).normal(0, 3, shape).astype(np.float32)
        if x.size > 1:
            x[-1, 0] = np.nan
        ours, theirs = (s.run(None, {"x": x})[0] for s in (fast, plain))
        assert (np.isnan(ours) == np.isnan(theirs)).all()
        assert np.allclose(ours, theirs, rtol=0, atol=1e-6, equal_nan=True)
