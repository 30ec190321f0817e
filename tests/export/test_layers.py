import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from calmclip.export import layers
from calmclip.export.quantizers import smooth, static
from calmclip.export.report import text
from calmclip.models.flow import Array


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """Two 1x1 convolutions with a ReLU6 between them, a mean, and a matrix product behind a Softmax and one before."""
    rng = np.random.default_rng(0)
    made = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[B, 3, 6, 6] x) => (float[B, 5] y)
        <float zero = {0}, float six = {6}, int64[2] sides = {2, 3}>
        {
            c = Conv (x, w1)
            r = Clip (c, zero, six)
            d = Conv (r, w2)
            f = ReduceMean <keepdims = 0> (d, sides)
            g = MatMul (f, w3)
            p = Softmax (g)
            y = MatMul (p, w4)
        }""")
    shapes = {"w1": (4, 3, 1, 1), "w2": (8, 4, 1, 1), "w3": (8, 6), "w4": (6, 5)}
    for name, shape in shapes.items():
        made.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    for node in made.graph.node:
        node.name = f"{node.op_type}.{node.output[0]}"
    return made


FEEDS = [{"x": np.random.default_rng(seed).standard_normal((1, 3, 6, 6)).astype(np.float32)} for seed in range(4)]


def quantized(model: onnx.ModelProto, **params: object) -> onnx.ModelProto:
    settings = static.Params.model_validate(params)
    return static.quantize(model, static.observe(model, FEEDS, settings), settings)


def test_each_product_in_int8_has_its_signal_to_noise_ratio(model: onnx.ModelProto):
    found = layers.compare(model, quantized(model), FEEDS, {"B": 1})["sqnr_db"]
    assert set(found) == {"Conv.c", "Conv.d", "MatMul.g"}  # not what reads probabilities
    assert all(20 < db < 60 for db in found.values())

    # of the first by hand: the picture in 8 bits, the weights in 8 bits a channel, what comes out after the cut
    def eight(values: Array, low: float, high: float) -> Array:
        step = (high - low) / 255
        return np.clip(np.rint(values / step), np.rint(low / step), np.rint(high / step)) * step

    w = next(numpy_helper.to_array(i) for i in model.graph.initializer if i.name == "w1").astype(np.float64)[:, :, 0, 0]
    step = np.abs(w).max(1, keepdims=True) / 127
    x = np.concatenate([feed["x"] for feed in FEEDS])
    true = np.clip(np.einsum("oi,bihw->bohw", w, x), 0, 6)
    seen = eight(x, float(x.min()), float(x.max()))
    out = eight(np.clip(np.einsum("oi,bihw->bohw", np.rint(w / step) * step, seen), 0, 6), 0.0, float(true.max()))
    expected = 10 * np.log10((true**2).sum() / ((true - out) ** 2).sum())
    assert found["Conv.c"] == pytest.approx(expected, abs=0.1)


def test_rows_that_are_routed_count_where_both_graphs_have_them():
    """Rows above a limit go through w; the second feed has none, and of the third INT8 finds another number."""
    made = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[N, 4] x, float[N] chance) => (float[n, 5] y)
        <float limit = {0.5}, int64 zero = {0}>
        {
            above = Greater (chance, limit)
            places = NonZero (above)
            own = Gather (places, zero)
            rows = Gather (x, own)
            y = MatMul (rows, w)
        }""")
    random = np.random.default_rng(0)
    made.graph.initializer.append(numpy_helper.from_array(random.standard_normal((4, 5)).astype(np.float32), "w"))
    for node in made.graph.node:
        node.name = f"{node.op_type}.{node.output[0]}"
    feeds = [
        {"x": random.standard_normal((3, 4)).astype(np.float32), "chance": np.array(chances, np.float32)}
        for chances in ([0.9, 0.1, 0.9], [0.1, 0.2, 0.3], [0.6, 0.9, 0.9])
    ]
    small = static.quantize(made, static.observe(made, feeds, static.Params()), static.Params())
    (limit,) = (one for one in small.graph.initializer if one.name == "limit")
    limit.CopyFrom(numpy_helper.from_array(np.float32(0.7), "limit"))
    found = layers.compare(made, small, feeds, {"N": 3})
    assert found == layers.compare(made, small, feeds[:1], {"N": 3})
    assert 20 < found["sqnr_db"]["MatMul.y"] < 60
    assert layers.compare(made, small, feeds[1:], {"N": 3})["sqnr_db"] == {}


def test_channels_that_were_made_even_are_compared_where_they_are_as_they_were():
    """Of four depthwise convolutions in a row the second's answer is added too; the first's and the third's go on as
    they are, divided."""
    made = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[B, 3, 6, 6] x) => (float[B, 3, 6, 6] y)
        {
            a = Conv <group = 3> (x, w1)
            b = Conv <group = 3> (a, w2)
            r = Relu (b)
            c = Conv <group = 3> (r, w3)
            d = Conv <group = 3> (c, w4)
            y = Add (r, d)
        }""")
    rng = np.random.default_rng(0)
    for name in ("w1", "w2", "w3", "w4"):
        made.graph.initializer.append(numpy_helper.from_array(rng.uniform(1, 2, (3, 1, 1, 1)).astype(np.float32), name))
    for node in made.graph.node:
        node.name = f"{node.op_type}.{node.output[0]}"
    params = smooth.Params(channels=True)
    small = smooth.quantize(made, smooth.observe(made, FEEDS, params), params)
    found = layers.compare(made, small, FEEDS, {"B": 1})["sqnr_db"]
    assert set(found) == {"Conv.b", "Conv.d"}
    assert all(30 < db < 60 for db in found.values())


def test_ranges_are_those_of_the_graph_and_hold_zero(model: onnx.ModelProto):
    found = layers.ranges(quantized(model))
    low, high = found["x"]
    seen = np.concatenate([feed["x"] for feed in FEEDS])
    step = float(seen.max() - seen.min()) / 255
    assert low == pytest.approx(float(seen.min()), abs=step)
    assert high == pytest.approx(float(seen.max()), abs=step)
    assert all(low <= 0 <= high for low, high in found.values())


def test_what_stays_in_float_has_a_reason(model: onnx.ModelProto):
    made = quantized(model, keep=("Conv.c", "Conv.d"))
    found = layers.in_float(model, made, {"B": 1}, asked=("Conv.c",))
    assert found == {
        "Conv.c": "asked for",
        "Conv.d": "its quantizer leaves it in float",
        "MatMul.y": "reads probabilities; its weights are stored in int8",
    }


def test_a_report_writes_a_range_on_one_line():
    written = text({"ranges": {"x": [-1.5, 2e-05]}, "names": ["a", "b"], "rows": [{"a": 1}]})
    assert '"x": [ -1.5, 2e-05 ]' in written
    assert '"a",\n' in written
