"""The contract of every rewrite, each on a graph that holds its pattern."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser
from pydantic import ValidationError

from calmclip.export import rewrites
from calmclip.export.parity import onnx_run
from calmclip.export.rewrites import REWRITES
from calmclip.models.ops.spec import DOMAIN, VERSION

NAMES = REWRITES.names()
_NUMBERS = "<float a = {1.1}, float b = {-0.1}, float low = {0.0}, float high = {1.0}>"
# the steps are powers of two, so nothing is rounded before quantization, and all orders of the sums agree
_INT8 = """<float step = {0.0625}, uint8 mid = {128}, int8 nil = {0}, float fine = {0.00390625}, uint8 low = {0},
    int8[7, 2] w = {1, -2, 3, -4, 5, -6, 7, -8, 9, 10, 11, 12, 13, 14},
    float[2] steps = {0.5, 0.25}, int8[2] zeros = {0, 0},
    float[7] row = {1, 2, 3, 4, 5, 6, 7}, int8[2, 1, 2, 2] kernel = {1, 2, 3, 4, -5, 6, -7, 8},
    int8[2, 1, 1, 1] dot = {3, -2},
    int64[4] apart = {0, -1, 1, 7}, int64[3] together = {0, -1, 7}, int64[3] places = {0, 2, -1}>"""
_ROWS = """<float step = {0.0625}, uint8 mid = {128}, int64[1] last = {-1}, float most = {127.0}, float least = {1e-30},
    float middle = {128.0}, float eps = {0.00001},
    float tiny = {0.0000152587890625}, float cap = {2.0},
    float[7] row = {1, 2, 3, 4, 5, 6, 7}, float[2] steps = {0.5, 0.25},
    int8[7, 2] w = {1, -2, 3, -4, 5, -6, 7, -8, 9, 10, 11, 12, 13, 14}, float[2] bias = {0.5, -0.25},
    int64[4] apart = {0, 0, 1, 8}, int64[3] together = {0, 0, 8}, float[8] gain = {1, 2, 3, 4, 5, 6, 7, 8}>"""
_PRODUCT = """x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
    wb = DequantizeLinear <axis = 1> (w, steps, zeros) z = MatMul (xb, wb)"""
_TURN = "{x}1, {x}2 = Split <axis = -1, num_outputs = 2> ({x}n) {x}c = Mul ({x}n, cos)"
_TURN += " {x}s = Concat <axis = -1> ({x}2, {x}1) {x}t = Mul ({x}s, sin) {x}r = Add ({x}c, {x}t)"
# rule -> a graph on which it fires once, without the header
EXAMPLES = {
    "quant_rows": f"""g (float[r, 7] x) => (float[r, 7] y, float[r, 1] s) {_ROWS}
        {{ q = Mul (x, x) m = ReduceMean (q, last) p = Add (m, eps) o = Sqrt (p) i = Reciprocal (o) u = Mul (x, i)
           n = Mul (u, row) a = Abs (n) t = ReduceMax (a, last) h = Div (t, most) s = Max (h, least) d = Div (n, s)
           w8 = Round (d) v = Add (w8, middle) n8 = Cast <to = 2> (v) y = Cast <to = 1> (n8) }}""",
    "quant_rows_linear": f"""g (float[r, 7] x) => (float[r, 1] y) {_ROWS}
        {{ x8 = QuantizeLinear (x, step, mid) q = Abs (x) h = ReduceMax (q, last) s = Mul (h, tiny)
           i = MatMulInteger (x8, w, mid) f = Cast <to = 1> (i) m = Mul (f, s) z = Mul (m, steps) b = Add (z, bias)
           left, right = Split <axis = 1, num_outputs = 2> (b) g0 = Sigmoid (left) g1 = Mul (left, g0)
           t = Mul (g1, right) r0 = Relu (s) y = Add (t, r0) }}""",
    "rotary_attention": f"""g (float[b, t, 8] x, float[t, 8] cos, float[t, 8] sin, float[t, t] mask)
        => (float[b, t, 8] y) {_ROWS}
        {{ z = Mul (x, step) heads = Reshape (z, apart) qn = Transpose <perm = [0, 2, 1, 3]> (heads)
           kq = Transpose <perm = [0, 2, 1, 3]> (heads) k2s = Mul (kq, kq) km = ReduceMean (k2s, last)
           kp = Add (km, eps) ko = Sqrt (kp) ki = Reciprocal (ko) ku = Mul (kq, ki) kn = Mul (ku, gain)
           {_TURN.format(x="q")} {_TURN.format(x="k")} keys = Transpose <perm = [0, 1, 3, 2]> (kr)
           logits = MatMul (qr, keys) tangent = Tanh (logits) capped = Mul (tangent, cap) seen = Add (capped, mask)
           p = Softmax (seen) v = Transpose <perm = [0, 2, 1, 3]> (heads) m = MatMul (p, v)
           back = Transpose <perm = [0, 2, 1, 3]> (m) y = Reshape (back, together) }}""",
    "softmax": "g (float[r, 7] x) => (float[r, 7] y) { s = Softmax (x) y = Relu (s) }",
    "clipped_softmax": f"""g (float[r, 7] x) => (float[r, 7] y) {_NUMBERS}
        {{ s = Softmax (x) m = Mul (s, a) t = Add (m, b) y = Clip (t, low, high) }}""",
    "image_to_pixels": "g (float[b, 3, 8, 8] pixels) => (float[b, 3, 8, 8] y) { y = Relu (pixels) }",
    "soft_nms": """
        g (float[n, 4] b, float[n] s, int64[n] c) =>
          (float[n, 4] candidate_boxes, float[n] candidate_scores, int64[n] candidate_classes)
        { candidate_boxes = Relu (b) candidate_scores = Sigmoid (s) candidate_classes = Abs (c) }""",
    "quant_linear": f"""g (float[r, 7] x) => (float[r, 2] y) {_INT8}
        {{ {_PRODUCT} z8 = QuantizeLinear (z, step, mid) y = DequantizeLinear (z8, step, mid) }}""",
    "quant_linear_to_float": f"g (float[r, 7] x) => (float[r, 2] y) {_INT8} {{ {_PRODUCT} y = Relu (z) }}",
    "quant_layer_norm": f"""g (float[r, 7] x) => (float[r, 7] y, float[r, 7] n, float[r, 7] s) {_INT8}
        {{ s = Add (x, x) n = LayerNormalization (s, row, row) n8 = QuantizeLinear (n, step, mid)
           y = DequantizeLinear (n8, step, mid) }}""",
    "quant_attention": f"""g (float[b, t, 7] x) => (float[b, t, 7] y) {_INT8}
        {{ heads = Reshape (x, apart) q = Transpose <perm = [0, 2, 1, 3]> (heads)
           k = Transpose <perm = [0, 2, 3, 1]> (heads)
           q8 = QuantizeLinear (q, step, mid) k8 = QuantizeLinear (k, step, nil) v8 = QuantizeLinear (q, step, nil)
           qb = DequantizeLinear (q8, step, mid) kb = DequantizeLinear (k8, step, nil)
           vb = DequantizeLinear (v8, step, nil)
           logits = MatMul (qb, kb) p = Softmax (logits)
           p8 = QuantizeLinear (p, fine, low) pb = DequantizeLinear (p8, fine, low)
           m = MatMul (pb, vb) back = Transpose <perm = [0, 2, 1, 3]> (m) rows = Reshape (back, together)
           rows8 = QuantizeLinear (rows, step, mid) y = DequantizeLinear (rows8, step, mid) }}""",
    "quant_patches": f"""g (float[b, 1, 4, 4] x) => (float[b, 4, 2] y) {_INT8}
        {{ x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
           kb = DequantizeLinear <axis = 0> (kernel, steps, zeros) z = Conv <strides = [2, 2]> (xb, kb)
           z8 = QuantizeLinear (z, step, mid) zb = DequantizeLinear (z8, step, mid)
           flat = Reshape (zb, places) y = Transpose <perm = [0, 2, 1]> (flat) }}""",
    "quant_depthwise": f"""g (float[b, 2, 4, 3] x) => (float[b, 2, 3, 2] y) {_INT8}
        {{ x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
           kb = DequantizeLinear <axis = 0> (kernel, steps, zeros) z = Conv <group = 2> (xb, kb)
           z8 = QuantizeLinear (z, step, mid) y = DequantizeLinear (z8, step, mid) }}""",
    "quant_stem": f"""g (float[b, 1, 4, 4] x) => (float[b, 2, 2, 3] y) {_INT8}
        {{ x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
           kb = DequantizeLinear <axis = 0> (kernel, steps, zeros)
           z = Conv <strides = [2, 1], pads = [1, 0, 0, 0]> (xb, kb)
           z8 = QuantizeLinear (z, step, mid) y = DequantizeLinear (z8, step, mid) }}""",
    "quant_pointwise": f"""g (float[b, 1, 4, 3] x) => (float[b, 2, 4, 3] y) {_INT8}
        {{ x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
           db = DequantizeLinear <axis = 0> (dot, steps, zeros) z = Conv (xb, db)
           z8 = QuantizeLinear (z, step, mid) y = DequantizeLinear (z8, step, mid) }}""",
    "quant_conv": f"""g (float[b, 1, 4, 4] x) => (float[b, 2, 2, 3] y) {_INT8}
        {{ n = Neg (x) x8 = QuantizeLinear (n, step, mid) xb = DequantizeLinear (x8, step, mid)
           kb = DequantizeLinear <axis = 0> (kernel, steps, zeros)
           z = Conv <strides = [2, 1], pads = [1, 0, 0, 0]> (xb, kb)
           z8 = QuantizeLinear (z, step, mid) y = DequantizeLinear (z8, step, mid) }}""",
    "quant_max_pool": f"""g (float[b, 4, 6, 3] x) => (float[b, 3, 4, 6] y) {_INT8}
        {{ x8 = QuantizeLinear (x, step, mid) t = Transpose <perm = [0, 3, 1, 2]> (x8)
           xb = DequantizeLinear (t, step, mid) m = MaxPool <kernel_shape = [2, 3], pads = [0, 1, 1, 1]> (xb)
           m8 = QuantizeLinear (m, step, mid) y = DequantizeLinear (m8, step, mid) }}""",
    "quant_average": f"""g (float[b, 4, 6, 3] x) => (float[b, 3, 2, 2] y) {_INT8}
        {{ x8 = QuantizeLinear (x, step, mid) t = Transpose <perm = [0, 3, 1, 2]> (x8)
           xb = DequantizeLinear (t, step, mid) m = AveragePool <kernel_shape = [2, 4], strides = [2, 2]> (xb)
           m8 = QuantizeLinear (m, fine, mid) y = DequantizeLinear (m8, fine, mid) }}""",
    "quant_add": f"""g (float[r, 7] x) => (float[r, 7] y) {_INT8}
        {{ x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
           r = Relu (x) r8 = QuantizeLinear (r, fine, low) rb = DequantizeLinear (r8, fine, low)
           z = Add (xb, rb) z8 = QuantizeLinear (z, step, mid) y = DequantizeLinear (z8, step, mid) }}""",
    "quant_lookup": f"""g (float[r, 7] x) => (float[r, 7] y) {_INT8}
        {{ x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
           s = Sigmoid (xb) z = Mul (xb, s)
           z8 = QuantizeLinear (z, step, mid) y = DequantizeLinear (z8, step, mid) }}""",
}
PARAMS: dict[str, dict] = {
    "image_to_pixels": {"preprocess": {"size": (8, 8), "shortest": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2)}}
}
SWAPS = [name for name in NAMES if not REWRITES.get(name).attaches]
NOTHING = "g (float[r, 7] x) => (float[r, 7] y) { y = Relu (x) }"


def graph(text: str, opset: int = 20) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')


def applied(name: str, model: onnx.ModelProto) -> rewrites.Applied:
    return rewrites.apply(model, [name], PARAMS)


def test_every_rule_has_an_example():
    assert sorted(EXAMPLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_fires_once_with_the_node_of_the_spec_and_a_body_that_a_plain_runtime_loads(name: str):
    done, op = applied(name, graph(EXAMPLES[name])), REWRITES.get(name).op
    assert (done.counts, done.missed, done.ops()) == ({name: 1}, {}, {op.name: 1})
    model = done.model
    onnx.checker.check_model(model, full_check=True)
    (node,) = [n for n in model.graph.node if n.domain == DOMAIN]
    assert (len(node.input), len(node.output)) == (len(op.inputs), len(op.outputs))
    assert {a.name for a in node.attribute} == set(op.attributes)
    assert node.name
    (function,) = model.functions
    assert (function.domain, function.name) == (DOMAIN, op.name)
    assert (list(function.input), list(function.output)) == (list(op.inputs), list(op.outputs))
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, DOMAIN: VERSION}
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_keeps_inputs_outputs_and_answers_with_and_without_the_library(name: str, library):
    before = graph(EXAMPLES[name])
    after = applied(name, before).model
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    rng = np.random.default_rng(0)
    shapes = {v.name: [side.dim_value or 5 for side in v.type.tensor_type.shape.dim] for v in before.graph.input}
    x = {name: rng.standard_normal(sides).astype(np.float32) * 3 for name, sides in shapes.items()}
    expected = onnx_run(before)(x)
    for op_library in (None, library):
        for value, actual in onnx_run(after, library=op_library)(x).items():
            np.testing.assert_allclose(actual, expected[value], atol=1e-6)


@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_does_not_fire_on_its_own_result(name: str):
    once = applied(name, graph(EXAMPLES[name])).model
    again = applied(name, once)
    assert again.counts == {name: 0}
    assert again.model == once  # the body of the op holds the pattern too, and stays


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_without_its_pattern_is_not_changed(name: str):
    model = graph(NOTHING)
    done = applied(name, model)
    assert done.counts == {name: 0}
    assert done.model == model
    assert bool(done.missed) == REWRITES.get(name).attaches  # a caller asked for it, so it gives a reason


@pytest.mark.parametrize("opset", [12, 17, 18, 19, 20, 22])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_older_than_the_ops_body_is_not_changed_and_the_reason_is_given(name: str, opset: int):
    """A model has one opset: the checker refuses a body of a later opset, and Softmax was another op before 13."""
    model, needs = graph(EXAMPLES[name], opset), 20 if name.startswith("quant_") else 18
    done = applied(name, model)
    assert done.counts == {name: int(opset >= needs)}
    if opset >= needs:
        onnx.checker.check_model(done.model, full_check=True)
    else:
        assert done.model == model
        assert done.missed == {name: {"the graph": f"it is of opset {opset}; the body of the op needs {needs}"}}


@pytest.mark.parametrize("name", NAMES)
def test_the_input_graph_is_not_changed_and_two_runs_give_the_same_bytes(name: str):
    model = graph(EXAMPLES[name])
    before = model.SerializeToString(deterministic=True)
    first, second = (applied(name, model).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", NAMES)
def test_unknown_params_are_refused(name: str):
    with pytest.raises(ValidationError, match="no_such_param"):
        rewrites.apply(graph(NOTHING), [name], {name: {**PARAMS.get(name, {}), "no_such_param": 1}})
