"""What operators say of shapes before a graph runs, where sides are known to nobody and have no name."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from calmclip.models.ops.spec import DOMAIN, VERSION
from tests.models.ops.test_quant_linear import feeds, load

LINEAR = {name: array for name, array in feeds(0, [4, 8], 8, False).items() if name != "x"}
ONE = {"one": np.float32(0.05), "middle": np.uint8(128)}
DEPTHWISE = {
    "w": np.ones((1, 3, 8), np.int8), "s": np.float32(0.01), "h": np.zeros(8, np.float32), "t": np.float32(0.05),
    "p": np.uint8(128),
}  # fmt: skip
# node of ours, its inputs (r: float of no known side, b: the same in bytes), its attributes and its constants
NODES = {
    "Softmax": (["r"], {"axis": -1, "gamma": 0.0, "zeta": 1.0}, {}),
    "QuantLinear": (["b", *LINEAR], {"activation": 0}, LINEAR),
    "QuantLinearToFloat": (
        ["b", *list(LINEAR)[:5], "no"], {"activation": 0}, LINEAR | {"no": np.zeros(1, np.float32)},
    ),
    "QuantLayerNorm": (
        ["r", "r", "w", "w", "one", "middle"], {"epsilon": 1e-5}, ONE | {"w": np.ones(8, np.float32)},
    ),
    "QuantDepthwise": (
        ["b", "one", "middle", *list(DEPTHWISE)], {"strides": (1, 1), "pads": (0, 1, 0, 1), "group": 8}, DEPTHWISE,
    ),
    "QuantAdd": (["b", "one", "middle", "b", "one", "middle", "one", "middle"], {}, {}),
    "QuantLookup": (["b", "all"], {}, {"all": np.arange(255, -1, -1).astype(np.uint8)}),
}  # fmt: skip


@pytest.mark.parametrize("op", NODES)
def test_a_side_without_a_name_fits_any_other(library, op):
    """x is given a shape that is fed. What is added to our answer knows its sides, which -1 would not fit."""
    inputs, attributes, constants = NODES[op]
    to_float = op in ("Softmax", "QuantLinearToFloat")
    sides = [1, 2, 2, 8] if op == "QuantDepthwise" else [4, 8]
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "one", "middle"], ["b"]),
        helper.make_node(op, inputs, ["y"], domain=DOMAIN, **attributes),
        helper.make_node("Cast", ["y"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "table"], ["z"]),
    ]
    given = [
        ("x", TensorProto.FLOAT, [32]),
        ("shape", TensorProto.INT64, [len(sides)]),
        ("table", TensorProto.FLOAT, sides),
    ]
    declared = [helper.make_tensor_value_info(*one) for one in given]
    outputs = [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("y", TensorProto.FLOAT if to_float else TensorProto.UINT8, None),
    ]
    held = [
        helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.ravel())
        for name, array in (ONE | constants).items()
    ]
    graph = helper.make_graph(nodes, "g", declared, outputs, held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    session: ort.InferenceSession = load(library, helper.make_model(graph, opset_imports=opsets, ir_version=10))
    random = np.random.default_rng(0)
    x, table = random.normal(size=32).astype(np.float32), random.normal(size=sides).astype(np.float32)
    z, y = session.run(None, {"x": x, "shape": np.array(sides), "table": table})
    assert y.shape == tuple(sides)
    assert (z == y.astype(np.float32) + table).all()
