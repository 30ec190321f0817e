"""Multiply-accumulates, by hand."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from calmclip.export.quantizers import QUANTIZERS
from calmclip.export.share import count, share
from calmclip.models.errors import ExportError


def model_of(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return model


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_each_kind_of_product_by_hand():
    model = model_of(
        """g (float[B, 4, 10, 10] x, float[B, T, 8] q) => (float[B, 6, 4, 4] c, float[B, T, T] s, float[T, 5] g)
        {
            c = Conv <group = 2, strides = [2, 2], kernel_shape = [3, 3]> (x, w)
            k = Transpose <perm = [0, 2, 1]> (q)
            s = MatMul (q, k)
            first = Constant <value_ints = [-1, 8]> ()
            rows = Reshape (q, first)
            g = Gemm <transB = 1> (rows, m, b)
        }""",
        w=drawn(6, 2, 3, 3), m=drawn(5, 8), b=drawn(5),
    )  # fmt: skip
    found = {one.name: one.macs for one in count(model, {"B": 1, "T": 7})}
    assert found == {
        "Conv_0": 6 * 4 * 4 * 2 * 3 * 3,  # numbers written x inputs of a group x kernel
        "MatMul_2": 7 * 7 * 8,
        "Gemm_5": 7 * 5 * 8,
    }
    twice = {one.name: one.macs for one in count(model, {"B": 2, "T": 7})}
    assert twice == {name: 2 * macs for name, macs in found.items()}


def test_shapes_that_are_worked_out_in_the_graph_are_followed():
    """Positions cut to the length of the text, as Hugging Face writes them."""
    model = model_of(
        """g (int64[B, T] ids) => (float[1, T, 3] y)
        {
            length = Shape <start = 1> (ids)
            zero = Constant <value_ints = [0]> ()
            one = Constant <value_ints = [1]> ()
            cut = Slice (places, zero, length, one)
            rows = Gather (table, cut)
            y = MatMul (rows, w)
        }""",
        places=np.arange(77)[None], table=drawn(77, 16), w=drawn(16, 3),
    )  # fmt: skip
    (product,) = count(model, {"B": 1, "T": 11})
    assert product.macs == 11 * 16 * 3


def test_of_rows_that_data_choose_all_count():
    """Tokens routed to an expert: which ones, and how many, no shape says."""
    model = model_of(
        """g (float[N, 8] x, float[N] chance) => (float[n, 5] y)
        {
            places = NonZero (chance)
            zero = Constant <value_int = 0> ()
            own = Gather (places, zero)
            rows = Gather (x, own)
            y = Gemm (rows, w)
        }""",
        w=drawn(8, 5),
    )  # fmt: skip
    assert [one.macs for one in count(model, {"N": 6})] == [6 * 8 * 5]


def test_the_share_is_weighted_by_multiply_accumulates():
    model = model_of(
        """g (float[B, 8] x) => (float[B, 100] y)
        {
            a = MatMul (x, w)
            y = MatMul (a, v)
        }""",
        w=drawn(8, 20), v=drawn(20, 100),
    )  # fmt: skip
    static = QUANTIZERS.get("static")
    for keep, part in (((), 1.0), (("MatMul_0",), 2000 / 2160), (("MatMul_1",), 160 / 2160)):
        params = static.params(keep=keep)
        ranges = static.observe(model, [{"x": drawn(1, 8)}], params)
        found = share(count(static.quantize(model, ranges, params), {"B": 1}))
        assert (found.macs, found.part) == (2160, pytest.approx(part))
    assert share(count(model, {"B": 1})).part == 0.0


def test_a_dynamic_product_counts_as_int8():
    model = model_of("g (float[B, 8] x) => (float[B, 20] y) { y = MatMul (x, w) }", w=drawn(8, 20))
    dynamic = QUANTIZERS.get("dynamic")
    assert share(count(dynamic.quantize(model, {}, dynamic.params()), {"B": 1})).part == 1.0


def test_weights_that_are_only_stored_in_int8_do_not_count():
    """Dequantized into a product with a float activation, the runtime multiplies floats."""
    model = model_of(
        """g (float[B, 8] x) => (float[B, 20] y)
        {
            w = DequantizeLinear <axis = 1> (whole, step)
            y = MatMul (x, w)
        }""",
        whole=np.ones((8, 20), np.int8), step=np.ones(20, np.float32),
    )  # fmt: skip
    assert share(count(model, {"B": 1})).int8 == 0


def test_a_convolution_that_writes_float_runs_in_float():
    text = """g (float[B, 2, 4, 4] x) => (float[B, 3, 4, 4] y)
        {{
            q = QuantizeLinear (x, one, zero)
            d = DequantizeLinear (q, one, zero)
            w = DequantizeLinear (whole, one)
            {}
        }}"""
    constants = {"whole": np.ones((3, 2, 1, 1), np.int8), "one": np.float32(1), "zero": np.uint8(0)}
    plain = model_of(text.format("y = Conv (d, w)"), **constants)
    through = "c = Conv (d, w) r = QuantizeLinear (c, one, zero) y = DequantizeLinear (r, one, zero)"
    assert share(count(plain, {"B": 1})).part == 0.0
    assert share(count(model_of(text.format(through), **constants), {"B": 1})).part == 1.0


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("read_in_float", [False, True])
def test_what_runs_in_int8_the_runtime_says(op: str, read_in_float: bool, tmp_path: Path):
    """Of two products in a row the first may also be read in float: ONNX Runtime then computes it in float."""
    more = ("z = Exp (h)", ", float[N, 8] z") if read_in_float else ("", "")
    model = model_of(
        f"g (float[N, 8] x) => (float[N, 8] y{more[1]}) {{ h = {op} (x, a)  y = {op} (h, b)  {more[0]} }}",
        a=drawn(8, 8), b=drawn(8, 8),
    )  # fmt: skip
    quantizer, feeds = QUANTIZERS.get("static"), [{"x": drawn(4, 8)}]
    small = quantizer.quantize(model, quantizer.observe(model, feeds, quantizer.params()), quantizer.params())
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(small.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count(op) == read_in_float
    assert [one.int8 for one in count(small, {})] == [not read_in_float, True]


def test_a_shape_nobody_knows_is_an_error_that_names_the_product():
    nodes = [
        helper.make_node("Unique", ["x"], ["kinds"], "Unique_0"),
        helper.make_node("MatMul", ["kinds", "w"], ["y"], "MatMul_0"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None if name == "y" else [4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(drawn(4, 3), "w")])
    with pytest.raises(ExportError, match=r"shape of 'kinds' cannot be inferred.*node 'MatMul_0'"):
        count(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), {})
