"""Functions of one 8-bit tensor -> tables. The oracle is the graph before the rule, run by ONNX Runtime on every byte;
for some functions, also the function in Python's float64."""

import math

import numpy as np
import onnx
import pytest
from onnx import parser

from calmclip.export import rewrites
from calmclip.export.parity import onnx_run
from calmclip.export.rewrites.quant_lookup import POINTWISE
from calmclip.models.ops.library import find
from tests.export.rewrites.quantized import kinds

STEP, MID, FINE, LOW = np.float32(0.05), 117, np.float32(0.03), 21
_GRIDS = """<float step = {0.05}, uint8 mid = {117}, float fine = {0.03}, uint8 low = {21}, int8 mid8 = {-3},
    float two = {2.0}, float half = {0.5}, float[1] one = {1.0}, float[1, 1] square = {1.5}, float[3] three = {1, 2, 3},
    float[1] steps = {0.05}, uint8[1] mids = {117}, float[7] column_steps = {0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1},
    uint8[7] column_mids = {1, 1, 1, 1, 1, 1, 1}>"""
X = np.arange(37 * 7).astype(np.uint8).reshape(37, 7)  # every byte


def graph(nodes, x="uint8[r, 7] x", y="uint8[r, 7] y", more="", start="a = DequantizeLinear (x, step, mid)"):
    """``nodes`` from a, x in float, to y."""
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g ({x}{more}) => ({y}) {_GRIDS} {{ {start} {nodes} }}
    """)


def end(nodes):
    """Quantizes z."""
    return f"{nodes} y = QuantizeLinear (z, fine, low)"


def table_of(done):
    (node,) = [node for node in done.model.graph.node if node.op_type == "QuantLookup"]
    held = {tensor.name: tensor for tensor in done.model.graph.initializer}
    return onnx.numpy_helper.to_array(held[node.input[1]])


_SPECIAL = {
    "Add": "z = Add (two, a)", "Clip": "z = Clip (a, half, two)", "Div": "z = Div (two, a)", "Max": "z = Max (a, half)",
    "Min": "z = Min (a, half)", "Mul": "z = Mul (a, one)", "Pow": "z = Pow (a, two)", "Sub": "z = Sub (half, a)",
}  # fmt: skip
CHAINS = {name: _SPECIAL.get(name, f"z = {name} (a)") for name in sorted(POINTWISE)} | {
    "SiLU": "s = Sigmoid (a) z = Mul (a, s)",
    "gelu of erf": "d = Mul (a, half) e = Erf (d) f = Add (e, one) g = Mul (a, f) z = Mul (g, half)",
    "gelu of tanh": 'z = Gelu <approximate = "tanh"> (a)',
    "a slope": "z = LeakyRelu <alpha = 0.3> (a)",
    "no lower end": "z = Clip (a, , two)",
    "twice": "b = Relu (a) c = Tanh (b) z = HardSwish (c)",
    "a number of two dimensions": "z = Mul (a, square)",
    "a number of a node": "c = Constant <value_float = 0.7> () z = Mul (c, a)",
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_becomes_a_table_with_the_same_bits(name):
    model = graph(end(CHAINS[name]))
    done = rewrites.apply(model, ["quant_lookup"])
    assert (done.counts, done.missed) == ({"quant_lookup": 1}, {})
    assert [node.op_type for node in done.model.graph.node] == ["QuantLookup"]
    onnx.checker.check_model(done.model, full_check=True)
    expected = onnx_run(model)({"x": X})["y"]
    assert len(np.unique(expected)) > 1
    for library in (None, find()):
        np.testing.assert_array_equal(onnx_run(done.model, library=library)({"x": X})["y"], expected, strict=True)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("Relu", lambda v: max(v, 0.0)),
        ("Gelu", lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2),
        ("SiLU", lambda v: v / (1 + math.exp(-v))),
        ("HardSwish", lambda v: v * min(max(v / 6 + 0.5, 0.0), 1.0)),
        ("a slope", lambda v: v if v > 0 else 0.3 * v),
    ],
)
def test_a_table_is_the_function(name, function):
    table = table_of(rewrites.apply(graph(end(CHAINS[name])), ["quant_lookup"]))
    real = np.array([function((byte - MID) * float(STEP)) / float(FINE) + LOW for byte in range(256)])
    assert np.abs(np.clip(real, 0, 255) - table).max() < 0.501  # a tie may fall either way


# nodes, more outputs, and the op types afterwards
STAYS = {
    "its bytes read elsewhere": ("z = Gelu (a) w = Cast <to = 6> (x)", ", int32[r, 7] w", ["Cast", "QuantLookup"]),
    "its floats read elsewhere": (
        "z = Gelu (a) w = Neg (a)", ", float[r, 7] w", ["DequantizeLinear", "Neg", "QuantLookup"],
    ),
    "its floats an output": ("z = Gelu (a)", ", float[r, 7] a", ["DequantizeLinear", "QuantLookup"]),
    "scales of one number": (
        "b = Gelu (a) c = QuantizeLinear (b, steps, mids) d = DequantizeLinear (c, steps, mids) z = Relu (d)", "",
        ["QuantLookup", "QuantLookup"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_values_that_other_nodes_read_stay(name):
    nodes, outputs, kinds_after = STAYS[name]
    model = graph(end(nodes), y=f"uint8[r, 7] y{outputs}")
    done = rewrites.apply(model, ["quant_lookup"])
    assert sorted(node.op_type for node in done.model.graph.node) == kinds_after
    expected, actual = (onnx_run(version)({"x": X}) for version in (model, done.model))
    for value in expected:
        np.testing.assert_array_equal(actual[value], expected[value], strict=True)


# graph -> why it does not change; "": it is not even a near miss
LEFT = {
    "a value between is an output": (graph(end("z = Gelu (a)"), y="uint8[r, 7] y, float[r, 7] z"), "is used elsewhere"),
    "a value between is read": (
        graph(end("b = Sigmoid (a) z = Mul (a, b) w = Neg (b)"), y="uint8[r, 7] y, float[r, 7] w"), "is used elsewhere",
    ),
    "quantized twice": (
        graph(end("z = Gelu (a) w = QuantizeLinear (z, step, mid)"), y="uint8[r, 7] y, uint8[r, 7] w"),
        "is used elsewhere",
    ),
    "a branch reads one": (
        graph(
            end("z = Gelu (a) yes = Constant <value = bool {1}> () w = If (yes) <then_branch = t () => (float[] f)"
                " {f = Neg (z)}, else_branch = e () => (float[] g) {g = Neg (two)}>"),
            y="uint8[r, 7] y, float[] w",
        ),
        "is used elsewhere",
    ),
    "it reads int8": (
        graph(end("z = Gelu (a)"), x="int8[r, 7] x", start="a = DequantizeLinear (x, step, mid8)"), "is no uint8",
    ),
    "it makes int8": (graph("z = Gelu (a) y = QuantizeLinear (z, fine, mid8)", y="int8[r, 7] y"), "is no uint8"),
    "a scale that is fed": (
        graph(end("z = Gelu (a)"), more=", float fed", start="a = DequantizeLinear (x, fed, mid)"), "is no constant",
    ),
    "a zero point that is fed": (
        graph("z = Gelu (a) y = QuantizeLinear (z, fine, fed)", more=", uint8 fed"), "is no constant",
    ),
    "scales of columns read": (
        graph(end("z = Gelu (a)"), start="a = DequantizeLinear <axis = 1> (x, column_steps, column_mids)"),
        "each column",
    ),
    "scales of columns written": (
        graph("z = Gelu (a) y = QuantizeLinear <axis = 1> (z, column_steps, column_mids)"), "each column",
    ),
    "a number for each column": (graph(end("z = Mul (a, column_steps)")), "that is not one number"),
    "a number that adds a dimension": (
        graph(end("z = Mul (a, square)"), x="uint8[r] x", y="uint8[1, r] y"), "that is not one number",
    ),
    "nothing between": (graph("y = QuantizeLinear (a, fine, low)"), ""),
    "two values": (graph(end("b = DequantizeLinear (w, step, mid) z = Add (a, b)"), more=", uint8[r, 7] w"), ""),
    "a value that is fed": (graph(end("z = Mul (a, w)"), more=", float w"), ""),
    "float before": (graph(end("b = Neg (w) z = Gelu (b)"), more=", float[r, 7] w"), ""),
    "no function of one number": (graph(end("z = Softmax (a)")), ""),
    "an operator of others": (
        parser.parse_model(f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
            g (uint8[r, 7] x) => (uint8[r, 7] y) {_GRIDS} {{ a = DequantizeLinear (x, step, mid)
            z = com.microsoft.Gelu (a) {end("")} }}"""), "",
    ),
    "a constant": (
        graph(end("b = DequantizeLinear (mids, step, mid) z = Gelu (b) w = Neg (a)"), y="uint8[1] y, float[r, 7] w"),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_other_graphs_do_not_change_and_the_report_says_why(name):
    model, why = LEFT[name]
    done = rewrites.apply(model, ["quant_lookup"])
    assert done.counts == {"quant_lookup": 0}
    assert done.model == model
    assert bool(done.missed) == bool(why)
    assert all(why in reason for reason in done.missed.get("quant_lookup", {}).values())


_PRODUCT = """<float step = {0.05}, uint8 mid = {117}, float[2] steps = {0.01, 0.02}, int8[2] zeros = {0, 0},
    int8[7, 2] w = {1, -2, 3, -4, 5, -6, 7, -8, 9, 10, 11, 12, 13, 14}>"""


@pytest.mark.parametrize(
    ("between", "ops"),
    [
        ("", {"QuantLinear": 1}),
        ("q = QuantizeLinear (p, step, mid) d = DequantizeLinear (q, step, mid)", {"QuantLinear": 1, "QuantLookup": 1}),
    ],
)
def test_a_product_keeps_the_gelu_of_its_epilogue(between, ops):
    """`quant_linear` runs first and takes a Gelu of its float result; this rule needs a Gelu of a quantized tensor."""
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (uint8[r, 7] x) => (uint8[r, 2] y) {_PRODUCT}
        {{ a = DequantizeLinear (x, step, mid) b = DequantizeLinear <axis = 1> (w, steps, zeros)
           p = MatMul (a, b) {between} z = Gelu ({"d" if between else "p"}) y = QuantizeLinear (z, step, mid) }}
    """)
    done = rewrites.apply(model, rewrites.swaps())
    assert done.ops() == ops
    (product,) = [node for node in done.model.graph.node if node.op_type == "QuantLinear"]
    assert next(a.i for a in product.attribute if a.name == "activation") == (0 if between else 2)  # of ACTIVATIONS


def test_each_function_has_a_table_of_its_own():
    """The first and the last of three are the same function with other steps."""
    nodes = """z = Gelu (a) z8 = QuantizeLinear (z, step, mid) b = DequantizeLinear (z8, step, mid) s = Sigmoid (b)
        s8 = QuantizeLinear (s, fine, low) c = DequantizeLinear (s8, fine, low) t = Gelu (c)
        y = QuantizeLinear (t, fine, mid)"""
    model = graph(nodes)
    done = rewrites.apply(model, ["quant_lookup"])
    assert done.ops() == {"QuantLookup": 3}
    assert len({node.input[1] for node in done.model.graph.node}) == 3
    np.testing.assert_array_equal(*(onnx_run(version)({"x": X})["y"] for version in (done.model, model)))


def convolutions(weight):
    """Two convolutions of 1 x 1 with a quantized Gelu between them; their weight is int8 or float."""
    back = "DequantizeLinear (kernel, step, nil)" if weight == "int8" else "Identity (real)"
    return parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[b, 4, 6, 5] x) => (float[b, 4, 6, 5] y)
        <float step = {{0.05}}, uint8 mid = {{117}}, int8 nil = {{0}}, float fine = {{0.03}}, uint8 low = {{21}},
         int8[4, 4, 1, 1] kernel = {{1, -20, 30, -4, 5, -6, 70, -8, 9, 10, -11, 12, 13, 14, 15, 16}},
         float[4, 4, 1, 1] real = {{1, -2, 3, -4, 5, -6, 7, -8, 9, 1, -1, 1, 1, 1, 1, 1}}>
        {{ x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
           w = {back} c = Conv (xb, w) c8 = QuantizeLinear (c, step, mid) cb = DequantizeLinear (c8, step, mid)
           z = Gelu (cb) z8 = QuantizeLinear (z, fine, low) zb = DequantizeLinear (z8, fine, low)
           d = Conv (zb, w) d8 = QuantizeLinear (d, step, mid) y = DequantizeLinear (d8, step, mid) }}
    """)


def test_convolutions_around_it_are_fused_and_transposed_as_before(library, tmp_path):
    """One Transpose before them and one after them, as in ONNX Runtime without the op."""
    model = convolutions("int8")
    done = rewrites.apply(model, ["quant_lookup"])
    assert [n.op_type for n in done.model.graph.node].count("Transpose") == 2
    onnx.checker.check_model(done.model, full_check=True)
    before, after = (kinds(op_library, tmp_path, library) for op_library in (model, done.model))
    assert (before["QLinearConv"], before["Transpose"]) == (2, 2)
    assert (after["QLinearConv"], after["Transpose"], after["QuantLookup"]) == (2, 2, 1)
    x = {"x": np.random.default_rng(0).normal(0, 3, (2, 4, 6, 5)).astype(np.float32)}
    for op_library in (None, library):
        np.testing.assert_array_equal(onnx_run(done.model, library=op_library)(x)["y"], onnx_run(model)(x)["y"])


def test_convolutions_in_float_are_not_transposed():
    done = rewrites.apply(convolutions("float"), ["quant_lookup"])
    assert done.ops() == {"QuantLookup": 1}
    assert not [node for node in done.model.graph.node if node.op_type == "Transpose"]
