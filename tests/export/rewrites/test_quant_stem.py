"""The convolution that reads the pixels -> windows and a product. The oracle is the quantized graph itself, run by ONNX
Runtime. A graph that must not be rewritten is checked by the reason in `missed`."""

import numpy as np
import pytest
from onnx import parser

from calmclip.export import rewrites
from calmclip.models.ops.spec import DOMAIN
from tests.export.rewrites.test_quant import same

END = "y = QuantizeLinear (z, coarse, mid)"
BYTES = "uint8[B, 4, P, Q] y"
FLOATS = "float[B, 4, P, Q] y"


def stem(how="strides = [2, 2], pads = [0, 0, 1, 1]", x="B, 3, 9, 7", w="4, 3, 3, 3", more=END, outputs=BYTES,
         pixels="fine, low", zeros="0, 0, 0, 0", weight="axis = 0", scale="s, zeros", bias=", bias", first="",
         read="x"):  # fmt: skip
    """A convolution of pixels named Conv with the result z; each parameter replaces a part of the graph."""
    count = np.prod([int(side) for side in w.split(",")])
    numbers = ", ".join(str(n) for n in np.random.default_rng(0).integers(-127, 128, count))
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (float[{x}] x) => ({outputs})
        <float fine = {{0.02}}, uint8 low = {{100}}, float coarse = {{0.3}}, uint8 mid = {{128}},
         int8[{w}] w = {{{numbers}}}, float[4] s = {{0.01, 0.02, 0.03, 0.004}}, int8[4] zeros = {{{zeros}}},
         float one = {{0.02}}, int8 nil = {{0}}, float[4] bias = {{1.5, -2.5, 0.1, 3}},
         int32[4] many = {{9, -900, 400, 1}}, float[4] steps = {{0.0002, 0.0004, 0.0006, 0.0008}},
         int32[4] nils = {{0, 0, 0, 0}}, float[4] each = {{0.1, 0.2, 0.3, 0.4}}, uint8[4] mids = {{1, 2, 3, 128}},
         float half = {{0.5}}, float zero = {{0}}, float six = {{6}}, float[1, 4, 1, 1] gain = {{1, 2, 3, 4}}>
        {{
            {first}
            x8 = QuantizeLinear ({read}, fine, low) xb = DequantizeLinear (x8, {pixels})
            wb = DequantizeLinear <{weight}> (w, {scale}) late = Constant <value = float {{0.3}}> ()
            counted = DequantizeLinear <axis = 0> (many, steps, nils)
            z = Conv <{how}> (xb, wb{bias})
            {more}
        }}
    """)
    next(node for node in model.graph.node if node.output[0] == "z").name = "Conv"
    return model


def pixels(model):
    shape = model.graph.input[0].type.tensor_type.shape.dim
    sides = [side.dim_value or 2 for side in shape]
    return {"x": np.random.default_rng(0).normal(0, 2, sides).astype(np.float32)}


# changes of the graph, and the ops afterwards
FITS = {
    "of EfficientNet": ({}, {"QuantLinear": 1}),
    "of FastViT": ({"how": "strides = [2, 2], pads = [1, 1, 1, 1]"}, {"QuantLinear": 1}),
    "of one picture": ({"x": "1, 3, 9, 7"}, {"QuantLinear": 1}),
    "every step": ({"how": "kernel_shape = [3, 3]"}, {"QuantLinear": 1}),
    "higher than wide": (
        {"w": "4, 2, 1, 5", "x": "3, 2, 9, 7", "how": "strides = [3, 1], pads = [2, 4, 0, 1]"}, {"QuantLinear": 1}
    ),
    "of 16 channels": ({"w": "4, 16, 4, 4", "x": "B, 16, 9, 7", "scale": "one, nil"}, {"QuantLinear": 1}),
    "patches": ({"how": "strides = [3, 3]"}, {"QuantLinear": 1}),
    "without a bias": ({"bias": ""}, {"QuantLinear": 1}),
    "with a bias in steps": ({"bias": ", counted"}, {"QuantLinear": 1}),
    "weights of one scale": ({"scale": "one, nil"}, {"QuantLinear": 1}),
    "steps computed by a node": ({"more": "y = QuantizeLinear (z, late, mid)"}, {"QuantLinear": 1}),
    "with a Relu": ({"more": "r = Relu (z) y = QuantizeLinear (r, coarse, mid)"}, {"QuantLinear": 1}),
    "with a Gelu": (
        {"more": 'r = Gelu <approximate = "tanh"> (z) y = QuantizeLinear (r, coarse, mid)'}, {"QuantLinear": 1}
    ),
    "with a Clip": (
        {"more": "r = Clip (z, zero, six) y = QuantizeLinear (r, coarse, mid)"}, {"QuantLinearToFloat": 1}
    ),
    "with half a Clip": (
        {"more": 'r = Clip (z, "", six) y = QuantizeLinear (r, coarse, mid)'}, {"QuantLinearToFloat": 1}
    ),
    "with a product after it": (
        {"more": "m = Mul (half, z) r = Relu (m) y = QuantizeLinear (r, coarse, mid)"}, {"QuantLinearToFloat": 1}
    ),
    "in float": ({"more": "y = Neg (z)", "outputs": FLOATS}, {"QuantLinearToFloat": 1}),
    "an output": ({"more": "", "outputs": "float[B, 4, P, Q] z"}, {"QuantLinearToFloat": 1}),
    "with a gain per channel": ({"more": "y = Mul (z, gain)", "outputs": FLOATS}, {"QuantLinearToFloat": 1}),
    "with steps per channel": (
        {"more": "m = Abs (z) y = QuantizeLinear <axis = 1> (m, each, mids)"}, {"QuantLinearToFloat": 1}
    ),
    "read twice": (
        {"more": END + " v = Sigmoid (z)", "outputs": BYTES + ", float[B, 4, P, Q] v"}, {"QuantLinearToFloat": 1}
    ),
    "pixels that other nodes read": (
        {"more": END + " v = Abs (xb) n = Shape (xb)", "outputs": BYTES + ", float[B, 3, 9, 7] v, int64[4] n"},
        {"QuantLinear": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_a_stem_answers_the_same(name):
    changes, product = FITS[name]
    model = stem(**changes)
    done = same(model, pixels(model))
    assert done.ops() == {"QuantPatches": 1} | product
    assert not {"Conv", "MatMul"} & {node.op_type for node in done.model.graph.node if node.domain != DOMAIN}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pixels": "coarse, low"}, "its pixels are dequantized in other steps than they are quantized in"),
        ({"x": "B, 3, H, W"}, "the size of its pictures is unknown"),
        ({"x": "B, 18, 9, 7", "w": "4, 18, 4, 4"}, "its windows hold 288 numbers of 18 channels"),
        ({"x": "B, 4, 9, 7", "w": "4, 1, 3, 3", "how": "group = 4"}, "its channels are in groups"),
        ({"how": "dilations = [2, 1]"}, "its window is dilated"),
        ({"how": 'auto_pad = "SAME_UPPER"'}, "its pads depend on the size of its input"),
        ({"how": "pads = [0, -1, 0, 0]"}, "its pads are negative, or its pictures are smaller than a window"),
        ({"zeros": "0, 1, 0, 0"}, "its weight has a zero point that is not 0"),
        ({"w": "4, 4, 3, 3", "x": "B, 4, 9, 7", "weight": "axis = 1"}, "its weight has a scale for each input"),
        ({"bias": ", negative", "first": "negative = Neg (bias)"}, "its bias is no constant"),
    ],
)
def test_what_does_not_change_and_why(changes, why):
    model = stem(**changes)
    done = rewrites.apply(model, ["quant_stem"])
    assert done.model == model
    assert done.missed["quant_stem"]["Conv"].startswith(why)


@pytest.mark.parametrize(
    "changes",
    [
        {"w": "4, 3, 1, 1"},  # pixel by pixel
        {"first": "x1 = Neg (x)", "read": "x1"},  # not the graph's input
    ],
)
def test_what_is_not_a_stem_is_not_reported(changes):
    done = rewrites.apply(stem(**changes), ["quant_stem"])
    assert not done.ops()
    assert not done.missed
