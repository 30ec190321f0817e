"""Sums of quantized tensors -> the op QuantAdd."""

import collections

import numpy as np
import pytest

from calmclip.export import rewrites
from tests.export.rewrites import quantized
from tests.export.rewrites.quantized import kinds, same

RNG = np.random.default_rng(0)
STEPS = np.linspace(0.0223, 0.0507, 5).astype(np.float32)
CONSTANTS = {
    "step": np.float32(0.0511), "mid": np.uint8(117), "fine": np.float32(0.0317), "low": np.uint8(101),
    "steps": STEPS, "mids": np.arange(90, 95).astype(np.uint8),
    "six_steps": np.full(6, 0.0303, np.float32), "six_mids": np.full(6, 99, np.uint8), "mid8": np.int8(3),
    "one_step": np.array([0.0457], np.float32), "one_mid": np.array([117], np.uint8),
    "gain": np.float32(0.7013), "ones": np.array([1.3031], np.float32), "row": STEPS[::-1] * 30,
    "places": (STEPS * 30).reshape(5, 1, 1), "all": (STEPS * 40).reshape(1, 5, 1, 1),
    "down": np.linspace(0.5, 1.5, 7).astype(np.float32).reshape(7, 1), "minus": np.float32(-0.5),
    "one_zero": (STEPS * [30, 0, 30, 30, 30]).astype(np.float32).reshape(5, 1, 1), "tiny": np.float32(1e-37),
    "huge": np.float32(1e7), "five": np.ones((1, 1, 1, 1, 5), np.float32),
    "p": RNG.integers(-9, 10, (5, 5, 1, 1), np.int8),
    "p_step": np.float32(0.05), "p_zero": np.int8(0),
}  # fmt: skip
A, B = "float[b, 5, h, w]", "float[r, n, 5]"
PICTURES, ROWS = (RNG.normal(0, 2, shape).astype(np.float32) for shape in ((2, 2, 5, 7, 6), (2, 3, 4, 5)))
START = f"""{quantized.START}
    r8 = QuantizeLinear (r, fine, low) rb = DequantizeLinear (r8, fine, low)"""
END = "z8 = QuantizeLinear (z, step, low) y = DequantizeLinear (z8, step, low)"


def graph(nodes, kind=A, other=None, y=None, more=""):
    return quantized.graph(nodes, f"({kind} x, {other or kind} r{more}) => ({y or kind} y)", CONSTANTS)


def fed(model):
    x, r = PICTURES if len(model.graph.input[0].type.tensor_type.shape.dim) == 4 else ROWS
    return {"x": x, "r": r}


# nodes, the type of their inputs, and the number of Transposes afterwards
FIRES = {
    "one scale each": (f"{START} z = Add (xb, rb) {END}", A, 0),
    "of rows": (f"{START} z = Add (xb, rb) {END}", B, 0),
    "a scale per channel of rows": (
        f"""{START} t8 = QuantizeLinear <axis = 2> (r, steps, mids) tb = DequantizeLinear <axis = 2> (t8, steps, mids)
        z = Add (tb, xb) {END}""", B, 0,
    ),
    "a scale per channel": (
        f"""{START} t8 = QuantizeLinear <axis = 1> (r, steps, mids) tb = DequantizeLinear <axis = 1> (t8, steps, mids)
        z = Add (tb, xb) {END}""", A, 3,
    ),
    "a result with a scale per channel": (
        f"""{START} z = Add (xb, rb) z8 = QuantizeLinear <axis = -3> (z, steps, mids)
        y = DequantizeLinear <axis = 1> (z8, steps, mids)""", A, 3,
    ),
    "the last axis of a picture": (
        f"""{START} z = Add (xb, rb) z8 = QuantizeLinear <axis = 3> (z, six_steps, six_mids)
        y = DequantizeLinear <axis = 3> (z8, six_steps, six_mids)""", A, 0,
    ),
    "scales of one number": (
        f"""{START} t8 = QuantizeLinear (r, one_step, one_mid) tb = DequantizeLinear (t8, one_step, one_mid)
        z = Add (tb, xb) {END}""", A, 0,
    ),
    "gains of one number": (f"{START} xg = Mul (xb, gain) rg = Mul (ones, rb) z = Add (xg, rg) {END}", A, 0),
    "gains of channels": (f"{START} xg = Mul (places, xb) rg = Mul (rb, all) z = Add (xg, rg) {END}", A, 3),
    "gains of rows": (f"{START} xg = Mul (row, xb) z = Add (xg, rb) {END}", B, 0),
    "a gain after the sum": (f"{START} s = Add (xb, rb) z = Mul (s, places) {END}", A, 3),
    "gains before and after": (
        f"""{START} xg = Mul (places, xb) xh = Mul (xg, gain) rg = Mul (rb, all) s = Add (xh, rg) t = Mul (places, s)
        z = Mul (t, gain) {END}""", A, 3,
    ),
    "a gain and a scale per channel": (
        f"""{START} t8 = QuantizeLinear <axis = 1> (r, steps, mids) tb = DequantizeLinear <axis = 1> (t8, steps, mids)
        tg = Mul (tb, places) z = Add (xb, tg) {END}""", A, 3,
    ),
    "one operand is transposed already": (
        f"""{START} l8 = QuantizeLinear (x, step, low) l = Transpose <perm = [0, 2, 3, 1]> (l8)
        f = Transpose <perm = [0, 3, 1, 2]> (l) fb = DequantizeLinear (f, step, low) z = Add (rb, fb) {END}""", A, 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_it_becomes_an_op_with_the_same_answers(name):
    nodes, kind, transposes = FIRES[name]
    model = graph(nodes, kind)
    done = rewrites.apply(model, ["quant_add"])
    assert (done.counts, done.missed) == ({"quant_add": 1}, {})
    assert done.ops() == {"QuantAdd": 1}
    counts = collections.Counter(node.op_type for node in done.model.graph.node)
    assert (counts["Add"], counts["Mul"], counts["Transpose"]) == (0, 0, transposes)
    same(model, done.model, fed(model))


def test_values_that_other_nodes_read_stay():
    """Other nodes read the operands in float, with and without a gain. Another sum reads the 8-bit result."""
    nodes = f"""{START} xg = Mul (xb, places) s = Add (xg, rb) s8 = QuantizeLinear (s, step, low)
        sb = DequantizeLinear (s8, step, low) z = Add (xg, sb) {END} n = Neg (rb) m = Neg (xg)"""
    model = graph(nodes, y=f"{A} n, {A} m, {A}")
    done = rewrites.apply(model, ["quant_add"])
    assert done.ops() == {"QuantAdd": 2}
    same(model, done.model, fed(model))


WHY = {
    "float": "its result is not quantized, or is read in float too",
    "shape": "its operands differ in shape, or their shape is unknown",
    "constant": "a scale or a zero point is no constant",
    "steps": "its gains leave scales that are not positive and normal",
    "fine": "the steps of its result are over 1048576 times finer than those of an operand",
    "axis": "its scales lie along an axis that is not the channels'",
}
STAYS = {
    "answers float": (graph(f"{START} s = Add (xb, rb) y = Relu (s)"), "float"),
    "answers int8": (
        graph(f"{START} z = Add (xb, rb) z8 = QuantizeLinear (z, step, mid8) y = DequantizeLinear (z8, step, mid8)"),
        "float",
    ),
    "read in float too": (graph(f"{START} z = Add (xb, rb) {END} n = Neg (z)", y=f"{A} n, {A}"), "float"),
    "the sum is an output": (graph(f"{START} z = Add (xb, rb) {END}", y=f"{A} z, {A}"), "float"),
    "read in float too, after a gain": (
        graph(f"{START} s = Add (xb, rb) z = Mul (s, gain) {END} n = Neg (z)", y=f"{A} n, {A}"), "float",
    ),
    "one operand is broadcast": (graph(f"{START} z = Add (xb, rb) {END}", other="float[b, 5, 1, 1]"), "shape"),
    "dimensions with other names": (graph(f"{START} z = Add (xb, rb) {END}", other="float[b, 5, h, v]"), "shape"),
    "a gain that broadcasts": (graph(f"{START} xg = Mul (xb, five) z = Add (xg, rb) {END}"), "shape"),
    "a scale that is fed": (
        graph(f"{START} t8 = QuantizeLinear (r, fed, mid) tb = DequantizeLinear (t8, fed, mid) z = Add (tb, xb) {END}",
              more=", float fed"), "constant",
    ),
    "a gain below 0": (graph(f"{START} xg = Mul (xb, minus) z = Add (xg, rb) {END}"), "steps"),
    "a gain below 0 after the sum": (graph(f"{START} s = Add (xb, rb) z = Mul (s, minus) {END}"), "steps"),
    "a gain of 0 for a channel": (graph(f"{START} xg = Mul (xb, one_zero) z = Add (xg, rb) {END}"), "steps"),
    "a gain that makes a step subnormal": (graph(f"{START} xg = Mul (xb, tiny) z = Add (xg, rb) {END}"), "steps"),
    "a gain that makes a step too coarse": (graph(f"{START} xg = Mul (xb, huge) z = Add (xg, rb) {END}"), "fine"),
    "two axes": (
        graph(f"""{START} t8 = QuantizeLinear <axis = 3> (r, six_steps, six_mids)
        tb = DequantizeLinear <axis = 3> (t8, six_steps, six_mids) xg = Mul (xb, places) z = Add (tb, xg) {END}""",
              "float[b, 5, h, 6]"), "axis",
    ),
    "the rows of a picture": (
        graph(f"{START} xg = Mul (xb, down) z = Add (xg, rb) {END}", "float[b, 5, 7, w]"), "axis",
    ),
    "the middle of three axes": (
        graph(f"""{START} t8 = QuantizeLinear <axis = 1> (r, steps, mids)
        tb = DequantizeLinear <axis = 1> (t8, steps, mids) z = Add (tb, xb) {END}""", "float[b, 5, h]"), "axis",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_does_not_change_and_why(name):
    model, why = STAYS[name]
    done = rewrites.apply(model, ["quant_add"])
    assert done.model == model
    assert list(done.missed["quant_add"].values()) == [WHY[why]]


@pytest.mark.parametrize(
    "nodes",
    [
        f"{START} z = Add (xb, xb) {END} n = Neg (rb)",
        f"{START} z = Add (xb, r) {END} n = Neg (rb)",
        f"{START} xg = Mul (xb, rb) z = Add (xg, rb) {END} n = Neg (rb)",
        f"""{START} t8 = QuantizeLinear (r, fine, mid8) tb = DequantizeLinear (t8, fine, mid8) z = Add (xb, tb) {END}
        n = Neg (rb)""",
    ],
    ids=["of one tensor", "an operand in float", "a gain that is not constant", "an operand in int8"],
)
def test_what_is_not_a_sum_of_two_quantized_tensors_is_not_reported(nodes):
    model = graph(nodes, y=f"{A} n, {A}")
    done = rewrites.apply(model, ["quant_add"])
    assert (done.model == model, done.missed) == (True, {})


def test_shapes_are_inferred_through_custom_ops():
    """Another rule has changed the graph; shape inference goes through the functions of its ops."""
    nodes = f"{START} s = Gelu (xb) s8 = QuantizeLinear (s, fine, low) sb = DequantizeLinear (s8, fine, low)"
    before = rewrites.apply(graph(f"{nodes} z = Add (sb, rb) {END}"), ["quant_lookup"])
    done = rewrites.apply(before.model, ["quant_add"])
    assert (done.counts, done.ops()) == ({"quant_add": 1}, {"QuantLookup": 1, "QuantAdd": 1})


def test_between_two_products_no_transpose_stays(library, tmp_path):
    """A residual branch with a gain per channel: only one Transpose before and one after it remain."""
    nodes = f"""x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)
        pb = DequantizeLinear (p, p_step, p_zero) c = Conv (xb, pb)
        c8 = QuantizeLinear (c, fine, low) cb = DequantizeLinear (c8, fine, low) d = Conv (cb, pb)
        d8 = QuantizeLinear (d, fine, low) db = DequantizeLinear (d8, fine, low) dg = Mul (db, places)
        s = Add (cb, dg) s8 = QuantizeLinear (s, fine, low) sb = DequantizeLinear (s8, fine, low)
        e = Conv (sb, pb) e8 = QuantizeLinear (e, fine, low) eb = DequantizeLinear (e8, fine, low)
        t = Add (eb, sb) t8 = QuantizeLinear (t, fine, low) tb = DequantizeLinear (t8, fine, low)
        z = Conv (tb, pb) {END} n = Neg (r)"""
    model = graph(nodes, "float[b, 5, 7, 6]", y="float[b, 5, 7, 6] n, float[b, 5, 7, 6]")
    done = rewrites.apply(model, ["quant_add", "quant_pointwise"])
    assert done.ops() == {"QuantAdd": 2, "QuantPointwise": 4}
    assert {**done.ops(), "Transpose": 2}.items() <= kinds(done.model, tmp_path, library).items()
