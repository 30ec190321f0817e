import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from calmclip.export.graph import Draft
from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import dynamic, static
from calmclip.export.quantizers.packing import pack
from calmclip.models.flow import Array
from tests.export.graphs import normal, parse


@pytest.fixture
def convolutions() -> onnx.ModelProto:
    """Two 1x1 convolutions with a ReLU6 between them."""
    return parse(
        """g (float[B, 3, 6, 6] x) => (float[B, 5, 6, 6] y) <float zero = {0}, float six = {6}>
        {
            c1 = Conv (x, w1, b1)
            r1 = Clip (c1, zero, six)
            y = Conv (r1, w2, b2)
        }""",
        {"w1": (4, 3, 1, 1), "b1": (4,), "w2": (5, 4, 1, 1), "b2": (5,)},
    )


def fake(values: Array, low: float, high: float) -> Array:
    """float64: to 8 bits over [low, high] and back."""
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale


def test_two_convolutions_equal_integers_computed_by_hand(convolutions: onnx.ModelProto):
    x = np.random.default_rng(1).normal(size=(1, 3, 6, 6)).astype(np.float32)
    ranges = static.observe(convolutions, [{"x": x}], static.Params())
    outputs = onnx_run(static.quantize(convolutions, ranges, static.Params()))({"x": x})["y"]

    w = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in convolutions.graph.initializer}
    for name in ("w1", "w2"):
        step = np.abs(w[name]).max(axis=1, keepdims=True) / 127  # one scale for each output channel
        w[name] = np.rint(w[name] / step) * step

    def conv(values: Array, weight: Array, bias: Array) -> Array:
        return np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], values) + bias[None, :, None, None]

    inner = fake(np.clip(conv(fake(x, *ranges["x"]), w["w1"], w["b1"]), 0, 6), *ranges["r1"])
    expected = fake(conv(inner, w["w2"], w["b2"]), *ranges["y"])
    step = (ranges["y"][1] - ranges["y"][0]) / 255
    assert np.abs(outputs - expected).max() <= 1.01 * step  # one step: a tie may round the other way
    assert np.mean(np.abs(outputs - expected) < 0.01 * step) > 0.95


def test_percentiles_lie_inside_the_extremes(convolutions: onnx.ModelProto):
    feeds = [{"x": np.random.default_rng(i).normal(size=(1, 3, 6, 6)).astype(np.float32)} for i in range(4)]
    extremes = static.observe(convolutions, feeds, static.Params())
    cut = static.observe(convolutions, feeds, static.Params(percentile=95))
    expected = np.mean([np.percentile(feed["x"], (5, 95)) for feed in feeds], axis=0)
    assert np.allclose(cut["x"], expected)
    assert all(extremes[name][0] <= cut[name][0] and cut[name][1] <= extremes[name][1] for name in extremes)


def test_a_relu_between_convolutions_vanishes(convolutions: onnx.ModelProto):
    x = np.ones((1, 3, 6, 6), np.float32)
    ranges = static.observe(convolutions, [{"x": x}], static.Params())
    kinds = [n.op_type for n in static.quantize(convolutions, ranges, static.Params()).graph.node]
    assert "Clip" not in kinds
    assert kinds.count("QuantizeLinear") == 3  # x, r1, y


def test_a_node_that_stays_in_float_reads_its_float_weights(convolutions: onnx.ModelProto):
    x = np.random.default_rng(1).normal(size=(1, 3, 6, 6)).astype(np.float32)
    params = static.Params(keep=("Conv.c1",))
    quantized = static.quantize(convolutions, static.observe(convolutions, [{"x": x}], params), params)
    fixed = {i.name: i.data_type for i in quantized.graph.initializer}
    first, second = [n for n in quantized.graph.node if n.op_type == "Conv"]
    assert first.input[0] == "x"
    assert fixed[first.input[1]] == TensorProto.FLOAT
    assert second.input[1] not in fixed  # dequantized


def test_int8_weights_do_not_depend_on_the_ranges(convolutions: onnx.ModelProto):
    """Graphs with the same layers share their bytes, although their calibration inputs differ."""
    weights = []
    for size in (1, 7):
        ranges = static.observe(convolutions, [{"x": np.full((1, 3, 6, 6), size, np.float32)}], static.Params())
        quantized = static.quantize(convolutions, ranges, static.Params())
        weights.append(
            {i.name: i.raw_data for i in quantized.graph.initializer if i.data_type == TensorProto.INT8 and i.dims}
        )
    assert weights[0] == weights[1]


def test_tables_are_stored_in_int8_and_read_within_half_a_step():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2048, 512)).astype(np.float32) * rng.uniform(0.01, 10, (2048, 1)).astype(np.float32)
    draft = Draft(parse("g (int64[B] ids) => (float[B, 512] rows) { rows = Gather (table, ids) }", table=table))
    pack(draft)
    packed = draft.finish()
    onnx.checker.check_model(packed, full_check=True)
    ids = np.array([0, 5, 2047])
    rows = onnx_run(packed)({"ids": ids})["rows"]
    half = np.abs(table[ids]).max(axis=1, keepdims=True) / 127 / 2
    assert (np.abs(rows - table[ids]) <= 1.001 * half).all()
    assert len(packed.SerializeToString()) < table.nbytes / 3.9


def test_small_probabilities_are_not_rounded_to_zero():
    """Each of 1000 equal probabilities is below 1/255, but the product with them is the mean of the rows."""
    rows, x = normal(1000, 16), np.zeros((1, 1000), np.float32)
    model = parse("g (float[B, 1000] x) => (float[B, 16] y) { p = Softmax (x) y = MatMul (p, rows) }", rows=rows)
    quantized = static.quantize(model, static.observe(model, [{"x": x}], static.Params()), static.Params())
    assert np.allclose(onnx_run(quantized)({"x": x})["y"], rows.mean(0, keepdims=True), atol=0.003)
    assert len(quantized.SerializeToString()) < rows.nbytes / 3


def test_a_dynamic_product_may_read_rows_of_a_packed_table():
    """The names of their scales differ."""
    table, w = normal(1 << 17, 8), normal(8, 3, seed=1)
    text = "g (int64[B] ids) => (float[B, 3] y) { e = Gather (table, ids) y = MatMul (e, w) }"
    quantized = dynamic.quantize(parse(text, table=table, w=w), {}, dynamic.Params())
    onnx.checker.check_model(quantized)
    picked = np.array([5, 77777])
    expected = table[picked] @ w
    assert np.abs(onnx_run(quantized)({"ids": picked})["y"] - expected).max() < 0.03 * np.abs(expected).max()
