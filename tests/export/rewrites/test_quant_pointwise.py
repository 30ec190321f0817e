"""Convolutions of 8 bits that look at one place -> our operator. The oracle is the quantized graph itself, run
by ONNX Runtime with nothing of ours in it, node by node."""

import collections

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from calmclip.export import rewrites
from calmclip.export.parity import onnx_run
from calmclip.models.ops.library import find

RULES = ("quant_pointwise", "quant_lookup")
RNG = np.random.default_rng(0)
CONSTANTS = {
    "step": np.float32(0.05), "mid": np.uint8(117), "fine": np.float32(0.02), "low": np.uint8(21),
    "w": RNG.integers(-127, 128, (6, 5, 1, 1), np.int8), "w_steps": RNG.uniform(0.002, 0.004, 6).astype(np.float32),
    "w_zeros": np.zeros(6, np.int8), "w_moved": np.full(6, 3, np.int8),
    "v": RNG.integers(-9, 10, (5, 6, 1, 1), np.int8),
    "wide": RNG.integers(-9, 10, (6, 5, 3, 3), np.int8), "few": RNG.integers(-9, 10, (5, 1, 1, 1), np.int8),
    "v_step": np.float32(0.03), "v_zero": np.int8(0), "b": RNG.integers(-9000, 9000, 6).astype(np.int32),
    "b_steps": np.full(6, 2e-4, np.float32), "b_zeros": np.zeros(6, np.int32),
    "bias": RNG.normal(0, 1, 6).astype(np.float32),
    "x_steps": np.linspace(0.02, 0.05, 5).astype(np.float32), "x_mids": np.arange(90, 95).astype(np.uint8),
    "y_steps": np.linspace(0.02, 0.05, 6).astype(np.float32), "y_mids": np.arange(90, 96).astype(np.uint8),
}  # fmt: skip
X = RNG.normal(0, 2, (2, 5, 7, 3)).astype(np.float32)
START = "x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)"
W = "wb = DequantizeLinear <axis = 0> (w, w_steps, w_zeros)"
END = "z8 = QuantizeLinear (z, fine, low) y = DequantizeLinear (z8, fine, low)"


def graph(nodes):
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[b, 5, h, w_] x) => (float[b, c, h_, w__] y) {{ {nodes} }}
    """)
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in read)
    return model


def same(model, done, most=0):
    """Whether it answers as before; a step off where more than one of ``most`` answers is."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": X})
    assert len(np.unique(expected)) > 20
    for library in (None, find()):
        got = onnx_run(done.model, library=library)({"x": X})["y"]
        assert got.shape == expected.shape
        apart = np.abs(got - expected)
        assert (apart > 1e-6).mean() <= most
        assert apart.max() <= 0.0501


FIRES = {
    "plain": f"{START} {W} z = Conv (xb, wb) {END}",
    "a bias in steps": f"""{START} {W} bb = DequantizeLinear <axis = 0> (b, b_steps, b_zeros)
        z = Conv (xb, wb, bb) {END}""",
    "a bias": f"{START} {W} z = Conv (xb, wb, bias) {END}",
    "one scale": f"{START} vb = DequantizeLinear (v, v_step, v_zero) {W} c = Conv (xb, wb) {END.replace('y =', 'm =')}"
    f" n = Conv (m, vb) n8 = QuantizeLinear (n, step, mid) y = DequantizeLinear (n8, step, mid)".replace("(z,", "(c,"),
}


@pytest.mark.parametrize("name", FIRES)
def test_it_becomes_a_product_and_answers_the_same(name):
    model = graph(FIRES[name])
    done = rewrites.apply(model, RULES)
    assert done.counts["quant_pointwise"] == sum(node.op_type == "Conv" for node in model.graph.node)
    assert not done.missed
    assert done.ops() == {"QuantPointwise": done.counts["quant_pointwise"]}
    assert not [node for node in done.model.graph.node if node.op_type == "Conv"]
    onnx.checker.check_model(done.model, full_check=True)
    same(model, done, most=0.01)  # next to a tie


STAYS = {
    "y in a scale for each channel": (
        f"""{START} {W} z = Conv (xb, wb) z8 = QuantizeLinear <axis = 1> (z, y_steps, y_mids)
        y = DequantizeLinear <axis = 1> (z8, y_steps, y_mids)""",
        "what it answers has a scale for each channel",
    ),
    "groups": (
        f"""{START} fb = DequantizeLinear (few, v_step, v_zero) z = Conv <group = 5> (xb, fb) {END}""",
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
    "x in a scale for each channel": (
        f"""x8 = QuantizeLinear <axis = 1> (x, x_steps, x_mids) xb = DequantizeLinear <axis = 1> (x8, x_steps, x_mids)
        {W} z = Conv (xb, wb) {END}""",
        "what it reads has a scale for each channel",
    ),
    "weights around 3": (
        f"{START} wb = DequantizeLinear <axis = 0> (w, w_steps, w_moved) z = Conv (xb, wb) {END}",
        "its weights are not around 0, or that cannot be seen",
    ),
    "a scale for each input": (
        f"{START} wb = DequantizeLinear <axis = 1> (w, x_steps, five) z = Conv (xb, wb) {END}",
        "its weights have a scale for each input; the op takes one for each output",
    ),
    "answers float": (f"{START} {W} y = Conv (xb, wb)", "what it answers is not quantized, or not for it alone"),
    "an activation": (
        f"{START} {W} c = Conv (xb, wb) z = Gelu (c) {END}",
        "what it answers is not quantized, or not for it alone",
    ),
    "a bias that is no constant": (
        f"""{START} {W} m = ReduceMax (x) one = Reshape (m, minus) six = Expand (one, sixes)
        z = Conv (xb, wb, six) {END}""",
        "its bias is no constant",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_and_why(name, monkeypatch):
    more = {"five": np.zeros(5, np.int8), "minus": np.array([-1]), "sixes": np.array([6])}
    for key, value in more.items():
        monkeypatch.setitem(CONSTANTS, key, value)
    nodes, why = STAYS[name]
    model = graph(nodes)
    done = rewrites.apply(model, RULES)
    assert done.model == model
    (said,) = done.missed["quant_pointwise"].values()
    assert said == why


def test_a_window_is_another_rules():
    done = rewrites.apply(graph(f"{START} vb = DequantizeLinear (wide, v_step, v_zero) z = Conv (xb, vb) {END}"), RULES)
    assert not done.missed
    assert not done.ops()


def test_what_lies_between_two_has_channels_last(library, tmp_path):
    """One Transpose before and one behind are all that ONNX Runtime leaves, around a table too."""
    nodes = f"""{START} {W} c = Conv (xb, wb, bias) c8 = QuantizeLinear (c, fine, low)
        cb = DequantizeLinear (c8, fine, low) g = Gelu (cb) g8 = QuantizeLinear (g, fine, low)
        gb = DequantizeLinear (g8, fine, low)
        vb = DequantizeLinear (v, v_step, v_zero) d = Conv (gb, vb) d8 = QuantizeLinear (d, step, mid)
        db = DequantizeLinear (d8, step, mid) s = Add (db, xb) z = Identity (s)
        {END.replace("fine, low", "step, mid")}"""
    model = graph(nodes)
    done = rewrites.apply(model, RULES)
    assert done.ops() == {"QuantLookup": 1, "QuantPointwise": 2}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.register_custom_ops_library(str(library.path))
    ort.InferenceSession(done.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert (kinds["QuantPointwise"], kinds["QuantLookup"], kinds["Transpose"]) == (2, 1, 2)
    same(model, done, most=0.01)


def test_the_shape_of_a_graph_of_known_sides_stays():
    model = graph(FIRES["plain"])
    for side, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (2, 5, 7, 3), strict=True):
        side.dim_value = size
    done = rewrites.apply(model, RULES)
    found = onnx.shape_inference.infer_shapes(done.model)
    sides = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in found.graph.value_info}
    (node,) = [node for node in done.model.graph.node if node.op_type == "QuantPointwise"]
    assert sides[node.input[0]] == [2, 7, 3, 5]
