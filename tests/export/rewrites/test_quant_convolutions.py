"""Quantized convolutions -> the ops QuantPointwise and QuantDepthwise. Cases of both rules are listed once; cases of
one rule are in the tables `…_OF`."""

import numpy as np
import onnx
import pytest
from onnx import helper

from calmclip.export import rewrites
from tests.export.rewrites import quantized
from tests.export.rewrites.quantized import START, kinds, same

RNG = np.random.default_rng(0)
X = {"x": RNG.normal(0, 2, (2, 5, 7, 6)).astype(np.float32)}
POINTWISE, DEPTHWISE = RULES = ("quant_pointwise", "quant_depthwise")
OPS = dict(zip(RULES, ("QuantPointwise", "QuantDepthwise"), strict=True))
CONSTANTS = {
    "step": np.float32(0.05), "mid": np.uint8(117), "fine": np.float32(0.03), "low": np.uint8(21),
    "x_steps": np.linspace(0.02, 0.05, 5).astype(np.float32), "x_mids": np.arange(90, 95).astype(np.uint8),
    "one_step": np.float32(0.003), "one_zero": np.int8(0), "minus": np.array([-1]), "five": np.zeros(5, np.int8),
    "v": RNG.integers(-9, 10, (5, 6, 1, 1), np.int8), "v_step": np.float32(0.03),
    "few": RNG.integers(-9, 10, (5, 1, 1, 1), np.int8),
    "p": RNG.integers(-9, 10, (5, 5, 1, 1), np.int8), "wide": RNG.integers(-9, 10, (6, 5, 3, 3), np.int8),
    "long": RNG.integers(-127, 128, (5, 1, 2, 5), np.int8), "row": RNG.integers(-127, 128, (5, 1, 3), np.int8),
    "two": RNG.integers(-127, 128, (10, 1, 3, 3), np.int8), "dw": RNG.integers(-127, 128, (5, 1, 3, 3), np.int8),
}  # fmt: skip


def constants_of(outputs, weight):
    """Constants for a convolution with ``outputs`` channels."""
    return {
        "w": weight, "w_steps": RNG.uniform(0.002, 0.004, outputs).astype(np.float32),
        "w_zeros": np.zeros(outputs, np.int8), "w_moved": np.full(outputs, 3, np.int8), "outputs": np.array([outputs]),
        "b": RNG.integers(-9000, 9000, outputs).astype(np.int32), "b_steps": np.full(outputs, 2e-4, np.float32),
        "b_zeros": np.zeros(outputs, np.int32), "bias": RNG.normal(0, 1, outputs).astype(np.float32),
        "y_steps": np.linspace(0.02, 0.05, outputs).astype(np.float32),
        "y_mids": np.arange(90, 90 + outputs).astype(np.uint8),
    }  # fmt: skip


CONSTANTS_OF = {
    POINTWISE: constants_of(6, RNG.integers(-127, 128, (6, 5, 1, 1), np.int8)),
    DEPTHWISE: constants_of(5, CONSTANTS["dw"]),
}
W = "wb = DequantizeLinear <axis = 0> (w, w_steps, w_zeros)"
END = "z8 = QuantizeLinear (z, fine, low) y = DequantizeLinear (z8, fine, low)"


def graph(rule, nodes, x="float[b, 5, h, w_]", y="float[b, c, h_, w__]"):
    """``nodes``, in which CONV is the convolution, of ``rule``'s kind."""
    conv = nodes.replace("CONV <", "Conv <group = 5, ").replace("CONV", "Conv <group = 5>")
    text = conv if rule == DEPTHWISE else nodes.replace("CONV", "Conv")
    return quantized.graph(text, f"({x} x) => ({y} y)", CONSTANTS | CONSTANTS_OF[rule])


def cases(both, particular):
    """pytest params of a table: the cases ``both`` for each rule, and each rule's ``particular`` cases."""
    rows = [(rule, name, case) for rule in RULES for name, case in (both | particular[rule]).items()]
    return [pytest.param(rule, case, id=f"{rule}: {name}") for rule, name, case in rows]


FIRES = {
    "plain": f"{START} {W} z = CONV (xb, wb) {END}",
    "a bias": f"{START} {W} z = CONV (xb, wb, bias) {END}",
    "a bias in steps": f"""{START} {W} bb = DequantizeLinear <axis = 0> (b, b_steps, b_zeros)
        z = CONV (xb, wb, bb) {END}""",
}
FIRES_OF = {
    POINTWISE: {
        "one scale": f"""{START} {W} c = Conv (xb, wb) c8 = QuantizeLinear (c, fine, low)
            m = DequantizeLinear (c8, fine, low) vb = DequantizeLinear (v, v_step, one_zero) n = Conv (m, vb)
            n8 = QuantizeLinear (n, step, mid) y = DequantizeLinear (n8, step, mid)""",
    },
    DEPTHWISE: {
        "strides": f"{START} {W} z = CONV <strides = [2, 3]> (xb, wb) {END}",
        "four different pads": f"{START} {W} z = CONV <pads = [1, 0, 2, 3]> (xb, wb) {END}",
        "pads on all sides": f"{START} {W} z = CONV <pads = [1, 1, 1, 1]> (xb, wb) {END}",
        "a window that is not square": f"""{START} wb = DequantizeLinear (long, one_step, one_zero)
            z = CONV (xb, wb) {END}""",
    },
}


@pytest.mark.parametrize(("rule", "nodes"), cases(FIRES, FIRES_OF))
def test_it_becomes_an_op_with_the_same_answers(rule, nodes):
    model = graph(rule, nodes)
    count = sum(node.op_type == "Conv" for node in model.graph.node)
    done = rewrites.apply(model, [rule])
    assert (done.counts, done.missed, done.ops()) == ({rule: count}, {}, {OPS[rule]: count})
    assert not [node for node in done.model.graph.node if node.op_type == "Conv"]
    same(model, done.model, X)


STAYS = {
    "x has a scale per channel": (
        f"""x8 = QuantizeLinear <axis = 1> (x, x_steps, x_mids) xb = DequantizeLinear <axis = 1> (x8, x_steps, x_mids)
        {W} z = CONV (xb, wb) {END}""",
        "its input has a scale for each channel",
    ),
    "y has a scale per channel": (
        f"""{START} {W} z = CONV (xb, wb) z8 = QuantizeLinear <axis = 1> (z, y_steps, y_mids)
        y = DequantizeLinear <axis = 1> (z8, y_steps, y_mids)""",
        "its result has a scale for each channel",
    ),
    "weights with a zero point of 3": (
        f"{START} wb = DequantizeLinear <axis = 0> (w, w_steps, w_moved) z = CONV (xb, wb) {END}",
        "its weight has a zero point that is not 0, or no constant",
    ),
    "a bias that is no constant": (
        f"""{START} {W} m = ReduceMax (x) one = Reshape (m, minus) all = Expand (one, outputs)
        z = CONV (xb, wb, all) {END}""",
        "its bias is no constant",
    ),
    "answers float": (f"{START} {W} y = CONV (xb, wb)", "its result is not quantized, or is read in float too"),
    "an activation": (
        f"{START} {W} c = CONV (xb, wb) z = Gelu (c) {END}",
        "its result is not quantized, or is read in float too",
    ),
    "read twice": (
        f"""{START} {W} z = CONV (xb, wb) z8 = QuantizeLinear (z, fine, low) zb = DequantizeLinear (z8, fine, low)
        y = Add (z, zb)""",
        "its result is not quantized, or is read in float too",
    ),
}
STAYS_OF = {
    POINTWISE: {
        "groups": (
            f"{START} fb = DequantizeLinear (few, v_step, one_zero) z = Conv <group = 5> (xb, fb) {END}",
            "its channels are in groups",
        ),
        "strides": (
            f"{START} {W} z = Conv <strides = [2, 2]> (xb, wb) {END}",
            "it has strides or pads, so its places are not those of its input",
        ),
        "pads": (
            f"{START} {W} z = Conv <pads = [1, 1, 1, 1]> (xb, wb) {END}",
            "it has strides or pads, so its places are not those of its input",
        ),
        "a scale for each input": (
            f"{START} wb = DequantizeLinear <axis = 1> (w, x_steps, five) z = Conv (xb, wb) {END}",
            "its weight has a scale for each input; the op takes one for each output",
        ),
    },
    DEPTHWISE: {
        "two outputs per channel": (
            f"{START} wb = DequantizeLinear (two, one_step, one_zero) z = CONV (xb, wb) {END}",
            "its groups have more than one channel, or more than one output",
        ),
        "dilations": (f"{START} {W} z = CONV <dilations = [2, 2]> (xb, wb) {END}", "its window is dilated"),
        "automatic pads": (
            f'{START} {W} z = CONV <auto_pad = "SAME_UPPER"> (xb, wb) {END}',
            "its pads depend on the size of its input",
        ),
    },
}


@pytest.mark.parametrize(("rule", "case"), cases(STAYS, STAYS_OF))
def test_what_does_not_change_and_why(rule, case):
    nodes, why = case
    model = graph(rule, nodes)
    done = rewrites.apply(model, [rule])
    assert done.model == model
    assert list(done.missed[rule].values()) == [why]


def test_a_convolution_along_one_axis_does_not_change():
    nodes = f"{START} wb = DequantizeLinear (row, one_step, one_zero) z = CONV (xb, wb) {END}"
    done = rewrites.apply(graph(DEPTHWISE, nodes, "float[b, 5, l]", "float[b, c, m]"), [DEPTHWISE])
    assert list(done.missed[DEPTHWISE].values()) == ["its window does not have two sides"]


def test_a_full_convolution_is_not_reported():
    nodes = f"{START} vb = DequantizeLinear (wide, v_step, one_zero) z = Conv (xb, vb) {END}"
    done = rewrites.apply(graph(POINTWISE, nodes), [POINTWISE])
    assert (done.missed, done.ops()) == ({}, {})


@pytest.mark.parametrize(
    ("nodes", "rules", "ops"),
    [
        (
            f"""{START} {W} c = Conv (xb, wb, bias) c8 = QuantizeLinear (c, fine, low)
            cb = DequantizeLinear (c8, fine, low) g = Gelu (cb) g8 = QuantizeLinear (g, fine, low)
            gb = DequantizeLinear (g8, fine, low) vb = DequantizeLinear (v, v_step, one_zero) d = Conv (gb, vb)
            d8 = QuantizeLinear (d, step, mid) db = DequantizeLinear (d8, step, mid) z = Add (db, xb)
            {END.replace("fine, low", "step, mid")}""",
            (POINTWISE, "quant_lookup"),
            {"QuantLookup": 1, "QuantPointwise": 2},
        ),
        (
            f"""{START} pb = DequantizeLinear (p, v_step, one_zero) c = Conv (xb, pb)
            c8 = QuantizeLinear (c, fine, low) cb = DequantizeLinear (c8, fine, low)
            fb = DequantizeLinear (dw, one_step, one_zero) f = Conv <group = 5, pads = [1, 1, 1, 1]> (cb, fb)
            f8 = QuantizeLinear (f, fine, low) db = DequantizeLinear (f8, fine, low) e = Conv (db, pb)
            e8 = QuantizeLinear (e, fine, low) eb = DequantizeLinear (e8, fine, low) s = Add (eb, cb)
            s8 = QuantizeLinear (s, fine, low) sb = DequantizeLinear (s8, fine, low) z = Conv (sb, pb) {END}""",
            RULES,
            {"QuantDepthwise": 1, "QuantPointwise": 3},
        ),
    ],
    ids=["around a table", "around a depthwise one"],
)
def test_between_two_products_channels_stay_last(nodes, rules, ops, library, tmp_path):
    """ONNX Runtime leaves only one Transpose before them and one after them."""
    model = graph(POINTWISE, nodes)
    done = rewrites.apply(model, rules)
    assert done.ops() == ops
    assert {**ops, "Transpose": 2}.items() <= kinds(done.model, tmp_path, library).items()
    same(model, done.model, X, most=0.02)  # a tie may occur in each of four products


def test_attributes_are_those_of_the_convolution():
    done = rewrites.apply(graph(DEPTHWISE, FIRES_OF[DEPTHWISE]["four different pads"]), [DEPTHWISE])
    (node,) = [node for node in done.model.graph.node if node.op_type == "QuantDepthwise"]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"strides": [1, 1], "pads": [1, 0, 2, 3], "group": 5}


def test_the_shape_of_a_graph_of_known_sides_stays():
    done = rewrites.apply(graph(POINTWISE, FIRES["plain"], "float[2, 5, 7, 3]"), [POINTWISE])
    inferred = onnx.shape_inference.infer_shapes(done.model)
    sides = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
    (node,) = [node for node in done.model.graph.node if node.op_type == "QuantPointwise"]
    assert sides[node.input[0]] == [2, 7, 3, 5]
