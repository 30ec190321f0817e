"""The graph under test has one channel a hundred times larger than the rest, as transformers do."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import QUANTIZERS, _qdq, smooth
from calmclip.models.flow import Array

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


SIZES = np.array([0.002, 0.05, 1.0, 3.0, 40.0, 900.0], np.float32)  # of channels that nothing mixes


@pytest.fixture(scope="module")
def mixed() -> onnx.ModelProto:
    """Whatever a depthwise convolution may read: a sum (s), a convolution's answer (d), with another reader (b) or
    behind a Relu (r); and what is left alone: a cut at 6 (k), a function that is a table (g), and what a convolution
    of all channels reads too (m)."""
    made = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[B, 6, 8, 8] x) => (float[B, 12, 2, 2] y, float[B, 6, 8, 8] z)
        <float zero = {0}, float six = {6}>
        {
            a = Conv (x, w_a, b_a)
            r = Relu (a)
            b = Conv <group = 6, pads = [1, 1, 1, 1]> (r, w_b, b_b)
            c = Conv <group = 6, pads = [1, 1, 1, 1]> (b, w_c)
            s = Add (b, c)
            d = Conv <group = 6, pads = [1, 1, 1, 1]> (s, w_d, b_d)
            e = Conv <group = 6, strides = [2, 2], pads = [1, 1, 1, 1]> (d, w_e)
            f = Conv (x, w_f)
            k = Clip (f, zero, six)
            h = Conv <group = 6, strides = [2, 2], pads = [1, 1, 1, 1]> (k, w_h)
            m = Mul (e, h)
            i = Conv <group = 6, strides = [2, 2], pads = [1, 1, 1, 1]> (m, w_i)
            j = Conv <strides = [2, 2]> (m, w_j)
            y = Add (i, j)
            o = Conv (x, w_o)
            g = Gelu (o)
            q = Conv <group = 6, pads = [1, 1, 1, 1]> (g, w_q)
            z = Sub (q, s)
        }""")
    rng = np.random.default_rng(0)
    weights = {name: (6, 1, 3, 3) for name in ("w_b", "w_c", "w_d", "w_e", "w_h")}
    weights |= {
        "w_i": (12, 1, 3, 3),
        "w_a": (6, 6, 1, 1),
        "w_f": (6, 6, 1, 1),
        "w_o": (6, 6, 1, 1),
        "w_q": (6, 1, 3, 3),
        "w_j": (12, 6, 1, 1),
    }
    weights |= dict.fromkeys(("b_a", "b_b", "b_d"), (6,))
    for name, shape in weights.items():
        array = rng.normal(size=shape).astype(np.float32)
        array *= SIZES.reshape(-1, *[1] * (len(shape) - 1)) if name in ("w_a", "b_a") else 1
        made.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in made.graph.node:
        node.name = f"{node.op_type}.{node.output[0]}"
    return made


PLANES = [{"x": np.random.default_rng(seed).normal(size=(1, 6, 8, 8)).astype(np.float32)} for seed in range(8)]
CHANNELS = smooth.Params(channels=True)


def test_channels_before_depthwise_convolutions_are_made_even_and_the_function_stays(mixed: onnx.ModelProto):
    draft = _qdq.Draft(mixed)
    limits, divided = smooth.even(draft, smooth.observe(mixed, PLANES, CHANNELS))
    even = draft.finish()
    onnx.checker.check_model(even)
    assert set(limits) == {"r_even", "b_even", "s_even", "d_even"}
    for feed in PLANES:
        for name, true in onnx_run(mixed)(feed).items():
            assert np.abs(onnx_run(even)(feed)[name] - true).max() < 1e-5 * np.abs(true).max()
    seen = [_qdq.tap(even, list(limits))(feed) for feed in PLANES]
    true = [_qdq.tap(mixed, ["r", "b", "s", "d"])(feed) for feed in PLANES]
    for name, (low, high) in limits.items():
        each = np.abs(np.concatenate([one[name] for one in seen])).max(axis=(0, 2, 3))
        before = np.abs(np.concatenate([one[name.removesuffix("_even")] for one in true])).max(axis=(0, 2, 3))
        assert np.allclose(each, each[0], rtol=1e-4)  # all are as large as their geometric mean was
        assert each[0] == pytest.approx(np.exp(np.log(before).mean()), rel=1e-4)
        whole = np.concatenate([one[name] for one in seen])
        assert (low, high) == pytest.approx((1.25 * whole.min(), 1.25 * whole.max()), rel=1e-4, abs=1e-6)
    assert set(divided) == {"Conv.a", "Conv.b", "Conv.d"}


def test_what_makes_channels_even_costs_a_product_only_where_no_convolution_can_do_it(mixed: onnx.ModelProto):
    draft = _qdq.Draft(mixed)
    smooth.even(draft, smooth.observe(mixed, PLANES, CHANNELS))
    added = {node.output[0]: node.input[0] for node in draft.nodes if node.op_type == "Mul" and node.output[0] != "m"}
    assert added == {"s_even": "s", "b": "b_even"}  # a sum, and an answer that is added as it was


def test_between_depthwise_convolutions_small_channels_are_kept(mixed: onnx.ModelProto):
    errors = {}
    for channels, name in ((False, f"b{_qdq.BACK}"), (True, "b")):
        params = smooth.Params(channels=channels)
        quantized = smooth.quantize(mixed, smooth.observe(mixed, PLANES, params), params)
        found, true = _qdq.tap(quantized, [name])(PLANES[0])[name], _qdq.tap(mixed, ["b"])(PLANES[0])["b"]
        errors[channels] = np.sqrt(np.mean((found - true) ** 2, axis=(0, 2, 3)) / np.mean(true**2, axis=(0, 2, 3)))
    assert errors[False].max() > 0.5
    assert errors[True].max() < 0.05


def test_a_depthwise_convolution_is_the_integers_worked_out_by_hand():
    made = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[B, 3, 4, 4] x) => (float[B, 6, 4, 4] y)
        { y = Conv <group = 3> (x, w, b) }""")
    made.graph.node[0].name = "Conv.y"
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(6, 1, 1, 1)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for array, name in ((w, "w"), (b, "b")))
    x = (rng.normal(size=(1, 3, 4, 4)) * [[[[0.01]], [[1]], [[100]]]]).astype(np.float32)
    ranges = smooth.observe(made, [{"x": x}], CHANNELS)
    assert np.allclose(ranges["x"], (x.min(axis=(0, 2, 3)), x.max(axis=(0, 2, 3))))
    found = onnx_run(smooth.quantize(made, ranges, CHANNELS))({"x": x})["y"]

    largest = np.abs(x).max(axis=(0, 2, 3)).astype(np.float64)
    size = (largest / np.exp(np.log(largest).mean())).reshape(1, 3, 1, 1)
    step = 1.25 * ((x / size).max() - (x / size).min()) / 255
    inner = np.rint(x / size / step) * step * size  # in steps of each channel's own size
    expected = np.repeat(inner, 2, axis=1) * w.reshape(1, 6, 1, 1) + b.reshape(1, 6, 1, 1)
    coarse = (ranges["y"][1] - ranges["y"][0]) / 255  # y itself has one step for all
    assert np.abs(found - expected).max() <= 0.51 * coarse + 0.01 * np.abs(expected).max() / 2
    assert np.abs(found - expected)[:, :4].max() <= 0.52 * coarse


def test_corrected_biases_are_divided_with_their_answers(mixed: onnx.ModelProto):
    shift = (0.5 * SIZES).tolist()
    ranges, plain = smooth.observe(mixed, PLANES, CHANNELS), CHANNELS.model_copy(update={"shifts": {"Conv.b": shift}})
    moved = onnx.ModelProto()
    moved.CopyFrom(mixed)
    (bias,) = [one for one in moved.graph.initializer if one.name == "b_b"]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(shift), "b_b"))
    runs = [onnx_run(smooth.quantize(*one)) for one in ((mixed, ranges, plain), (moved, ranges, CHANNELS))]
    found, expected = (run(PLANES[0])["z"] for run in runs)
    scale = np.abs(expected).max(axis=(0, 2, 3), keepdims=True)
    assert (np.abs(found - expected) / scale).max() < 0.02
    assert (np.abs(found - onnx_run(smooth.quantize(mixed, ranges, CHANNELS))(PLANES[0])["z"]) / scale).max() > 0.1


def test_a_depthwise_convolution_that_stays_in_float_reads_what_it_read(mixed: onnx.ModelProto):
    params = CHANNELS.model_copy(update={"keep": ("Conv.b", "Conv.c", "Conv.d", "Conv.e")})
    quantized = smooth.quantize(mixed, smooth.observe(mixed, PLANES, params), params)
    assert not [name for node in quantized.graph.node for name in node.output if "_even" in name]


def test_fast_has_the_same_setting(mixed: onnx.ModelProto):
    ours, theirs = ([node.SerializeToString() for node in built(name, mixed, PLANES, channels=True).graph.node]
                    for name in ("fast", "smooth"))  # fmt: skip
    assert ours == theirs
    assert ours != [node.SerializeToString() for node in built("fast", mixed, PLANES).graph.node]
