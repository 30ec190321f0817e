"""Graphs with weights of others. Oracle: the same graph with the weights that the quantized one stores, in numpy."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calmclip.export import borrow, parity
from calmclip.export.quantizers import QUANTIZERS
from calmclip.models.flow import Array

R = np.random.default_rng(0)
W, TABLE = R.standard_normal((64, 48)).astype(np.float32), R.standard_normal((20_000, 64)).astype(np.float32)
IDS, WIDE = np.array([[1, 2, 19_999]]), np.geomspace(0.1, 10, 64).astype(np.float32)


def graph(body: str, result: str, **constants: Array) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (int64[B, T] ids) => (float[B, T, {result}] y) {{ {body} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for node in model.graph.node:
        node.name = f"{node.op_type}.{node.output[0]}"
    return model


@pytest.fixture
def floats() -> onnx.ModelProto:
    return graph("e = Gather (t, ids) x = Mul (e, wide) y = MatMul (x, w)", "48", t=TABLE, w=W, wide=WIDE)


@pytest.fixture
def both() -> onnx.ModelProto:
    """The same, and back by the transpose."""
    body = "e = Gather (table, ids) x = Mul (e, wide) h = MatMul (x, u) y = MatMul (h, v)"
    return graph(body, "64", table=TABLE, u=W, v=np.ascontiguousarray(W.T), wide=WIDE)


def arrays(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_a_transpose_is_computed_from_the_matrix_that_is_read_first(both: onnx.ModelProto):
    less = borrow.untransposed(both)
    assert {name for name, array in arrays(less).items() if array.ndim == 2} == {"table", "u"}
    feeds = {"ids": IDS}
    assert np.array_equal(parity.onnx_run(less)(feeds)["y"], parity.onnx_run(both)(feeds)["y"])


@pytest.mark.parametrize("name", ["smooth", "static", "none"])
def test_weights_are_those_that_the_quantized_graph_stores(name: str, floats: onnx.ModelProto, both: onnx.ModelProto):
    """`smooth` scales the rows of the weight, which the borrower undoes."""
    quantizer = QUANTIZERS.get(name)
    params = quantizer.params()
    ranges = quantizer.observe(floats, [{"ids": IDS}], params) if quantizer.observe else {}
    lender = quantizer.quantize(floats, ranges, params)
    borrower = borrow.stored(borrow.untransposed(both), floats, lender)
    held, lent = arrays(borrower), arrays(lender)
    large = {key for key, array in held.items() if array.nbytes >= 4096 and array.shape[-1] > 1}
    assert all(any(np.array_equal(held[key], array) for array in lent.values()) for key in large)  # stored once
    if name == "none":
        weight, table = W, TABLE
    else:
        assert all(held[key].dtype == np.int8 for key in large)
        (dequantized,) = [node for node in lender.graph.node if node.output[0].endswith("_weight_int8_back")] or [
            node for node in lender.graph.node if node.output[0] == "w_int8_back"
        ]
        weight = lent[dequantized.input[0]] * lent[dequantized.input[1]]
        weight = weight * lent["x_gain"][:, None] if name == "smooth" else weight
        table = lent["t_int8"] * lent["t_scale"]
    x = (table[IDS] * WIDE).astype(np.float64)
    answer = parity.onnx_run(borrower)({"ids": IDS})["y"]
    assert answer == pytest.approx(x @ weight @ weight.T.astype(np.float64), rel=1e-4, abs=1e-3)
    truth = (TABLE[IDS] * WIDE).astype(np.float64) @ W @ W.T
    assert np.corrcoef(answer.ravel(), truth.ravel())[0, 1] > 0.99
