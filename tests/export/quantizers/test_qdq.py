import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import _qdq, dynamic, static
from calmclip.models.flow import Array

Value = helper.make_tensor_value_info


def model_of(nodes: list[onnx.NodeProto], inputs: list, outputs: list, constants: dict[str, Array]) -> onnx.ModelProto:
    made = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def convolutions() -> onnx.ModelProto:
    """Two 1x1 convolutions with a ReLU6 between them."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "Conv.c1"),
        helper.make_node("Clip", ["c1", "zero", "six"], ["r1"], "Clip.r1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["y"], "Conv.y"),
    ]
    constants = {
        "w1": rng.normal(size=(4, 3, 1, 1)).astype(np.float32),
        "b1": rng.normal(size=4).astype(np.float32),
        "w2": rng.normal(size=(5, 4, 1, 1)).astype(np.float32),
        "b2": rng.normal(size=5).astype(np.float32),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    x, y = Value("x", TensorProto.FLOAT, ["B", 3, 6, 6]), Value("y", TensorProto.FLOAT, ["B", 5, 6, 6])
    return model_of(nodes, [x], [y], constants)


def fake(values: Array, low: float, high: float) -> Array:
    """float64: to 8 bits over [low, high] and back."""
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale


def test_two_convolutions_are_the_integers_worked_out_by_hand(convolutions: onnx.ModelProto):
    x = np.random.default_rng(1).normal(size=(1, 3, 6, 6)).astype(np.float32)
    ranges = static.observe(convolutions, [{"x": x}], static.Params())
    found = onnx_run(static.quantize(convolutions, ranges, static.Params()))({"x": x})["y"]

    w = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in convolutions.graph.initializer}
    for name in ("w1", "w2"):
        step = np.abs(w[name]).max(axis=1, keepdims=True) / 127  # one scale for each output channel
        w[name] = np.rint(w[name] / step) * step

    def conv(values: Array, weight: Array, bias: Array) -> Array:
        return np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], values) + bias[None, :, None, None]

    inner = fake(np.clip(conv(fake(x, *ranges["x"]), w["w1"], w["b1"]), 0, 6), *ranges["r1"])
    expected = fake(conv(inner, w["w2"], w["b2"]), *ranges["y"])
    step = (ranges["y"][1] - ranges["y"][0]) / 255
    assert np.abs(found - expected).max() <= 1.01 * step  # one step: a tie may round the other way
    assert np.mean(np.abs(found - expected) < 0.01 * step) > 0.95


def test_percentiles_lie_inside_the_extremes(convolutions: onnx.ModelProto):
    feeds = [{"x": np.random.default_rng(i).normal(size=(1, 3, 6, 6)).astype(np.float32)} for i in range(4)]
    whole = static.observe(convolutions, feeds, static.Params())
    cut = static.observe(convolutions, feeds, static.Params(percentile=95))
    expected = np.mean([np.percentile(feed["x"], (5, 95)) for feed in feeds], axis=0)
    assert np.allclose(cut["x"], expected)
    assert all(whole[name][0] <= cut[name][0] and cut[name][1] <= whole[name][1] for name in whole)


def test_a_relu_between_convolutions_vanishes(convolutions: onnx.ModelProto):
    x = np.ones((1, 3, 6, 6), np.float32)
    ranges = static.observe(convolutions, [{"x": x}], static.Params())
    kinds = [n.op_type for n in static.quantize(convolutions, ranges, static.Params()).graph.node]
    assert "Clip" not in kinds
    assert kinds.count("QuantizeLinear") == 3  # x, r1, y


def test_a_kept_node_reads_its_float_weights(convolutions: onnx.ModelProto):
    x = np.random.default_rng(1).normal(size=(1, 3, 6, 6)).astype(np.float32)
    params = static.Params(keep=("Conv.c1",))
    quantized = static.quantize(convolutions, static.observe(convolutions, [{"x": x}], params), params)
    fixed = {i.name: i.data_type for i in quantized.graph.initializer}
    first, second = [n for n in quantized.graph.node if n.op_type == "Conv"]
    assert first.input[0] == "x"
    assert fixed[first.input[1]] == TensorProto.FLOAT
    assert second.input[1] not in fixed  # dequantized


def test_int8_weights_do_not_depend_on_the_ranges(convolutions: onnx.ModelProto):
    """Two graphs that share layers share their bytes, whatever pictures each of them saw."""
    made = []
    for size in (1, 7):
        ranges = static.observe(convolutions, [{"x": np.full((1, 3, 6, 6), size, np.float32)}], static.Params())
        quantized = static.quantize(convolutions, ranges, static.Params())
        made.append(
            {i.name: i.raw_data for i in quantized.graph.initializer if i.data_type == TensorProto.INT8 and i.dims}
        )
    assert made[0] == made[1]


def test_tables_are_stored_in_int8_and_read_within_half_a_step():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2048, 512)).astype(np.float32) * rng.uniform(0.01, 10, (2048, 1)).astype(np.float32)
    model = model_of(
        [helper.make_node("Gather", ["table", "ids"], ["rows"], "Gather.rows")],
        [Value("ids", TensorProto.INT64, ["B"])],
        [Value("rows", TensorProto.FLOAT, ["B", 512])],
        {"table": table},
    )
    draft = _qdq.Draft(model)
    _qdq.pack(draft)
    packed = draft.finish()
    onnx.checker.check_model(packed, full_check=True)
    ids = np.array([0, 5, 2047])
    found = onnx_run(packed)({"ids": ids})["rows"]
    half = np.abs(table[ids]).max(axis=1, keepdims=True) / 127 / 2
    assert (np.abs(found - table[ids]) <= 1.001 * half).all()
    assert len(packed.SerializeToString()) < table.nbytes / 3.9


def test_mixing_by_probabilities_keeps_small_ones():
    """Of 1000 equal probabilities none reaches 1/255, yet their mixture is the mean of the rows."""
    rows = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)
    model = model_of(
        [
            helper.make_node("Softmax", ["x"], ["p"], "Softmax.p", axis=-1),
            helper.make_node("MatMul", ["p", "rows"], ["y"], "MatMul.y"),
        ],
        [Value("x", TensorProto.FLOAT, ["B", 1000])],
        [Value("y", TensorProto.FLOAT, ["B", 16])],
        {"rows": rows},
    )
    x = np.zeros((1, 1000), np.float32)
    quantized = static.quantize(model, static.observe(model, [{"x": x}], static.Params()), static.Params())
    assert np.allclose(onnx_run(quantized)({"x": x})["y"], rows.mean(0, keepdims=True), atol=0.003)
    assert len(quantized.SerializeToString()) < rows.nbytes / 3


def test_rows_of_a_packed_table_may_be_what_a_dynamic_product_reads():
    """Both have scales, and names for them."""
    rng = np.random.default_rng(0)
    constants = {"table": rng.normal(size=(1 << 17, 8)).astype(np.float32), "w": rng.normal(size=(8, 3))}
    constants["w"] = constants["w"].astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["e"], "Gather.e"),
             helper.make_node("MatMul", ["e", "w"], ["y"], "MatMul.y")]  # fmt: skip
    ids, y = Value("ids", TensorProto.INT64, ["B"]), Value("y", TensorProto.FLOAT, ["B", 3])
    made = dynamic.quantize(model_of(nodes, [ids], [y], constants), {}, dynamic.Params())
    onnx.checker.check_model(made)
    picked = np.array([5, 77777])
    expected = constants["table"][picked] @ constants["w"]
    assert np.abs(onnx_run(made)({"ids": picked})["y"] - expected).max() < 0.03 * np.abs(expected).max()
