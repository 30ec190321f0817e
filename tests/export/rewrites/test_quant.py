"""Quantized graphs -> our operators. The oracle is the quantized graph itself, run by ONNX Runtime with nothing of ours
in it; what must not be rewritten is checked by the reason that is given."""

from functools import cache

import numpy as np
import onnx
import pytest
from onnx import parser

from export import rewrites
from export.parity import onnx_run
from export.quantizers import QUANTIZERS, _qdq
from export.towers.attention import Softmax
from export.trace import to_onnx
from models.ops.library import find
from models.ops.spec import DOMAIN
from tests.towers import KINDS, feeds_of, state_of, tower_of

QUANT = tuple(name for name in rewrites.swaps() if name.startswith("quant_"))
WAYS = {"functions": None, "library": find()}


@cache
def case(kind, quantizer, softmax=None, gate="none"):
    """-> the quantized graph, what it is with our ops in it, and feeds."""
    import torch

    torch.manual_seed(0)
    tower = tower_of(kind, state_of(kind, gate), softmax)
    model, feeds = to_onnx(tower), feeds_of(tower, 6)
    how = QUANTIZERS.get(quantizer)
    params = how.params()
    made = how.quantize(model, how.observe(model, feeds, params), params)
    return made, rewrites.apply(made, rewrites.swaps()), feeds


def cosine(one, other):
    a, b = (np.concatenate([found.ravel() for found in side]).astype(np.float64) for side in (one, other))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def answers(model, feeds, library=None):
    run = onnx_run(model, threads=1, library=library)
    return [run(feed)["features"] for feed in feeds]


# by hand: two blocks, each with qkv, attention, out, up and down; the last block for one token has q apart from k and
# v; the last projection answers float, and so do out and down
COUNTS = {
    "bert": {"QuantAttention": 2, "QuantLayerNorm": 4, "QuantLinear": 4, "QuantLinearToFloat": 5},
    "opt": {"QuantAttention": 2, "QuantLayerNorm": 4, "QuantLinear": 4, "QuantLinearToFloat": 5},
    "vit": {"QuantAttention": 2, "QuantLayerNorm": 5, "QuantLinear": 6, "QuantLinearToFloat": 5, "QuantPatches": 1},
    "clip": {"QuantAttention": 2, "QuantLayerNorm": 5, "QuantLinear": 5, "QuantLinearToFloat": 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_tower_becomes_ours(kind):
    _, done, _ = case(kind, "fast")
    assert done.ops() == COUNTS[kind]
    left = {node.op_type for node in done.model.graph.node if node.domain != DOMAIN}
    assert not left & {"MatMul", "Gemm", "Conv", "Softmax", "Exp", "Split"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quantizer", ["fast", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_the_quantized_graph_does(kind, quantizer, way):
    if way == "library" and WAYS[way] is None:
        pytest.skip("no op library is built")
    before, done, feeds = case(kind, quantizer)
    assert cosine(answers(before, feeds), answers(done.model, feeds, WAYS[way])) > 0.9999


@pytest.mark.parametrize("way", WAYS)
def test_a_clipped_softmax_goes_in_whole(way):
    if way == "library" and WAYS[way] is None:
        pytest.skip("no op library is built")
    before, done, feeds = case("vit", "fast", Softmax(-0.05, 1.05))
    assert done.ops()["QuantAttention"] == 2
    nodes = [node for node in done.model.graph.node if node.op_type == "QuantAttention"]
    (gamma,) = {a.f for node in nodes for a in node.attribute if a.name == "gamma"}
    assert gamma == np.float32(-0.05)
    assert cosine(answers(before, feeds), answers(done.model, feeds, WAYS[way])) > 0.9999


def test_a_gate_is_left_alone():
    _, done, _ = case("vit", "fast", None, "all_heads")
    assert done.ops()["Softmax"] == 2
    assert "QuantAttention" not in done.ops()
    assert set(done.missed["quant_attention"].values()) == {
        "its mixture is gated, or read otherwise than by one Transpose back"
    }


def test_products_of_float_attention_answer_float():
    _, done, _ = case("clip", "static")
    assert done.ops() == {"QuantLayerNorm": 5, "QuantLinear": 2, "QuantLinearToFloat": 8, "Softmax": 2}


def linear(weight="s = {0.5, 0.25}", axis=1, zero="0, 0", more="", y="z", kind="MatMul (a, b)", extra=""):
    """x uint8 [n, 3] times int8 [3, 2], and what is said of it."""
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


def test_a_product_is_worked_out_as_by_hand():
    """(x - 7) 0.1 times w times 0.5 and 0.25, plus the bias."""
    done = rewrites.apply(linear(more="t = Add (z, bias)", y="t"), QUANT)
    assert done.ops() == {"QuantLinearToFloat": 1}
    w = np.array([[1, -2], [3, -4], [5, 127]])
    expected = (X["x"].astype(int) - 7) @ w * 0.1 * [0.5, 0.25] + [1.5, -2.5]
    for library in {None: None, "library": find()}.values():
        np.testing.assert_allclose(onnx_run(done.model, library=library)(X)["y"], expected, rtol=1e-6)


def test_the_division_before_8_bits_goes_into_the_steps():
    extra = ", float[2] part = {0.5, 4.0}, float step = {0.2}, uint8 zero = {100}"
    more = "t = Add (z, bias) d = Mul (t, part) q = QuantizeLinear (d, step, zero) r = DequantizeLinear (q, step, zero)"
    done = rewrites.apply(linear(more=more, y="r", extra=extra), QUANT)
    (node,) = [n for n in done.model.graph.node if n.domain == DOMAIN]
    assert node.op_type == "QuantLinear"
    steps = {i.name: onnx.numpy_helper.to_array(i) for i in done.model.graph.initializer}[node.input[6]]
    np.testing.assert_array_equal(steps, np.float32([0.4, 0.05]))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"axis": 0, "weight": "s = {0.5, 0.25}", "kind": "Gemm <transB = 0> (a, b)"}, "a scale for each input"),
        ({"zero": "0, 1"}, "its weights are not around 0"),
        ({"kind": "Gemm <alpha = 2.0> (a, b)"}, "it is scaled"),
    ],
)
def test_what_the_op_does_not_do_is_said(given, why):
    done = rewrites.apply(linear(**given), QUANT)
    assert not done.ops()
    assert why in " ".join(" ".join(where.values()) for where in done.missed.values())


def test_uniform_rows_beside_a_peaked_one_keep_their_weights():
    """600 keys: a row looks at all alike, another at one. In steps of 1/255 the first would be nothing."""
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
    made = fast.quantize(model, fast.observe(model, feeds, fast.params()), fast.params())
    e = np.exp(np.array([[0.0] * keys, [16.0] + [0.0] * (keys - 1)]))
    expected = (e / e.sum(1, keepdims=True)) @ v[0].astype(np.float64) @ w
    done = rewrites.apply(made, rewrites.swaps())
    assert done.ops()["QuantAttention"] == 1
    for graph, library in ((made, None), (done.model, None), (done.model, find())):
        found = onnx_run(graph, library=library)(feeds[0])["y"][0]
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_nothing_of_a_float_graph_changes():
    model = to_onnx(tower_of("vit", state_of("vit")))
    assert not rewrites.apply(model, QUANT).ops()
    assert len(_qdq.pairs(model)) == 4
