"""Bounds in graphs. Values outside come from the formulas, in float64; graphs are so small that bounds are known."""

import numpy as np
import onnx
import pytest

from calmclip.export import light
from calmclip.export.resilience.bounds import Site, bounded, by_neuron, insert, sites, stored
from calmclip.export.resilience.calibrate import MARGIN, bounds, forms, observe
from calmclip.export.resilience.faults import kinds
from calmclip.export.resilience.forms import HIGH, LOW, Bound
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array
from tests.export.graphs import parse

RELU = "g (float[N] x) => (float[N] y) { y = Relu (x) }"
# layer 1: x W + b, ReLU; layer 2: times V. For the inputs below, by hand: layer 1 is [3, 0] and [1, 2.5].
TWO = """g (float[N, 2] x) => (float[N, 2] y) {
    m = MatMul (x, w)
    s = Add (m, b)
    r = Relu (s)
    y = MatMul (r, v)
}"""
W, B, V = np.diag([1.0, -1.0]), np.array([0.0, 0.5]), np.array([[2.0, 0.0], [0.0, 1.0]])
FEEDS = [{"x": np.array([[3.0, 4.0]], np.float32)}, {"x": np.array([[1.0, -2.0]], np.float32)}]


def two() -> onnx.ModelProto:
    return parse(TWO, **{name: np.float32(array) for name, array in (("w", W), ("b", B), ("v", V))})


def answer(model: onnx.ModelProto, x: Array) -> Array:
    return np.asarray(light.Session(model, threads=1).run(None, {"x": np.asarray(x, np.float32)})[0])


def bound(low: float, high: float) -> Bound:
    return Bound(np.float32(low), np.float32(high))


def test_the_smooth_form_has_the_published_values():
    """max(0, x - x sigmoid(20 (x - 2))); infinity and NaN are no part of the paper: both become 0."""
    model = insert(parse(RELU), {"y": bound(0, 2)}, {"y": "smooth"}, guarded=["y"])
    x = [-1, 0.5, 1.9, 2, 2.1, 10, np.inf, np.nan]
    assert answer(model, x) == pytest.approx([0, 0.5, 1.67351445, 1, 0.25032614, 0, 0, 0], abs=2e-6)


def test_the_smooth_form_of_both_sides():
    x = np.array([-4.0, -1.1, -1, -0.5, 0.5, 2.1, np.inf])
    model = insert(parse(RELU.replace("Relu", "Identity")), {"y": bound(-1, 2)}, {"y": "smooth"})
    finite = x[:-1]
    expected = finite / (1 + np.exp(-20 * (2 - finite))) / (1 + np.exp(-20 * (finite + 1)))
    assert answer(model, x) == pytest.approx([*expected, 0], abs=2e-6)


@pytest.mark.parametrize(
    ("form", "guarded", "expected"),
    [
        ("clamp", (), [-1, -1, 1, 2, 2, np.nan]),
        ("clamp", ("y",), [-1, -1, 1, 2, 2, 0]),
        ("zero", (), [0, -1, 1, 2, 0, 0]),
    ],
)
def test_numbers_out_of_range(form, guarded, expected):
    model = insert(parse(RELU.replace("Relu", "Identity")), {"y": bound(-1, 2)}, {"y": form}, guarded=guarded)
    np.testing.assert_array_equal(answer(model, [-np.inf, -1, 1, 2, 3e38, np.nan]), expected)


def test_bounds_of_two_layers_are_their_extremes():
    model = two()
    places = sites(model)
    assert places == [Site("r", -1, True), Site("y", -1, False)]
    seen = observe(model, FEEDS, places, [None])
    by_layer, hybrid = (bounds(model, places, seen, method) for method in ("layer", "hybrid"))
    assert by_neuron(model, places) == places[0]
    near = {"rel": 2 * MARGIN, "abs": 6 * MARGIN}
    assert (by_layer["r"].low, by_layer["r"].high) == (pytest.approx(0, **near), pytest.approx(3, **near))
    assert (by_layer["y"].low, by_layer["y"].high) == (pytest.approx(0, **near), pytest.approx(6, **near))
    assert hybrid["r"].high == pytest.approx([3, 2.5], **near)
    assert hybrid["y"].high == pytest.approx(6, **near)


def test_slack_widens_both_sides_by_a_part_of_the_greater_end():
    """Layer 2 is within [0, 6]; with slack 1 within [-6, 12]."""
    model = two()
    places = sites(model)
    limits = bounds(model, places, observe(model, FEEDS, places, [None]), "layer", {"y": 1.0})
    assert (limits["y"].low, limits["y"].high) == (pytest.approx(-6, abs=0.01), pytest.approx(12, abs=0.01))
    assert limits["r"].high == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("form", ["clamp", "zero", "mixed"])
@pytest.mark.parametrize("method", ["layer", "hybrid"])
def test_no_calibration_answer_changes_and_a_flipped_bit_is_bounded(form, method):
    """The weight 1 of layer 1 with bit 30 flipped is infinity; with bit 29 flipped it is 1.08e-19, of which 3 is 0."""
    model = two()
    places = sites(model)
    limits = bounds(model, places, observe(model, FEEDS, places, [None]), method)
    made = insert(model, limits, forms(places, form))
    for feed in FEEDS:
        np.testing.assert_array_equal(answer(made, feed["x"]), answer(model, feed["x"]))
    draft = {tensor.name: tensor for tensor in made.graph.initializer}
    draft["w"].CopyFrom(onnx.numpy_helper.from_array(np.array([[np.inf, 0], [0, -1]], np.float32), "w"))
    high = {"clamp": 6.0}.get(form, 0.0)
    assert answer(made, [[3, -2]])[0] == pytest.approx([high, 2.5], abs=10 * MARGIN)
    assert not np.isfinite(answer(model, [[3e38, 0]])[0] * 10).all()  # the oracle's own check: it can overflow


def test_a_clip_takes_the_bounds_in_place_and_is_never_widened():
    model = parse(
        "g (float[N, 2] x) => (float[N, 2] y) { m = MatMul (x, w) y = Clip (m, lo, hi) }",
        w=np.eye(2, dtype=np.float32), lo=np.float32(0), hi=np.float32(6),
    )  # fmt: skip
    places = sites(model)
    limits = bounds(model, places, observe(model, [{"x": np.array([[2, -5]], np.float32)}], places, [None]))
    made = insert(model, limits, forms(places, "clamp"))
    assert [node.op_type for node in made.graph.node] == ["MatMul", "Clip"]
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Clip"]
    assert answer(model, [[9, 1]]).tolist() == [[6, 1]]  # the source stays as it is
    assert answer(made, [[9, -1]]) == pytest.approx(np.array([[2, 0]]), abs=3 * MARGIN)
    assert answer(made, [[0, -1]]).tolist() == [[0, 0]]


def test_sites_of_gated_linear_and_saturated_layers():
    model = parse(
        """g (float[N, 2] x) => (float[N, 2] y) {
            m = MatMul (x, w)
            k = Mul (m, gain)
            g = Sigmoid (k)
            q = Mul (m, g)
            d = MatMul (q, w)
            r = Add (d, x)
            e = MatMul (r, w)
            f = QuantizeLinear (e, gain, nil)
            y = DequantizeLinear (f, gain, nil)
        }""",
        w=np.eye(2, dtype=np.float32), gain=np.float32(1.702), nil=np.uint8(0),
    )  # fmt: skip
    assert sites(model) == [Site("q", -1, True), Site("d", -1, False)]


def test_rows_of_a_dequantized_table_are_one_site():
    model = parse(
        """g (int64[N] x) => (float[N, 2] y) {
            r = Gather (table, x)
            c = Cast <to = 1> (r)
            s = Gather (steps, x)
            y = Mul (c, s)
        }""",
        table=np.ones((3, 2), np.int8), steps=np.ones((3, 1), np.float32),
    )  # fmt: skip
    assert [site.tensor for site in sites(model)] == ["y"]


def test_stored_numbers_keep_their_values_and_their_kinds():
    model = two()
    made, count = stored(model)
    assert count == 3
    assert (bounded(model), bounded(made)) == (False, True)
    assert kinds(made) == kinds(model)
    for feed in FEEDS:
        np.testing.assert_array_equal(answer(made, feed["x"]), answer(model, feed["x"]))
    assert stored(model, matrices=False)[1] == 1


@pytest.mark.parametrize(("broken", "expected"), [(np.inf, 0.5), (-3e38, 0), (np.nan, 0.25)])
def test_a_broken_bias_is_within_the_range_of_its_tensor(broken, expected):
    made, _ = stored(two())
    tensor = next(tensor for tensor in made.graph.initializer if tensor.name == "b")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([broken, 0.5], np.float32), "b"))
    assert answer(made, [[1, 0]])[0] == pytest.approx([2 * (1 + expected), 0.5])


def test_the_bounds_are_initializers():
    made = insert(two(), {"r": bound(0, 3)}, {"r": "zero"})
    names = {tensor.name for tensor in made.graph.initializer}
    assert {"r" + LOW, "r" + HIGH} <= names


def test_a_layer_with_nan_has_no_bound():
    model = two()
    with pytest.raises(ExportError, match="tensor 'r' holds NaN or infinity on calibration input 1"):
        observe(model, [{"x": np.array([[np.inf, 0]], np.float32)}], sites(model), [None])
