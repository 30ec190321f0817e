"""Quantized graphs -> our operators. The oracle is the quantized graph itself, run by ONNX Runtime. A graph that must
not be rewritten is checked by the reason in `missed`."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import parser

from calmclip.export import rewrites
from calmclip.export.graph import activation_products
from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import QUANTIZERS, smooth
from calmclip.export.towers.attention import Softmax
from calmclip.export.trace import to_onnx
from calmclip.models.ops.library import find
from calmclip.models.ops.spec import DOMAIN
from tests.towers import KINDS, feeds_of, state_of, tower_of

QUANT = tuple(name for name in rewrites.swaps() if name.startswith("quant_"))


@pytest.fixture(params=["functions", "library"])
def way(request):
    """The op library, or None for the functions that a graph carries."""
    return request.getfixturevalue("library") if request.param == "library" else None


@cache
def traced(kind, softmax=None, gate="none"):
    """-> the float graph, and feeds."""
    torch.manual_seed(0)
    tower = tower_of(kind, state_of(kind, gate), softmax)
    return to_onnx(tower), feeds_of(tower, 6)


@cache
def case(kind, quantizer, softmax=None, gate="none"):
    """-> the quantized graph, the same graph after the rewrites, and feeds."""
    model, feeds = traced(kind, softmax, gate)
    how = QUANTIZERS.get(quantizer)
    params = how.params()
    quantized = how.quantize(model, how.observe(model, feeds, params), params)
    return quantized, rewrites.apply(quantized, rewrites.swaps()), feeds


def cosine(first, other):
    a, b = (np.concatenate([array.ravel() for array in side]).astype(np.float64) for side in (first, other))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def answers(model, feeds, library=None):
    run = onnx_run(model, threads=1, library=library)
    return [run(feed)["features"] for feed in feeds]


# by hand: two blocks, each with qkv, attention, out, up and down; in the last block for one token q is separate from k
# and v; the last projection, out and down answer float
COUNTS = {
    "bert": {"QuantAttention": 2, "QuantLayerNorm": 4, "QuantLinear": 4, "QuantLinearToFloat": 5},
    "opt": {"QuantAttention": 2, "QuantLayerNorm": 4, "QuantLinear": 4, "QuantLinearToFloat": 5},
    "vit": {"QuantAttention": 2, "QuantLayerNorm": 5, "QuantLinear": 6, "QuantLinearToFloat": 5, "QuantPatches": 1},
    "clip": {"QuantAttention": 2, "QuantLayerNorm": 5, "QuantLinear": 5, "QuantLinearToFloat": 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_of_a_tower_becomes_an_op(kind):
    _, done, _ = case(kind, "fast")
    assert done.ops() == COUNTS[kind]
    standard = {node.op_type for node in done.model.graph.node if node.domain != DOMAIN}
    assert not standard & {"MatMul", "Gemm", "Conv", "Softmax", "Exp", "Split"}


@pytest.mark.parametrize("quantizer", ["fast", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_the_quantized_graph_does(kind, quantizer, way):
    before, done, feeds = case(kind, quantizer)
    assert cosine(answers(before, feeds), answers(done.model, feeds, way)) > 0.9999


def test_a_clipped_softmax_becomes_part_of_attention(way):
    before, done, feeds = case("vit", "fast", Softmax(-0.05, 1.05))
    assert done.ops()["QuantAttention"] == 2
    nodes = [node for node in done.model.graph.node if node.op_type == "QuantAttention"]
    (gamma,) = {a.f for node in nodes for a in node.attribute if a.name == "gamma"}
    assert gamma == np.float32(-0.05)
    assert cosine(answers(before, feeds), answers(done.model, feeds, way)) > 0.9999


def test_gated_attention_does_not_change():
    _, done, _ = case("vit", "fast", None, "all_heads")
    assert done.ops()["Softmax"] == 2
    assert "QuantAttention" not in done.ops()
    assert set(done.missed["quant_attention"].values()) == {
        "its mixture is gated, or not read by one Transpose back alone"
    }


def test_products_of_float_attention_answer_float():
    _, done, _ = case("clip", "static")
    assert done.ops() == {"QuantLayerNorm": 5, "QuantLinear": 2, "QuantLinearToFloat": 8, "Softmax": 2}


def linear(weight="s = {0.5, 0.25}", axis=1, zero="0, 0", more="", y="z", kind="MatMul (a, b)", extra=""):
    """x uint8 [n, 3] times int8 [3, 2]; each parameter replaces a part of the graph."""
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (uint8[n, 3] x) => (float[n, 2] y)
        <float one = {{0.1}}, uint8 mid = {{7}}, int8[3, 2] w = {{1, -2, 3, -4, 5, 127}}, float[2] {weight},
         int8[2] zeros = {{{zero}}}, float[2] bias = {{1.5, -2.5}} {extra}>
        {{
            a = DequantizeLinear (x, one, mid)
            b = DequantizeLinear <axis = {axis}> (w, s, zeros)
            z = {kind}
            {more}
            y = Identity ({y})
        }}
    """)


X = {"x": np.array([[0, 7, 255], [12, 3, 9]], np.uint8)}
GRIDS = "float step = {0.2}, uint8 zero = {100}, float[2] fine = {0.1, 0.3}, uint8[2] zeros8 = {0, 9}"
# nodes that read x [2, 3] and w [3, 2] (a and b dequantized), the outputs, constants
PRODUCTS = {
    "a bias per row": ("y = Gemm (a, b, c)", "float[2, 2] y", "float[2, 1] c = {5, -7}"),
    "a bias for all": ("y = Gemm (a, b, c)", "float[2, 2] y", "float[1] c = {5}"),
    "a sum of a higher rank": ("z = MatMul (a, b) y = Add (z, c)", "float[1, 2, 2] y", "float[1, 1, 2] c = {5, 6}"),
    "a sum per row": ("z = MatMul (a, b) y = Add (z, c)", "float[2, 2] y", "float[2, 1] c = {5, 6}"),
    "a gate of a higher rank": (
        "z = MatMul (a, b) t = Mul (z, c) u = Sigmoid (t) y = Mul (z, u)",
        "float[1, 2, 2] y", "float[1, 1, 1] c = {1.702}"
    ),
    "a Mul that broadcasts a part": (
        "z = MatMul (a, b) u, v = Split <axis = -1> (z, one_each) t = Mul (u, c) y = QuantizeLinear (t, step, zero)"
        " y2 = QuantizeLinear (v, step, zero)",
        "uint8[2, 2] y, uint8[2, 1] y2", "int64[2] one_each = {1, 1}, float[2] c = {2, 3}"
    ),
    "a step beyond float32": (
        "z = MatMul (a, b) t = Mul (z, c) y = QuantizeLinear (t, step, zero)",
        "uint8[2, 2] y", "float[2] c = {1e-40, 1}"
    ),
    "steps along rows": (
        "z = MatMul (a, b) y = QuantizeLinear <axis = 0> (z, fine, zeros8)", "uint8[2, 2] y", "float unused = {0}"
    ),
    "two steps, and float": (
        "z = MatMul (a, b) y = QuantizeLinear (z, step, zero) y2 = QuantizeLinear (z, one, zero)",
        "uint8[2, 2] y, uint8[2, 2] y2, float[2, 2] z", "float unused = {0}"
    ),
    "a weight with two transposed readers": (
        "y = Gemm <transB = 1> (a, turned) y2 = Gemm <transB = 1> (a, turned)",
        "float[2, 2] y, float[2, 2] y2", "float unused = {0}"
    ),
    "a constant of a branch": (
        "y = MatMul (a, b) yes = Constant <value = bool {1}> ()"
        " y2 = If (yes) <then_branch = t () => (float[2] f) {f = Identity (fine)},"
        " else_branch = e () => (float[2] g) {g = Neg (fine)}>",
        "float[2, 2] y, float[2] y2", "float unused = {0}"
    ),
    "a name that the rewrite uses": ("no_residual = MatMul (a, b)", "float[2, 2] no_residual", "float unused = {0}"),
}  # fmt: skip


def same(model, feed):
    """The graph is valid before and after the rewrites, with the same answers -> the rewritten graph."""
    onnx.checker.check_model(model)
    done = rewrites.apply(model, rewrites.swaps())
    onnx.checker.check_model(done.model)
    expected = onnx_run(model)(feed)
    for library in (None, find()):
        answers = onnx_run(done.model, library=library)(feed)
        for name, value in expected.items():
            assert (answers[name].shape, answers[name].dtype) == (value.shape, value.dtype)
            near = 1 if value.dtype == np.uint8 else 1e-4  # next to a tie, a step
            np.testing.assert_allclose(answers[name].astype(float), value, rtol=1e-5, atol=near)
    return done


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_answers_the_same(name):
    nodes, outputs, more = PRODUCTS[name]
    same(parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (uint8[2, 3] x) => ({outputs})
        <float one = {{0.1}}, uint8 mid = {{7}}, int8[3, 2] w = {{1, -2, 3, -4, 5, 127}}, float[2] s = {{0.5, 0.25}},
         int8[2] zeros = {{0, 0}}, int8[2, 3] wt = {{1, 3, 5, -2, -4, 127}}, {GRIDS}, {more}>
        {{
            a = DequantizeLinear (x, one, mid)
            b = DequantizeLinear <axis = 1> (w, s, zeros)
            turned = DequantizeLinear <axis = 0> (wt, s, zeros)
            {nodes}
        }}
    """), X)  # fmt: skip


HALF = "fine16 = Cast <to = 10> (one) s16 = Cast <to = 10> (s) a16 = DequantizeLinear (x, fine16, mid) "
LEFT = {
    "a product in half precision": (
        HALF + "b16 = DequantizeLinear <axis = 1> (w, s16, zeros) y = MatMul (a16, b16)", "float16[2, 2] y"
    ),
    "an input with an empty name for its zero point": (
        'a0 = DequantizeLinear (x, one, "") y = MatMul (a0, b)', "float[2, 2] y"
    ),
    "a weight of step 0": (
        "b0 = DequantizeLinear <axis = 1> (w, no, zeros) y = MatMul (a, b0)", "float[2, 2] y"
    ),
    "a weight whose step is negative": (
        "b0 = DequantizeLinear <axis = 1> (w, under, zeros) y = MatMul (a, b0)", "float[2, 2] y"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_the_ops_do_not_take_does_not_change(name):
    """The ops take float32 and positive normal steps; the op library would refuse another graph."""
    nodes, outputs = LEFT[name]
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (uint8[2, 3] x) => ({outputs})
        <float one = {{0.1}}, uint8 mid = {{7}}, int8[3, 2] w = {{1, -2, 3, -4, 5, 127}}, float[2] s = {{0.5, 0.25}},
         int8[2] zeros = {{0, 0}}, float[2] no = {{0.5, 0}}, float[2] under = {{0.5, -0.25}}>
        {{
            a = DequantizeLinear (x, one, mid)
            b = DequantizeLinear <axis = 1> (w, s, zeros)
            {nodes}
        }}
    """)
    assert not same(model, X).ops()


def test_a_norm_in_half_precision_does_not_change():
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float16[2, 4] x, float16[4] w, float16 step) => (uint8[2, 4] y)
        <uint8 zero = {100}> { z = LayerNormalization (x, w, w) y = QuantizeLinear (z, step, zero) }
    """)
    x, w = (np.random.default_rng(0).normal(size=shape).astype(np.float16) for shape in ((2, 4), 4))
    assert not same(model, {"x": x, "w": w, "step": np.array(0.05, np.float16)}).ops()


def test_a_subnormal_step_is_read_in_float():
    done = same(linear(more="q = QuantizeLinear (z, s0, mid) r = DequantizeLinear (q, one, mid)", y="r",
                       extra=", float s0 = {1e-39}"), X)  # fmt: skip
    assert done.ops() == {"QuantLinearToFloat": 1}


def heads(q="2, 3, 8", k="2, 5, 8", mask="1", apart="0, -1, 2, 4", outputs="", twice=False, back=None):
    """Quantized attention of 2 heads of 4; ``twice``: a second one of the same k and v; ``back``: other scales that
    dequantize some of the factors."""
    read = {"q": "step, mid", "k": "step, none", "v": "step, none", "p": "fine, nil"} | (back or {})
    again = """
        more_logits = MatMul (qb, kb) p2 = Softmax (more_logits) p28 = QuantizeLinear (p2, fine, nil)
        p2b = DequantizeLinear (p28, fine, nil) m2 = MatMul (p2b, vb) m2t = Transpose <perm = [0, 2, 1, 3]> (m2)
        m2r = Reshape (m2t, rows) y2 = QuantizeLinear (m2r, step, mid)
    """
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[{q}] q, float[{k}] k, float[2, 5, 8] v, float[{mask}] mask) => (uint8[B, T, 8] y {outputs})
        <float step = {{0.03}}, uint8 mid = {{128}}, int8 none = {{0}}, float fine = {{0.00392157}}, uint8 nil = {{0}},
         float twice = {{0.06}}, uint8 low = {{100}},
         int64[4] apart = {{{apart}}}, int64[4] plain = {{0, -1, 2, 4}}, int64[3] rows = {{2, -1, 8}}>
        {{
            q4 = Reshape (q, apart) k4 = Reshape (k, plain) v4 = Reshape (v, plain)
            qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 3, 1]> (k4)
            vt = Transpose <perm = [0, 2, 1, 3]> (v4)
            q8 = QuantizeLinear (qt, step, mid) k8 = QuantizeLinear (kt, step, none)
            v8 = QuantizeLinear (vt, step, none) qb = DequantizeLinear (q8, {read["q"]})
            kb = DequantizeLinear (k8, {read["k"]})
            vb = DequantizeLinear (v8, {read["v"]})
            logits = MatMul (qb, kb) masked = Add (logits, mask) p = Softmax (masked)
            p8 = QuantizeLinear (p, fine, nil) pb = DequantizeLinear (p8, {read["p"]})
            m = MatMul (pb, vb) mt = Transpose <perm = [0, 2, 1, 3]> (m) mr = Reshape (mt, rows)
            y = QuantizeLinear (mr, step, mid)
            {again if twice else ""}
        }}
    """)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"mask": "3, 5"}, 1),
        ({"mask": "2, 1, 1, 5"}, 1),
        ({"mask": "2, 3, 1"}, 1),  # of each head
        ({"mask": "5"}, 0),
        ({"mask": "1"}, 0),
        ({"q": "1, 3, 8"}, 0),  # one q for all of the batch
        ({"q": "1, 6, 8", "apart": "2, 3, 2, 4", "mask": "3, 5"}, 1),  # windows
        ({"mask": "3, 5", "outputs": ", float[2, 2, 3, 5] p"}, 0),
        ({"mask": "3, 5", "outputs": ", uint8[B, T, 8] y2", "twice": True}, 2),
        # dequantized with another scale (a multiplication) or zero point (a shift)
        ({"mask": "3, 5", "back": {"q": "twice, mid"}}, 0),
        ({"mask": "3, 5", "back": {"q": "step, low"}}, 0),
        ({"mask": "3, 5", "back": {"k": "twice, none"}}, 0),
        ({"mask": "3, 5", "back": {"v": "twice, none"}}, 0),
        ({"mask": "3, 5", "back": {"p": "step, nil"}}, 0),
    ],
)
def test_attention_answers_the_same(changes, count):
    random, model = np.random.default_rng(0), heads(**changes)
    sides = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    feed = {name: random.normal(size=shape).astype(np.float32) for name, shape in sides.items()}
    assert same(model, feed).ops().get("QuantAttention", 0) == count


_APART = "x4 = Reshape (x, apart)"
_QKV = """q = Transpose <perm = [0, 2, 1, 3]> (x4) k = Transpose <perm = [0, 2, 3, 1]> (x4)
    v = Transpose <perm = [0, 2, 1, 3]> (x4)"""
_MIX = "logits = MatMul (q, k) p = Softmax (logits) m = MatMul (p, v)"
_CHANGED = "logits = MatMul (q, k) seen = {} p = Softmax (seen) m = MatMul (p, v)"
_ROWS = "back = Transpose <perm = [0, 2, 1, 3]> (m) flat = Reshape (back, rows)"
_OUT = "y = MatMul (flat, w)"
_PART = """{0}s = Slice (t5, at{1}, at{2}, at0) {0} = Squeeze ({0}s, at0)"""
# a float graph of x [2, 5, 24] or [2, 5, 8]: 2 heads of 4 -> width of x, nodes, and the standard ops that must be gone
FUSED = {
    "rows": (8, [_APART, _QKV, _MIX, _ROWS, _OUT], "Exp Softmax MatMul"),
    "norms of each head": (8, [_APART, """
        n = LayerNormalization (x4, gain) again = Reshape (n, apart)
        q = Transpose <perm = [0, 2, 1, 3]> (again) k = Transpose <perm = [0, 2, 3, 1]> (n)
        v = Transpose <perm = [0, 2, 1, 3]> (x4)""", _MIX, _ROWS, _OUT], "Exp Softmax MatMul"),
    "positions that rotate": (8, [_APART, """
        v = Transpose <perm = [0, 2, 1, 3]> (x4) turned = Mul (v, cosines) one, other = Split <axis = -1> (v, halves)
        across = Concat <axis = -1> (other, one) q = Add (turned, across)
        k = Transpose <perm = [0, 1, 3, 2]> (q)""", _MIX, _ROWS, _OUT], "Exp Softmax MatMul"),
    "parts of one product": (24, ["""
        x5 = Reshape (x, five) t5 = Transpose <perm = [2, 0, 3, 1, 4]> (x5)""",
        _PART.format("part", 0, 1), _PART.format("keys", 1, 2), _PART.format("v", 2, 3), """
        q = Mul (part, half) k = Transpose <perm = [0, 1, 3, 2]> (keys)""", _MIX, _ROWS, _OUT],
        "Exp Softmax MatMul Transpose Slice Squeeze Mul"),
    "a part beside another": (24, ["""
        x5 = Reshape (x, five) t5 = Transpose <perm = [2, 0, 3, 1, 4]> (x5)""",
        _PART.format("q", 0, 1), _PART.format("v", 2, 3), """
        k = Transpose <perm = [0, 1, 3, 2]> (q)""", _MIX, _ROWS, _OUT], "Exp Softmax MatMul Squeeze"),
    "a norm behind it": (8, [_APART, _QKV, _MIX, _ROWS, """
        normed = LayerNormalization (flat, wide_gain) y = MatMul (normed, w)"""], "Exp Softmax MatMul"),
    "a second reader": (8, [_APART, _QKV, _MIX, _ROWS, "z = MatMul (flat, w) r = Sigmoid (flat) t = MatMul (r, w)"
        "y = Add (z, t)"], "Exp Softmax MatMul"),
}  # fmt: skip
UNFIT = {
    "a gate": [_APART, _QKV, _MIX, "g = Mul (m, half)", _ROWS.replace("(m)", "(g)"), _OUT],
    "a mask of columns": [_APART, _QKV, _CHANGED.format("Add (logits, columns)"), _ROWS, _OUT],
    "a temperature": [_APART, _QKV, _CHANGED.format("Mul (logits, half)"), _ROWS, _OUT],
    "a query for all": [_APART, _QKV.replace("q =", "qs ="), "q = Slice (qs, at0, at1, at0)", _MIX, _ROWS, _OUT],
}  # fmt: skip


def attention(nodes, width=8):
    """A float graph, and feeds for it."""
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2, 5, {width}] x) => (float[2, 5, 3] y)
        <int64[4] apart = {{0, -1, 2, 4}}, int64[3] rows = {{0, -1, 8}}, int64[5] five = {{0, -1, 3, 2, 4}},
         int64[1] at0 = {{0}}, int64[1] at1 = {{1}}, int64[1] at2 = {{2}}, int64[1] at3 = {{3}},
         int64[2] halves = {{2, 2}}, float half = {{0.5}}, float[4] gain = {{1, -0.5, 1.5, 0.7}},
         float[5] columns = {{0, 1, 0, -1, 0}}>
        {{ {" ".join(nodes)} }}
    """)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}.{number}"
    random = np.random.default_rng(0)
    for name, shape in {"w": (8, 3), "cosines": (5, 4), "wide_gain": (8,)}.items():
        array = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model, [{"x": random.normal(size=(2, 5, width)).astype(np.float32)} for _ in range(6)]


def standard(model):
    return {node.op_type for node in model.graph.node if not node.domain}


@pytest.mark.parametrize("name", FUSED)
def test_attention_of_every_form_becomes_one_op(name):
    width, nodes, gone = FUSED[name]
    model, feeds = attention(nodes, width)
    fast = QUANTIZERS.get("fast")
    quantized = fast.quantize(model, fast.observe(model, feeds, fast.params()), fast.params())
    done = same(quantized, feeds[0])
    assert done.ops()["QuantAttention"] == 1
    assert not standard(done.model) & {*gone.split()}
    before, after = ([onnx_run(m)(feed)["y"] for feed in feeds] for m in (model, done.model))
    assert cosine(before, after) > 0.999


@pytest.mark.parametrize("name", UNFIT)
def test_a_quantizer_does_not_prepare_attention_that_becomes_no_op(name):
    """Its Softmax stays whole, and becomes the op that stands for a Softmax."""
    model, feeds = attention(UNFIT[name])
    fast = QUANTIZERS.get("fast")
    quantized = fast.quantize(model, fast.observe(model, feeds, fast.params()), fast.params())
    assert "Softmax" in standard(quantized)
    done = same(quantized, feeds[0])
    assert (done.ops()["Softmax"], "QuantAttention" in done.ops()) == (1, False)
    rewrites.require(done, {"Softmax": 1}, "image in INT8")


def test_attention_whose_logits_stay_in_float_keeps_its_softmax():
    model, feeds = attention(FUSED["rows"][1])
    scoring, mixing = (node.name for node in activation_products(model))
    for attending in ((mixing,), (scoring,)):
        params = smooth.Params(attention=attending)
        quantized = smooth.quantize(model, smooth.observe(model, feeds, params), params)
        assert same(quantized, feeds[0]).ops()["Softmax"] == 1


def test_attention_before_a_product_in_float_becomes_an_op():
    """The op answers in 8 bits, also if the product that reads the answer stays in float."""
    model, feeds = attention(FUSED["rows"][1])
    fast = QUANTIZERS.get("fast")
    params = fast.params(keep=(model.graph.node[-1].name,))
    done = same(fast.quantize(model, fast.observe(model, feeds, params), params), feeds[0])
    assert done.ops() == {"QuantAttention": 1}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"rows": "-1, 3, 4"}, None),
        ({"pixels": "coarse, low"}, "its pixels are dequantized in other steps than they are quantized in"),
        ({"answer": "fine, mid"}, "its result is dequantized in other steps than it is quantized in"),
        ({"answer": "coarse, low"}, "its result is dequantized in other steps than it is quantized in"),
        ({"written": "late, mid", "answer": "late, mid"}, "the steps of its result are computed by nodes"),
        ({"rows": "4, 3, 2"}, "its places do not become rows"),  # half a picture per row
        ({"rows": "1, 3, 8"}, "its places do not become rows"),
    ],
)
def test_patches_answer_the_same(changes, why):
    """A convolution of 2 x 2 on pictures of 4 x 4; ``pixels``, ``answer``: the scales that dequantize them."""
    how = {"pixels": "fine, low", "written": "coarse, mid", "answer": "coarse, mid", "rows": "0, 3, -1"} | changes
    random = np.random.default_rng(0)
    w = ", ".join(str(number) for number in random.integers(-127, 128, 36))
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2, 3, 4, 4] x) => (float[B, P, 3] y)
        <float fine = {{0.02}}, uint8 low = {{100}}, float coarse = {{0.3}}, uint8 mid = {{128}},
         int8[3, 3, 2, 2] w = {{{w}}}, float[3] s = {{0.01, 0.02, 0.03}}, int8[3] zeros = {{0, 0, 0}},
         int64[3] rows = {{{how["rows"]}}}>
        {{
            x8 = QuantizeLinear (x, fine, low) xb = DequantizeLinear (x8, {how["pixels"]})
            wb = DequantizeLinear <axis = 0> (w, s, zeros) z = Conv <strides = [2, 2], kernel_shape = [2, 2]> (xb, wb)
            late = Constant <value = float {{0.3}}> ()
            z8 = QuantizeLinear (z, {how["written"]}) zb = DequantizeLinear (z8, {how["answer"]})
            flat = Reshape (zb, rows) y = Transpose <perm = [0, 2, 1]> (flat)
        }}
    """)
    model.graph.node[3].name = "Conv"
    done = same(model, {"x": random.normal(size=(2, 3, 4, 4)).astype(np.float32)})
    assert done.counts["quant_patches"] == (why is None)
    assert (done.missed.get("quant_patches") or {"Conv": ""})["Conv"].startswith(why or "")


def test_a_norm_with_one_weight_for_all_columns_does_not_change():
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2, 4] x) => (uint8[2, 4] y)
        <float[1] w = {2}, float[1] b = {1}, float step = {0.05}, uint8 zero = {100}>
        { z = LayerNormalization (x, w, b) y = QuantizeLinear (z, step, zero) }
    """)
    done = same(model, {"x": np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)})
    assert set(done.missed["quant_layer_norm"].values()) == {
        "its weight or bias does not have a number for each column"
    }


@pytest.mark.parametrize(
    "steps",
    [
        "step = Constant <value = float {0.05}> ()",  # between the sum, which the op replaces, and its reader
        "size = Abs (z) most = ReduceMax <keepdims = 0> (size) step = Mul (most, part)",  # from the op's result
    ],
)
def test_a_norm_with_steps_computed_after_it_does_not_change(steps):
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[2, 4] x, float[2, 4] r) => (uint8[2, 4] y, float[2, 4] z)
        <float[4] w = {{1, 2, 3, 4}}, float[4] b = {{0, 1, 0, 1}}, float part = {{0.01}}, uint8 zero = {{100}}>
        {{ sum = Add (x, r) z = LayerNormalization (sum, w, b) {steps} y = QuantizeLinear (z, step, zero) }}
    """)
    x, r = np.random.default_rng(0).normal(size=(2, 2, 4)).astype(np.float32)
    done = same(model, {"x": x, "r": r})
    (why,) = done.missed["quant_layer_norm"].values()
    assert "its steps are computed by nodes" in why


def test_a_product_by_hand():
    """(x - 7) 0.1 times w times 0.5 and 0.25, plus the bias."""
    done = rewrites.apply(linear(more="t = Add (z, bias)", y="t"), QUANT)
    assert done.ops() == {"QuantLinearToFloat": 1}
    w = np.array([[1, -2], [3, -4], [5, 127]])
    expected = (X["x"].astype(int) - 7) @ w * 0.1 * [0.5, 0.25] + [1.5, -2.5]
    for library in (None, find()):
        np.testing.assert_allclose(onnx_run(done.model, library=library)(X)["y"], expected, rtol=1e-6)


def test_a_division_before_quantization_becomes_part_of_the_steps():
    extra = ", float[2] part = {0.5, 4.0}, float step = {0.2}, uint8 zero = {100}"
    more = "t = Add (z, bias) d = Mul (t, part) q = QuantizeLinear (d, step, zero) r = DequantizeLinear (q, step, zero)"
    done = rewrites.apply(linear(more=more, y="r", extra=extra), QUANT)
    (node,) = [n for n in done.model.graph.node if n.domain == DOMAIN]
    assert node.op_type == "QuantLinear"
    steps = {i.name: onnx.numpy_helper.to_array(i) for i in done.model.graph.initializer}[node.input[6]]
    np.testing.assert_array_equal(steps, np.float32([0.4, 0.05]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"axis": 0, "weight": "s = {0.5, 0.25}", "kind": "Gemm <transB = 0> (a, b)"}, "a scale for each input"),
        ({"zero": "0, 1"}, "its weight has a zero point that is not 0"),
        ({"kind": "Gemm <alpha = 2.0> (a, b)"}, "its alpha or beta is not 1"),
    ],
)
def test_the_report_says_what_the_op_does_not_do(changes, why):
    done = rewrites.apply(linear(**changes), QUANT)
    assert not done.ops()
    assert why in " ".join(" ".join(where.values()) for where in done.missed.values())


def test_uniform_rows_beside_a_peaked_one_keep_their_weights():
    """600 keys: one row has equal weights, another a single weight. In steps of 1/255 the equal weights would be 0."""
    random, keys, d = np.random.default_rng(0), 600, 16
    k = np.zeros((1, keys, d), np.float32)
    k[0, 0, 0] = 8.0
    v = random.normal(size=(1, keys, d)).astype(np.float32) + 1
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[1, 2, {d}] q, float[1, {keys}, {d}] k, float[1, {keys}, {d}] v) => (float[1, 2, 2] y)
        <int64[4] heads = {{0, -1, 1, {d}}}, int64[3] rows = {{0, -1, {d}}}, float[{d}, 2] w>
        {{
            q4 = Reshape (q, heads) k4 = Reshape (k, heads) v4 = Reshape (v, heads)
            qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 3, 1]> (k4)
            vt = Transpose <perm = [0, 2, 1, 3]> (v4)
            logits = MatMul (qt, kt) p = Softmax (logits) m = MatMul (p, vt)
            back = Transpose <perm = [0, 2, 1, 3]> (m) flat = Reshape (back, rows)
            y = MatMul (flat, w)
        }}
    """)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}.{number}"
    w = random.normal(size=(d, 2)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    q = np.zeros((1, 2, d), np.float32)
    q[0, 1, 0] = 2.0
    feeds = [{"q": q, "k": k, "v": v}]
    fast = QUANTIZERS.get("fast")
    quantized = fast.quantize(model, fast.observe(model, feeds, fast.params()), fast.params())
    e = np.exp(np.array([[0.0] * keys, [16.0] + [0.0] * (keys - 1)]))
    expected = (e / e.sum(1, keepdims=True)) @ v[0].astype(np.float64) @ w
    done = rewrites.apply(quantized, rewrites.swaps())
    assert done.ops()["QuantAttention"] == 1
    model.graph.output.append(onnx.helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, [1, 1, 2, keys]))
    observed = fast.quantize(model, fast.observe(model, feeds, fast.params()), fast.params())
    probabilities = onnx_run(observed)(feeds[0])["p"]
    np.testing.assert_allclose(probabilities[0, 0], e / e.sum(1, keepdims=True), atol=0.05)
    for graph, library in ((quantized, None), (done.model, None), (done.model, find())):
        answers = onnx_run(graph, library=library)(feeds[0])["y"][0]
        assert np.abs(answers - expected).max() < 0.02 * np.abs(expected).max()


def test_nothing_of_a_float_graph_changes():
    model, _ = traced("vit")
    assert not rewrites.apply(model, QUANT).ops()
    assert len(activation_products(model)) == 4
