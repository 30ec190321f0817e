"""Depthwise convolutions of 8 bits -> our operator. The oracle is the quantized graph itself, run by ONNX Runtime node
by node, with nothing of ours in it."""

import collections

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper, parser

from calmclip.export import rewrites
from calmclip.export.parity import onnx_run
from calmclip.models.ops.library import find

RNG = np.random.default_rng(0)
CONSTANTS = {
    "step": np.float32(0.05), "mid": np.uint8(117), "fine": np.float32(0.03), "low": np.uint8(21),
    "w": RNG.integers(-127, 128, (5, 1, 3, 3), np.int8), "w_steps": RNG.uniform(0.002, 0.004, 5).astype(np.float32),
    "w_zeros": np.zeros(5, np.int8), "w_moved": np.full(5, 3, np.int8), "one_step": np.float32(0.003),
    "one_zero": np.int8(0), "long": RNG.integers(-127, 128, (5, 1, 2, 5), np.int8),
    "two": RNG.integers(-127, 128, (10, 1, 3, 3), np.int8), "row": RNG.integers(-127, 128, (5, 1, 3), np.int8),
    "b": RNG.integers(-9000, 9000, 5).astype(np.int32), "b_steps": np.full(5, 2e-4, np.float32),
    "b_zeros": np.zeros(5, np.int32), "bias": RNG.normal(0, 1, 5).astype(np.float32), "minus": np.array([-1]),
    "five": np.array([5]), "x_steps": np.linspace(0.02, 0.05, 5).astype(np.float32),
    "x_mids": np.arange(90, 95).astype(np.uint8), "p": RNG.integers(-9, 10, (5, 5, 1, 1), np.int8),
}  # fmt: skip
X = RNG.normal(0, 2, (2, 5, 7, 6)).astype(np.float32)
START = "x8 = QuantizeLinear (x, step, mid) xb = DequantizeLinear (x8, step, mid)"
W = "wb = DequantizeLinear <axis = 0> (w, w_steps, w_zeros)"
END = "z8 = QuantizeLinear (z, fine, low) y = DequantizeLinear (z8, fine, low)"


def graph(nodes, x="float[b, 5, h, w_]", y="float[b, c, h_, w__]"):
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g ({x} x) => ({y} y) {{ {nodes} }}')
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in read)
    return model


def same(model, done):
    """Whether it answers as before, but for what is next to a tie."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": X})
    assert len(np.unique(expected)) > 20
    for library in (None, find()):
        got = onnx_run(done.model, library=library)({"x": X})["y"]
        assert got.shape == expected.shape
        apart = np.abs(got - expected)
        assert (apart > 1e-6).mean() < 0.01
        assert apart.max() < 0.051


def conv(more="", weight="wb", bias=""):
    return f"z = Conv <group = 5{more}> (xb, {weight}{bias})"


FIRES = {
    "plain": f"{START} {W} {conv()} {END}",
    "strides": f"{START} {W} {conv(', strides = [2, 3]')} {END}",
    "pads of four kinds": f"{START} {W} {conv(', pads = [1, 0, 2, 3]')} {END}",
    "all of a padded picture": f"{START} {W} {conv(', pads = [1, 1, 1, 1]')} {END}",
    "a window that is no square": f"{START} wb = DequantizeLinear (long, one_step, one_zero) {conv()} {END}",
    "a bias": f"{START} {W} {conv(bias=', bias')} {END}",
    "a bias in steps": f"{START} {W} bb = DequantizeLinear <axis = 0> (b, b_steps, b_zeros) {conv(bias=', bb')} {END}",
}


@pytest.mark.parametrize("name", FIRES)
def test_it_becomes_ours_and_answers_the_same(name):
    model = graph(FIRES[name])
    done = rewrites.apply(model, ["quant_depthwise"])
    assert done.counts == {"quant_depthwise": 1}
    assert not done.missed
    assert done.ops() == {"QuantDepthwise": 1}
    assert not [node for node in done.model.graph.node if node.op_type == "Conv"]
    onnx.checker.check_model(done.model, full_check=True)
    same(model, done)


STAYS = {
    "x in a scale for each channel": (
        f"""x8 = QuantizeLinear <axis = 1> (x, x_steps, x_mids)
        xb = DequantizeLinear <axis = 1> (x8, x_steps, x_mids) {W} {conv(", pads = [1, 1, 1, 1]")} {END}""",
        "what it reads has a scale for each channel",
    ),
    "y in a scale for each channel": (
        f"""{START} {W} {conv()} z8 = QuantizeLinear <axis = 1> (z, x_steps, x_mids)
        y = DequantizeLinear <axis = 1> (z8, x_steps, x_mids)""",
        "what it answers has a scale for each channel",
    ),
    "answers two channels of each": (
        f"{START} wb = DequantizeLinear (two, one_step, one_zero) {conv()} {END}",
        "its groups are more than a channel each, or answer more",
    ),
    "gaps": (f"{START} {W} {conv(', dilations = [2, 2]')} {END}", "its window has gaps"),
    "padded by itself": (
        f"""{START} {W} {conv(', auto_pad = "SAME_UPPER"')} {END}""",
        "what it is padded with hangs on what it reads",
    ),
    "weights around 3": (
        f"{START} wb = DequantizeLinear <axis = 0> (w, w_steps, w_moved) {conv()} {END}",
        "its weights are not around 0, or that cannot be seen",
    ),
    "a bias that is no constant": (
        f"{START} {W} m = ReduceMax (x) one = Reshape (m, minus) all = Expand (one, five) {conv(bias=', all')} {END}",
        "its bias is no constant",
    ),
    "answers float": (
        f"{START} {W} {conv()} y = Relu (z)", "what it answers is not quantized, or not for it alone",
    ),
    "read twice": (
        f"""{START} {W} {conv()} z8 = QuantizeLinear (z, fine, low) zb = DequantizeLinear (z8, fine, low)
        y = Add (z, zb)""",
        "what it answers is not quantized, or not for it alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_and_why(name):
    nodes, why = STAYS[name]
    model = graph(nodes)
    done = rewrites.apply(model, ["quant_depthwise"])
    assert done.model == model
    (said,) = done.missed["quant_depthwise"].values()
    assert said == why


def test_along_one_axis_it_is_not_ours():
    model = graph(
        f"{START} wb = DequantizeLinear (row, one_step, one_zero) {conv()} {END}", "float[b, 5, l]", "float[b, c, m]"
    )
    done = rewrites.apply(model, ["quant_depthwise"])
    (said,) = done.missed["quant_depthwise"].values()
    assert said == "its window has not two sides, or they are not known"


def test_between_two_products_nothing_is_turned(library, tmp_path):
    """One Transpose before and one behind are all that ONNX Runtime leaves."""
    nodes = f"""{START} pb = DequantizeLinear (p, one_step, one_zero) c = Conv (xb, pb)
        c8 = QuantizeLinear (c, fine, low) cb = DequantizeLinear (c8, fine, low) {W}
        d = Conv <group = 5, pads = [1, 1, 1, 1]> (cb, wb) d8 = QuantizeLinear (d, fine, low)
        db = DequantizeLinear (d8, fine, low) e = Conv (db, pb) e8 = QuantizeLinear (e, fine, low)
        eb = DequantizeLinear (e8, fine, low) s = Add (eb, cb) s8 = QuantizeLinear (s, fine, low)
        sb = DequantizeLinear (s8, fine, low) z = Conv (sb, pb) {END}"""
    done = rewrites.apply(graph(nodes), ["quant_depthwise", "quant_pointwise"])
    assert done.ops() == {"QuantDepthwise": 1, "QuantPointwise": 3}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.register_custom_ops_library(str(library.path))
    ort.InferenceSession(done.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert (kinds["QuantDepthwise"], kinds["QuantPointwise"], kinds["Transpose"]) == (1, 3, 2)


def test_attributes_are_those_of_the_convolution():
    done = rewrites.apply(graph(FIRES["pads of four kinds"]), ["quant_depthwise"])
    (node,) = [node for node in done.model.graph.node if node.op_type == "QuantDepthwise"]
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert found == {"strides": [1, 1], "pads": [1, 0, 2, 3], "group": 5}
