"""The oracle is a count of multiply-accumulates by hand, and ONNX Runtime's optimized graph."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calmclip.export.coverage import count, coverage
from calmclip.export.quantizers import QUANTIZERS
from calmclip.models.errors import ExportError
from tests.export.graphs import normal, parse


def test_each_kind_of_product_is_counted():
    model = parse(
        """g (float[B, 4, 10, 10] x, float[B, T, 8] q) => (float[B, 6, 4, 4] c, float[B, T, T] s, float[T, 5] g)
        {
            c = Conv <group = 2, strides = [2, 2], kernel_shape = [3, 3]> (x, w)
            k = Transpose <perm = [0, 2, 1]> (q)
            s = MatMul (q, k)
            first = Constant <value_ints = [-1, 8]> ()
            rows = Reshape (q, first)
            g = Gemm <transB = 1> (rows, m, b)
        }""",
        w=normal(6, 2, 3, 3), m=normal(5, 8), b=normal(5),
    )  # fmt: skip
    for batch in (1, 2):
        assert {product.name: product.macs for product in count(model, {"B": batch, "T": 7})} == {
            "Conv.c": batch * 6 * 4 * 4 * 2 * 3 * 3,  # numbers written x inputs of a group x kernel
            "MatMul.s": batch * 7 * 7 * 8,
            "Gemm.g": batch * 7 * 5 * 8,
        }


def test_shapes_that_the_graph_computes_are_followed():
    """Hugging Face's graphs cut the positions to the length of the text."""
    model = parse(
        """g (int64[B, T] ids) => (float[1, T, 3] y)
        {
            length = Shape <start = 1> (ids)
            zero = Constant <value_ints = [0]> ()
            one = Constant <value_ints = [1]> ()
            cut = Slice (places, zero, length, one)
            rows = Gather (table, cut)
            y = MatMul (rows, w)
        }""",
        places=np.arange(77)[None], table=normal(77, 16), w=normal(16, 3),
    )  # fmt: skip
    (product,) = count(model, {"B": 1, "T": 11})
    assert product.macs == 11 * 16 * 3


def test_all_rows_count_if_data_select_them():
    """The tokens of an expert: no shape gives their number."""
    model = parse(
        """g (float[N, 8] x, float[N] chance) => (float[n, 5] y)
        {
            places = NonZero (chance)
            zero = Constant <value_int = 0> ()
            selected = Gather (places, zero)
            rows = Gather (x, selected)
            y = Gemm (rows, w)
        }""",
        w=normal(8, 5),
    )  # fmt: skip
    assert [product.macs for product in count(model, {"N": 6})] == [6 * 8 * 5]


def test_the_coverage_is_weighted_by_multiply_accumulates():
    model = parse(
        """g (float[B, 8] x) => (float[B, 100] y)
        {
            a = MatMul (x, w)
            y = MatMul (a, v)
        }""",
        w=normal(8, 20), v=normal(20, 100),
    )  # fmt: skip
    static = QUANTIZERS.get("static")
    for keep, part in (((), 1.0), (("MatMul.a",), 2000 / 2160), (("MatMul.y",), 160 / 2160)):
        params = static.params(keep=keep)
        ranges = static.observe(model, [{"x": normal(1, 8)}], params)
        measured = coverage(count(static.quantize(model, ranges, params), {"B": 1}))
        assert (measured.macs, measured.part) == (2160, pytest.approx(part))
    assert coverage(count(model, {"B": 1})).part == 0.0


def test_a_dynamic_product_counts_as_int8():
    model = parse("g (float[B, 8] x) => (float[B, 20] y) { y = MatMul (x, w) }", w=normal(8, 20))
    dynamic = QUANTIZERS.get("dynamic")
    assert coverage(count(dynamic.quantize(model, {}, dynamic.params()), {"B": 1})).part == 1.0


def test_weights_that_are_only_stored_in_int8_do_not_count():
    """A product of a float activation and dequantized weights multiplies floats."""
    model = parse(
        """g (float[B, 8] x) => (float[B, 20] y)
        {
            w = DequantizeLinear <axis = 1> (integers, step)
            y = MatMul (x, w)
        }""",
        integers=np.ones((8, 20), np.int8), step=np.ones(20, np.float32),
    )  # fmt: skip
    assert coverage(count(model, {"B": 1})).int8 == 0


def test_a_convolution_that_writes_float_runs_in_float():
    text = """g (float[B, 2, 4, 4] x) => (float[B, 3, 4, 4] y)
        {{
            q = QuantizeLinear (x, one, zero)
            d = DequantizeLinear (q, one, zero)
            w = DequantizeLinear (integers, one)
            {}
        }}"""
    constants = {"integers": np.ones((3, 2, 1, 1), np.int8), "one": np.float32(1), "zero": np.uint8(0)}
    plain = parse(text.format("y = Conv (d, w)"), **constants)
    through = "c = Conv (d, w) r = QuantizeLinear (c, one, zero) y = DequantizeLinear (r, one, zero)"
    assert coverage(count(plain, {"B": 1})).part == 0.0
    assert coverage(count(parse(text.format(through), **constants), {"B": 1})).part == 1.0


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("read_in_float", [False, True])
def test_int8_products_are_those_of_the_optimized_graph(op: str, read_in_float: bool, tmp_path: Path):
    """If a float node also reads the first of two products, ONNX Runtime computes that product in float."""
    more = ("z = Exp (h)", ", float[N, 8] z") if read_in_float else ("", "")
    model = parse(
        f"g (float[N, 8] x) => (float[N, 8] y{more[1]}) {{ h = {op} (x, a)  y = {op} (h, b)  {more[0]} }}",
        a=normal(8, 8), b=normal(8, 8),
    )  # fmt: skip
    quantizer, feeds = QUANTIZERS.get("static"), [{"x": normal(4, 8)}]
    quantized = quantizer.quantize(model, quantizer.observe(model, feeds, quantizer.params()), quantizer.params())
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(quantized.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count(op) == read_in_float
    assert [product.int8 for product in count(quantized, {})] == [not read_in_float, True]


def test_an_unknown_shape_is_an_error_that_names_the_product():
    model = parse("g (float[4] x) => (float[3] y) { kinds = Unique (x) y = MatMul (kinds, w) }", w=normal(4, 3))
    with pytest.raises(ExportError, match=r"shape of 'kinds' cannot be inferred.*node 'MatMul\.y'"):
        count(model, {})
