"""The graph under test has one channel 100 times larger than the others, as transformers have."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from calmclip.export.graph import Draft, tap
from calmclip.export.parity import onnx_run
from calmclip.export.qdq import BACK
from calmclip.export.quantizers import QUANTIZERS, smooth
from calmclip.models.flow import Array
from tests.export.graphs import normal, parse

WIDTH, OUT = 32, 8


@pytest.fixture
def outlier() -> tuple[onnx.ModelProto, list[dict[str, Array]]]:
    """x [B, T, 32] times W [32, 8], plus a bias; channel 5 of x is around 100, the others around 1."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(WIDTH, OUT)).astype(np.float32)
    weight[5] *= 0.01  # trained nets have small weights for such channels
    bias = rng.normal(size=OUT).astype(np.float32)
    text = "g (float[B, T, 32] x) => (float[B, T, 8] y) { product = MatMul (x, W) y = Add (product, b) }"
    model = parse(text, W=weight, b=bias)
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
    factors = smooth.factors(np.array([4.0, 1.0]), np.array([1.0, 1.0]), 0.5)
    assert np.allclose(factors, np.array([2.0, 1.0]) / np.sqrt(2.0))


def test_moving_outliers_leaves_the_function_alone(outlier):
    model, feeds = outlier
    ranges = smooth.observe(model, feeds, smooth.Params())
    draft = Draft(model)
    limits = smooth.smooth(draft, ranges, {"x": 0.75})
    assert rms(draft.finish(), feeds, model) < 1e-5
    low, high = limits[smooth.equalized("x")]
    largest = max(np.abs(ranges["x"][0]).max(), np.abs(ranges["x"][1]).max())
    assert max(-low, high) < largest / 5


def test_ranges_are_those_of_each_channel(outlier):
    model, feeds = outlier
    low, high = smooth.observe(model, feeds, smooth.Params())["x"]
    everything = np.concatenate([f["x"].reshape(-1, WIDTH) for f in feeds])
    assert np.allclose(low, everything.min(0))
    assert np.allclose(high, everything.max(0))


def test_smooth_loses_less_than_one_scale_for_all_channels(outlier):
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
        integers = [numpy_helper.to_array(i) for i in quantized.graph.initializer if i.data_type == TensorProto.INT8]
        (weight,) = [w for w in integers if w.size == WIDTH * OUT]
        assert most - 1 <= np.abs(weight.astype(int)).max() <= most


SIZES = np.array([0.002, 0.05, 1.0, 3.0, 40.0, 900.0], np.float32)  # the sizes of channels that no product mixes


@pytest.fixture(scope="module")
def mixed() -> onnx.ModelProto:
    """Depthwise convolutions read tensors that are equalized: a sum (s), the output of a convolution (d), one with
    another reader (b), one behind a Relu (r). They also read tensors that are not: behind a clip at 6 (k), behind a
    table of a function (g), and one that a convolution of all channels reads too (m)."""
    text = """g (float[B, 6, 8, 8] x) => (float[B, 12, 2, 2] y, float[B, 6, 8, 8] z)
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
        }"""
    rng = np.random.default_rng(0)
    weights = {name: (6, 1, 3, 3) for name in ("w_b", "w_c", "w_d", "w_e", "w_h")}
    weights |= {"w_i": (12, 1, 3, 3), "w_a": (6, 6, 1, 1), "w_f": (6, 6, 1, 1), "w_o": (6, 6, 1, 1)}
    weights |= {"w_q": (6, 1, 3, 3), "w_j": (12, 6, 1, 1)} | dict.fromkeys(("b_a", "b_b", "b_d"), (6,))
    constants = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    constants["w_a"] *= SIZES.reshape(6, 1, 1, 1)
    constants["b_a"] *= SIZES
    return parse(text, **constants)


PLANES = [{"x": normal(1, 6, 8, 8, seed=seed)} for seed in range(8)]
CHANNELS = smooth.Params(channels=True)


def test_channels_before_depthwise_convolutions_are_equalized_and_the_function_stays(mixed: onnx.ModelProto):
    draft = Draft(mixed)
    limits, divided = smooth.equalize(draft, smooth.observe(mixed, PLANES, CHANNELS))
    equalized = draft.finish()
    onnx.checker.check_model(equalized)
    assert set(limits) == {"r_even", "b_even", "s_even", "d_even"}
    for feed in PLANES:
        for name, true in onnx_run(mixed)(feed).items():
            assert np.abs(onnx_run(equalized)(feed)[name] - true).max() < 1e-5 * np.abs(true).max()
    outputs = [tap(equalized, list(limits))(feed) for feed in PLANES]
    true = [tap(mixed, ["r", "b", "s", "d"])(feed) for feed in PLANES]
    for name, (low, high) in limits.items():
        each = np.abs(np.concatenate([planes[name] for planes in outputs])).max(axis=(0, 2, 3))
        before = np.abs(np.concatenate([planes[name.removesuffix("_even")] for planes in true])).max(axis=(0, 2, 3))
        assert np.allclose(each, each[0], rtol=1e-4)  # each is as large as their geometric mean
        assert each[0] == pytest.approx(np.exp(np.log(before).mean()), rel=1e-4)
        values = np.concatenate([planes[name] for planes in outputs])
        assert (low, high) == pytest.approx((1.25 * values.min(), 1.25 * values.max()), rel=1e-4, abs=1e-6)
    assert set(divided) == {"Conv.a", "Conv.b", "Conv.d"}


def test_equalizing_adds_a_product_only_if_no_convolution_can_scale(mixed: onnx.ModelProto):
    draft = Draft(mixed)
    smooth.equalize(draft, smooth.observe(mixed, PLANES, CHANNELS))
    added = {node.output[0]: node.input[0] for node in draft.nodes if node.op_type == "Mul" and node.output[0] != "m"}
    assert added == {"s_even": "s", "b": "b_even"}  # a sum, and an output that another node reads unscaled


def test_small_channels_between_depthwise_convolutions_stay_accurate(mixed: onnx.ModelProto):
    errors = {}
    for channels, name in ((False, f"b{BACK}"), (True, "b")):
        params = smooth.Params(channels=channels)
        quantized = smooth.quantize(mixed, smooth.observe(mixed, PLANES, params), params)
        outputs, true = tap(quantized, [name])(PLANES[0])[name], tap(mixed, ["b"])(PLANES[0])["b"]
        errors[channels] = np.sqrt(np.mean((outputs - true) ** 2, axis=(0, 2, 3)) / np.mean(true**2, axis=(0, 2, 3)))
    assert errors[False].max() > 0.5
    assert errors[True].max() < 0.05


def test_a_depthwise_convolution_equals_integers_computed_by_hand():
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(6, 1, 1, 1)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    model = parse("g (float[B, 3, 4, 4] x) => (float[B, 6, 4, 4] y) { y = Conv <group = 3> (x, w, b) }", w=w, b=b)
    x = (rng.normal(size=(1, 3, 4, 4)) * [[[[0.01]], [[1]], [[100]]]]).astype(np.float32)
    ranges = smooth.observe(model, [{"x": x}], CHANNELS)
    assert np.allclose(ranges["x"], (x.min(axis=(0, 2, 3)), x.max(axis=(0, 2, 3))))
    outputs = onnx_run(smooth.quantize(model, ranges, CHANNELS))({"x": x})["y"]

    largest = np.abs(x).max(axis=(0, 2, 3)).astype(np.float64)
    size = (largest / np.exp(np.log(largest).mean())).reshape(1, 3, 1, 1)
    step = 1.25 * ((x / size).max() - (x / size).min()) / 255
    inner = np.rint(x / size / step) * step * size  # steps in units of each channel's size
    expected = np.repeat(inner, 2, axis=1) * w.reshape(1, 6, 1, 1) + b.reshape(1, 6, 1, 1)
    coarse = (ranges["y"][1] - ranges["y"][0]) / 255  # y itself has one step for all
    assert np.abs(outputs - expected).max() <= 0.51 * coarse + 0.01 * np.abs(expected).max() / 2
    assert np.abs(outputs - expected)[:, :4].max() <= 0.52 * coarse


def test_corrected_biases_are_divided_like_their_outputs(mixed: onnx.ModelProto):
    shift = (0.5 * SIZES).tolist()
    ranges, plain = smooth.observe(mixed, PLANES, CHANNELS), CHANNELS.model_copy(update={"shifts": {"Conv.b": shift}})
    moved = onnx.ModelProto()
    moved.CopyFrom(mixed)
    (bias,) = [tensor for tensor in moved.graph.initializer if tensor.name == "b_b"]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(shift), "b_b"))
    runs = [onnx_run(smooth.quantize(*arguments)) for arguments in ((mixed, ranges, plain), (moved, ranges, CHANNELS))]
    outputs, expected = (run(PLANES[0])["z"] for run in runs)
    scale = np.abs(expected).max(axis=(0, 2, 3), keepdims=True)
    assert (np.abs(outputs - expected) / scale).max() < 0.02
    assert (np.abs(outputs - onnx_run(smooth.quantize(mixed, ranges, CHANNELS))(PLANES[0])["z"]) / scale).max() > 0.1


def test_a_depthwise_convolution_in_float_reads_unscaled_tensors(mixed: onnx.ModelProto):
    params = CHANNELS.model_copy(update={"keep": ("Conv.b", "Conv.c", "Conv.d", "Conv.e")})
    quantized = smooth.quantize(mixed, smooth.observe(mixed, PLANES, params), params)
    assert not [name for node in quantized.graph.node for name in node.output if "_even" in name]


def test_fast_has_the_same_setting(mixed: onnx.ModelProto):
    ours, theirs = ([node.SerializeToString() for node in built(name, mixed, PLANES, channels=True).graph.node]
                    for name in ("fast", "smooth"))  # fmt: skip
    assert ours == theirs
    assert ours != [node.SerializeToString() for node in built("fast", mixed, PLANES).graph.node]
