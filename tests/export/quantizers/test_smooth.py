"""The graph under test has one channel a hundred times larger than the rest, as transformers do."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.parity import onnx_run
from export.quantizers import QUANTIZERS, _qdq, smooth
from models.flow import Array

WIDTH, OUT = 32, 8


@pytest.fixture
def outlier() -> tuple[onnx.ModelProto, list[dict[str, Array]]]:
    """x [B, T, 32] times W [32, 8], plus a bias; channel 5 of x is around 100, the others around 1."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(WIDTH, OUT)).astype(np.float32)
    weight[5] *= 0.01  # networks with such channels have learned small weights for them
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["product"], "MatMul.product"),
            helper.make_node("Add", ["product", "b"], ["y"], "Add.y"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "T", OUT])],
        [numpy_helper.from_array(weight, "W"), numpy_helper.from_array(rng.normal(size=OUT).astype(np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    feeds = []
    for _ in range(8):
        x = rng.normal(size=(2, 4, WIDTH)).astype(np.float32)
        x[..., 5] *= 100
        feeds.append({"x": x})
    return model, feeds


def built(name: str, model: onnx.ModelProto, feeds: list[dict[str, Array]], **params: object) -> onnx.ModelProto:
    quantizer = QUANTIZERS.get(name)
    checked = quantizer.params.model_validate(params)
    ranges = quantizer.observe(model, feeds, checked) if quantizer.observe else {}
    return quantizer.quantize(model, ranges, checked)


def rms(model: onnx.ModelProto, feeds: list[dict[str, Array]], reference: onnx.ModelProto) -> float:
    run, true = onnx_run(model), onnx_run(reference)
    return float(np.sqrt(np.mean([np.mean((run(f)["y"] - true(f)["y"]) ** 2) for f in feeds])))


def test_factors_by_hand():
    # sqrt(4 / 1) and sqrt(1 / 1), over their geometric mean sqrt(2 * 1)
    found = smooth.factors(np.array([4.0, 1.0]), np.array([1.0, 1.0]), 0.5)
    assert np.allclose(found, np.array([2.0, 1.0]) / np.sqrt(2.0))


def test_moving_outliers_leaves_the_function_alone(outlier):
    model, feeds = outlier
    ranges = smooth.observe(model, feeds, smooth.Params())
    draft = _qdq.Draft(model)
    limits = smooth.smooth(draft, ranges, {"x": 0.75})
    assert rms(draft.finish(), feeds, model) < 1e-5
    low, high = limits[smooth.evened("x")]
    largest = max(np.abs(ranges["x"][0]).max(), np.abs(ranges["x"][1]).max())
    assert max(-low, high) < largest / 5


def test_ranges_are_those_of_each_channel(outlier):
    model, feeds = outlier
    low, high = smooth.observe(model, feeds, smooth.Params())["x"]
    everything = np.concatenate([f["x"].reshape(-1, WIDTH) for f in feeds])
    assert np.allclose(low, everything.min(0))
    assert np.allclose(high, everything.max(0))


def test_keeps_what_one_scale_for_all_channels_loses(outlier):
    model, feeds = outlier
    assert rms(built("smooth", model, feeds), feeds, model) < rms(built("static", model, feeds), feeds, model) / 5


@pytest.mark.parametrize(("name", "alone"), [("smooth", True), ("static", True), ("dynamic", False)])
def test_whether_a_row_depends_on_its_neighbours(outlier, name: str, alone: bool):
    model, feeds = outlier
    run = onnx_run(built(name, model, feeds))
    x = feeds[0]["x"].copy()
    together = run({"x": np.concatenate([x, 50 * x])})["y"][:2]
    assert np.array_equal(run({"x": x})["y"], together) == alone


def test_a_packed_bundle_reads_uint8_times_int8(outlier):
    model, feeds = outlier
    quantized = built("smooth", model, feeds)
    fixed = {i.name: i for i in quantized.graph.initializer}
    (activation,) = [n for n in quantized.graph.node if n.op_type == "QuantizeLinear"]
    assert fixed[activation.input[2]].data_type == TensorProto.UINT8
    kinds = {
        fixed[n.input[0]].data_type
        for n in quantized.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in fixed
    }
    assert kinds == {TensorProto.INT8}


@pytest.mark.parametrize("name", ["smooth", "static", "dynamic"])
def test_reduced_weights_fit_seven_bits(outlier, name: str):
    model, feeds = outlier
    for reduce, most in ((False, 127), (True, 64)):
        quantized = built(name, model, feeds, reduce_range=reduce)
        whole = [numpy_helper.to_array(i) for i in quantized.graph.initializer if i.data_type == TensorProto.INT8]
        (weight,) = [w for w in whole if w.size == WIDTH * OUT]
        assert most - 1 <= np.abs(weight.astype(int)).max() <= most
