"""Convolutions of 8 bits -> our operators: of one place (pointwise), and of one channel each (depthwise). What both ask
for stands once, with what is particular to each beside it."""

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


def own(outputs, weight):
    """Constants of as many outputs."""
    return {
        "w": weight, "w_steps": RNG.uniform(0.002, 0.004, outputs).astype(np.float32),
        "w_zeros": np.zeros(outputs, np.int8), "w_moved": np.full(outputs, 3, np.int8), "outputs": np.array([outputs]),
        "b": RNG.integers(-9000, 9000, outputs).astype(np.int32), "b_steps": np.full(outputs, 2e-4, np.float32),
        "b_zeros": np.zeros(outputs, np.int32), "bias": RNG.normal(0, 1, outputs).astype(np.float32),
        "y_steps": np.linspace(0.02, 0.05, outputs).astype(np.float32),
        "y_mids": np.arange(90, 90 + outputs).astype(np.uint8),
    }  # fmt: skip


OWN = {POINTWISE: own(6, RNG.integers(-127, 128, (6, 5, 1, 1), np.int8)), DEPTHWISE: own(5, CONSTANTS["dw"])}
W = "wb = DequantizeLinear <axis = 0> (w, w_steps, w_zeros)"
END = "z8 = QuantizeLinear (z, fine, low) y = DequantizeLinear (z8, fine, low)"


def graph(rule, nodes, x="float[b, 5, h, w_]", y="float[b, c, h_, w__]"):
    """``nodes``, in which CONV is the convolution, of ``rule``'s kind."""
    conv = nodes.replace("CONV <", "Conv <group = 5, ").replace("CONV", "Conv <group = 5>")
    text = conv if rule == DEPTHWISE else nodes.replace("CONV", "Conv")
    return quantized.graph(text, f"({x} x) => ({y} y)", CONSTANTS | OWN[rule])


def cases(both, particular):
    """Of a table: rule and nodes, those of both rules and those of one, by name."""
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
        "pads of four kinds": f"{START} {W} z = CONV <pads = [1, 0, 2, 3]> (xb, wb) {END}",
        "all of a padded picture": f"{START} {W} z = CONV <pads = [1, 1, 1, 1]> (xb, wb) {END}",
        "a window that is no square": f"""{START} wb = DequantizeLinear (long, one_step, one_zero)
            z = CONV (xb, wb) {END}""",
    },
}


@pytest.mark.parametrize(("rule", "nodes"), cases(FIRES, FIRES_OF))
def test_it_becomes_ours_and_answers_the_same(rule, nodes):
    model = graph(rule, nodes)
    count = sum(node.op_type == "Conv" for node in model.graph.node)
    done = rewrites.apply(model, [rule])
    assert (done.counts, done.missed, done.ops()) == ({rule: count}, {}, {OPS[rule]: count})
    assert not [node for node in done.model.graph.node if node.op_type == "Conv"]
    same(model, done.model, X)


STAYS = {
    "x in a scale for each channel": (
        f"""x8 = QuantizeLinear <axis = 1> (x, x_steps, x_mids) xb = DequantizeLinear <axis = 1> (x8, x_steps, x_mids)
        {W} z = CONV (xb, wb) {END}""",
        "what it reads has a scale for each channel",
    ),
    "y in a scale for each channel": (
        f"""{START} {W} z = CONV (xb, wb) z8 = QuantizeLinear <axis = 1> (z, y_steps, y_mids)
        y = DequantizeLinear <axis = 1> (z8, y_steps, y_mids)""",
        "what it answers has a scale for each channel",
    ),
    "weights around 3": (
        f"{START} wb = DequantizeLinear <axis = 0> (w, w_steps, w_moved) z = CONV (xb, wb) {END}",
        "its weights are not around 0, or that cannot be seen",
    ),
    "a bias that is no constant": (
        f"""{START} {W} m = ReduceMax (x) one = Reshape (m, minus) all = Expand (one, outputs)
        z = CONV (xb, wb, all) {END}""",
        "its bias is no constant",
    ),
    "answers float": (f"{START} {W} y = CONV (xb, wb)", "what it answers is not quantized, or not for it alone"),
    "an activation": (
        f"{START} {W} c = CONV (xb, wb) z = Gelu (c) {END}",
        "what it answers is not quantized, or not for it alone",
    ),
    "read twice": (
        f"""{START} {W} z = CONV (xb, wb) z8 = QuantizeLinear (z, fine, low) zb = DequantizeLinear (z8, fine, low)
        y = Add (z, zb)""",
        "what it answers is not quantized, or not for it alone",
    ),
}
STAYS_OF = {
    POINTWISE: {
        "groups": (
            f"{START} fb = DequantizeLinear (few, v_step, one_zero) z = Conv <group = 5> (xb, fb) {END}",
            "its channels are in groups",
        ),
        "every other place": (
            f"{START} {W} z = Conv <strides = [2, 2]> (xb, wb) {END}",
            "it does not answer each place of what it reads, and no other",
        ),
        "places around": (
            f"{START} {W} z = Conv <pads = [1, 1, 1, 1]> (xb, wb) {END}",
            "it does not answer each place of what it reads, and no other",
        ),
        "a scale for each input": (
            f"{START} wb = DequantizeLinear <axis = 1> (w, x_steps, five) z = Conv (xb, wb) {END}",
            "its weights have a scale for each input; the op takes one for each output",
        ),
    },
    DEPTHWISE: {
        "answers two channels of each": (
            f"{START} wb = DequantizeLinear (two, one_step, one_zero) z = CONV (xb, wb) {END}",
            "its groups are more than a channel each, or answer more",
        ),
        "gaps": (f"{START} {W} z = CONV <dilations = [2, 2]> (xb, wb) {END}", "its window has gaps"),
        "padded by itself": (
            f'{START} {W} z = CONV <auto_pad = "SAME_UPPER"> (xb, wb) {END}',
            "what it is padded with hangs on what it reads",
        ),
    },
}


@pytest.mark.parametrize(("rule", "case"), cases(STAYS, STAYS_OF))
def test_what_stays_and_why(rule, case):
    nodes, why = case
    model = graph(rule, nodes)
    done = rewrites.apply(model, [rule])
    assert done.model == model
    assert list(done.missed[rule].values()) == [why]


def test_along_one_axis_it_is_not_ours():
    nodes = f"{START} wb = DequantizeLinear (row, one_step, one_zero) z = CONV (xb, wb) {END}"
    done = rewrites.apply(graph(DEPTHWISE, nodes, "float[b, 5, l]", "float[b, c, m]"), [DEPTHWISE])
    assert list(done.missed[DEPTHWISE].values()) == ["its window has not two sides, or they are not known"]


def test_a_window_of_all_channels_is_another_rules():
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
    """One Transpose before and one behind are all that ONNX Runtime leaves."""
    model = graph(POINTWISE, nodes)
    done = rewrites.apply(model, rules)
    assert done.ops() == ops
    assert {**ops, "Transpose": 2}.items() <= kinds(done.model, tmp_path, library).items()
    same(model, done.model, X, most=0.02)  # next to a tie in one of four


def test_attributes_are_those_of_the_convolution():
    done = rewrites.apply(graph(DEPTHWISE, FIRES_OF[DEPTHWISE]["pads of four kinds"]), [DEPTHWISE])
    (node,) = [node for node in done.model.graph.node if node.op_type == "QuantDepthwise"]
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert found == {"strides": [1, 1], "pads": [1, 0, 2, 3], "group": 5}


def test_the_shape_of_a_graph_of_known_sides_stays():
    done = rewrites.apply(graph(POINTWISE, FIRES["plain"], "float[2, 5, 7, 3]"), [POINTWISE])
    found = onnx.shape_inference.infer_shapes(done.model)
    sides = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in found.graph.value_info}
    (node,) = [node for node in done.model.graph.node if node.op_type == "QuantPointwise"]
    assert sides[node.input[0]] == [2, 7, 3, 5]
