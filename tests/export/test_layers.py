import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calmclip.export import layers
from calmclip.export.quantizers import smooth, static
from calmclip.export.report import text
from calmclip.models.flow import Array
from tests.export.graphs import parse


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """Two 1x1 convolutions with a ReLU6 between them, a mean, and one matrix product on each side of a Softmax."""
    return parse(
        """g (float[B, 3, 6, 6] x) => (float[B, 5] y)
        <float zero = {0}, float six = {6}, int64[2] sides = {2, 3}>
        {
            c = Conv (x, w1)
            r = Clip (c, zero, six)
            d = Conv (r, w2)
            f = ReduceMean <keepdims = 0> (d, sides)
            g = MatMul (f, w3)
            p = Softmax (g)
            y = MatMul (p, w4)
        }""",
        {"w1": (4, 3, 1, 1), "w2": (8, 4, 1, 1), "w3": (8, 6), "w4": (6, 5)},
    )


FEEDS = [{"x": np.random.default_rng(seed).standard_normal((1, 3, 6, 6)).astype(np.float32)} for seed in range(4)]


def quantized(model: onnx.ModelProto, **params: object) -> onnx.ModelProto:
    settings = static.Params.model_validate(params)
    return static.quantize(model, static.observe(model, FEEDS, settings), settings)


def test_each_product_in_int8_has_its_signal_to_noise_ratio(model: onnx.ModelProto):
    ratios = layers.compare(model, quantized(model), FEEDS, {"B": 1})["sqnr_db"]
    assert set(ratios) == {"Conv.c", "Conv.d", "MatMul.g"}  # not the product that reads probabilities
    assert all(20 < db < 60 for db in ratios.values())

    # the first ratio by hand: 8 bits for the picture, for each channel of the weights, and for the clipped output
    def quantize(values: Array, low: float, high: float) -> Array:
        step = (high - low) / 255
        return np.clip(np.rint(values / step), np.rint(low / step), np.rint(high / step)) * step

    w = next(numpy_helper.to_array(i) for i in model.graph.initializer if i.name == "w1").astype(np.float64)[:, :, 0, 0]
    step = np.abs(w).max(1, keepdims=True) / 127
    x = np.concatenate([feed["x"] for feed in FEEDS])
    true = np.clip(np.einsum("oi,bihw->bohw", w, x), 0, 6)
    pixels = quantize(x, float(x.min()), float(x.max()))
    out = quantize(np.clip(np.einsum("oi,bihw->bohw", np.rint(w / step) * step, pixels), 0, 6), 0.0, float(true.max()))
    expected = 10 * np.log10((true**2).sum() / ((true - out) ** 2).sum())
    assert ratios["Conv.c"] == pytest.approx(expected, abs=0.1)


def test_selected_rows_count_if_both_graphs_have_the_same_number():
    """w reads the rows above a limit. The second feed has no such row; INT8 selects fewer rows of the third."""
    model = parse(
        """g (float[N, 4] x, float[N] chance) => (float[n, 5] y)
        <float limit = {0.5}, int64 zero = {0}>
        {
            above = Greater (chance, limit)
            places = NonZero (above)
            selected = Gather (places, zero)
            rows = Gather (x, selected)
            y = MatMul (rows, w)
        }""",
        {"w": (4, 5)},
    )
    random = np.random.default_rng(1)
    feeds = [
        {"x": random.standard_normal((3, 4)).astype(np.float32), "chance": np.array(chances, np.float32)}
        for chances in ([0.9, 0.1, 0.9], [0.1, 0.2, 0.3], [0.6, 0.9, 0.9])
    ]
    int8 = static.quantize(model, static.observe(model, feeds, static.Params()), static.Params())
    (limit,) = (tensor for tensor in int8.graph.initializer if tensor.name == "limit")
    limit.CopyFrom(numpy_helper.from_array(np.float32(0.7), "limit"))
    result = layers.compare(model, int8, feeds, {"N": 3})
    assert result == layers.compare(model, int8, feeds[:1], {"N": 3})
    assert 20 < result["sqnr_db"]["MatMul.y"] < 60
    assert layers.compare(model, int8, feeds[1:], {"N": 3})["sqnr_db"] == {}


def test_equalized_channels_are_compared_where_both_graphs_have_the_same_values():
    """Four depthwise convolutions in a row. An Add also reads the output of the second; the outputs of the first and
    the third stay divided."""
    rng = np.random.default_rng(0)
    model = parse(
        """g (float[B, 3, 6, 6] x) => (float[B, 3, 6, 6] y)
        {
            a = Conv <group = 3> (x, w1)
            b = Conv <group = 3> (a, w2)
            r = Relu (b)
            c = Conv <group = 3> (r, w3)
            d = Conv <group = 3> (c, w4)
            y = Add (r, d)
        }""",
        **{f"w{i}": rng.uniform(1, 2, (3, 1, 1, 1)).astype(np.float32) for i in range(1, 5)},
    )
    params = smooth.Params(channels=True)
    int8 = smooth.quantize(model, smooth.observe(model, FEEDS, params), params)
    ratios = layers.compare(model, int8, FEEDS, {"B": 1})["sqnr_db"]
    assert set(ratios) == {"Conv.b", "Conv.d"}
    assert all(30 < db < 60 for db in ratios.values())


def test_ranges_are_those_of_the_graph_and_contain_zero(model: onnx.ModelProto):
    ranges = layers.ranges(quantized(model))
    low, high = ranges["x"]
    pixels = np.concatenate([feed["x"] for feed in FEEDS])
    step = float(pixels.max() - pixels.min()) / 255
    assert low == pytest.approx(float(pixels.min()), abs=step)
    assert high == pytest.approx(float(pixels.max()), abs=step)
    assert all(low <= 0 <= high for low, high in ranges.values())


def test_each_product_in_float_has_a_reason(model: onnx.ModelProto):
    int8 = quantized(model, keep=("Conv.c", "Conv.d"))
    reasons = layers.in_float(model, int8, {"B": 1}, keep=("Conv.c",))
    assert reasons == {
        "Conv.c": "asked for",
        "Conv.d": "its quantizer leaves it in float",
        "MatMul.y": "reads probabilities; its weights are stored in int8",
    }


def test_a_report_writes_a_range_on_one_line():
    written = text({"ranges": {"x": [-1.5, 2e-05]}, "names": ["a", "b"], "rows": [{"a": 1}]})
    assert '"x": [ -1.5, 2e-05 ]' in written
    assert '"a",\n' in written
