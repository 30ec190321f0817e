"""Quantized convolutions with larger windows, and the tables and pools between them -> ops with channels last. The
oracle is the quantized graph itself, run by ONNX Runtime without fusion."""

import numpy as np
import onnx
import pytest

from calmclip.export import rewrites
from calmclip.export.parity import onnx_run
from calmclip.export.quantizers import Ranges, static
from calmclip.models.flow import Arrays
from tests.export.graphs import parse
from tests.export.rewrites import quantized
from tests.export.rewrites.quantized import START, kinds, plain, same

RNG = np.random.default_rng(0)
X = {"x": RNG.normal(0, 2, (2, 5, 7, 9)).astype(np.float32)}
CONSTANTS = {
    "step": np.float32(0.05), "mid": np.uint8(117), "fine": np.float32(0.03), "low": np.uint8(21),
    "w": RNG.integers(-127, 128, (6, 5, 3, 3), np.int8), "w_steps": RNG.uniform(0.0006, 0.001, 6).astype(np.float32),
    "w_zeros": np.zeros(6, np.int8), "bias": RNG.normal(0, 1, 6).astype(np.float32), "nil": np.int8(0),
    "dot": RNG.integers(-127, 128, (6, 5, 1, 1), np.int8), "wide": RNG.integers(-9, 10, (6, 5, 2, 4), np.int8),
    "long": np.ones((1, 5, 120, 120), np.int8), "one_step": np.float32(0.002),
}  # fmt: skip
W = "n = Neg (xb) n8 = QuantizeLinear (n, step, mid) a = DequantizeLinear (n8, step, mid)"
W += " wb = DequantizeLinear <axis = 0> (w, w_steps, w_zeros)"
END = "z8 = QuantizeLinear (z, fine, low) y = DequantizeLinear (z8, fine, low)"
FIRST, LAST = "Transpose <perm = [0, 3, 1, 2]>", "Transpose <perm = [0, 2, 3, 1]>"


def graph(nodes, x="float[b, 5, h, w_]", y="float[b, c, h_, w__]"):
    return quantized.graph(f"{START} {W} {nodes}", f"({x} x) => ({y} y)", CONSTANTS)


@pytest.mark.parametrize(
    "nodes",
    [
        f"z = Conv (a, wb) {END}",
        f"z = Conv <strides = [2, 3], pads = [1, 0, 2, 3]> (a, wb, bias) {END}",
        f"v = DequantizeLinear (wide, one_step, nil) z = Conv <pads = [0, 2, 1, 1]> (a, v) {END}",
        f"v = DequantizeLinear (dot, one_step, nil) z = Conv <strides = [2, 2]> (a, v) {END}",
    ],
    ids=["plain", "strides and pads", "a window that is not square", "one place with strides"],
)
def test_a_convolution_becomes_an_op_with_the_same_answers(nodes):
    model = graph(nodes)
    done = rewrites.apply(model, ["quant_conv"])
    assert (done.missed, done.ops()) == ({}, {"QuantConv": 1})
    assert not [node for node in done.model.graph.node if node.op_type == "Conv"]
    same(model, done.model, X)


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        (f"z = Conv <dilations = [2, 1]> (a, wb) {END}", "its window is dilated"),
        (f'z = Conv <auto_pad = "SAME_UPPER"> (a, wb) {END}', "its pads depend on the size of its input"),
        (f"z = Conv <pads = [0, -1, 0, 0]> (a, wb) {END}", "its pads are negative"),
        (
            f"v = DequantizeLinear (long, one_step, nil) z = Conv <pads = [99, 99, 99, 99]> (a, v) {END}",
            "it sums 72000 products; the op takes at most 65536",
        ),
        ("y = Conv (a, wb)", "its result is not quantized, or is read in float too"),
    ],
)
def test_what_does_not_change_and_why(nodes, why):
    model = graph(nodes)
    done = rewrites.apply(model, ["quant_conv"])
    assert done.model == model
    assert list(done.missed["quant_conv"].values()) == [why]


@pytest.mark.parametrize(
    "nodes",
    [
        f"v = DequantizeLinear (dot, one_step, nil) z = Conv (a, v) {END}",  # quant_pointwise takes it
        f"z = Conv (xb, wb) {END}",  # it reads the pixels: quant_stem
    ],
)
def test_convolutions_of_other_rules_are_not_reported(nodes):
    done = rewrites.apply(graph(nodes), ["quant_conv"])
    assert (done.missed, done.ops()) == ({}, {})


def test_a_leaky_activation_stays_behind_the_op_as_a_table():
    """Its function has the pair between the two as well, so answers with and without the library are the same."""
    pair = "c8 = QuantizeLinear (c, step, mid) d = DequantizeLinear (c8, step, mid)"
    model = graph(f"c = Conv <pads = [1, 1, 1, 1]> (a, wb, bias) {pair} z = LeakyRelu <alpha = 0.1> (d) {END}")
    done = rewrites.apply(model, ["quant_conv", "quant_lookup"])
    assert (done.missed, done.ops()) == ({}, {"QuantConv": 1, "QuantLookup": 2})  # of Neg, too
    same(model, done.model, X)


@pytest.mark.parametrize(
    ("rule", "pool", "steps", "why"),
    [
        ("quant_max_pool", "MaxPool <kernel_shape = [2, 2]>", "fine, mid", "its result has other steps than its input"),
        ("quant_max_pool", "MaxPool <kernel_shape = [2, 2], dilations = [2, 1]>", "step, mid", "its window is dilated"),
        (
            "quant_max_pool", "MaxPool <kernel_shape = [2, 2], ceil_mode = 1>", "step, mid",
            "its last windows may reach beyond its pads",
        ),
        (
            "quant_average", 'AveragePool <kernel_shape = [2, 2], auto_pad = "SAME_LOWER">', "fine, low",
            "its pads depend on the size of its input",
        ),
        (
            "quant_average", "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>", "fine, low",
            "its windows at the border hold fewer numbers",
        ),
    ],
)  # fmt: skip
def test_pools_that_stay_and_why(rule, pool, steps, why):
    nodes = f"""l8 = {LAST} (x8) f8 = {FIRST} (l8) f = DequantizeLinear (f8, step, mid) z = {pool} (f)
        z8 = QuantizeLinear (z, {steps}) y = DequantizeLinear (z8, {steps})"""
    model = quantized.graph(f"{START} {nodes}", "(float[b, 5, h, w_] x) => (float[b, 5, h_, w__] y)", CONSTANTS)
    done = rewrites.apply(model, [rule])
    assert done.model == model
    assert list(done.missed[rule].values()) == [why]


def test_pools_between_channels_first_stay():
    nodes = "z = MaxPool <kernel_shape = [2, 2]> (xb) z8 = QuantizeLinear (z, step, mid)"
    model = quantized.graph(
        f"{START} {nodes} y = DequantizeLinear (z8, step, mid)",
        "(float[b, 5, 4, 4] x) => (float[b, 5, 3, 3] y)",
        CONSTANTS,
    )
    done = rewrites.apply(model, ["quant_max_pool", "quant_average"])
    assert (done.missed, done.ops()) == ({}, {})


def test_a_pool_behind_an_operation_in_float_reads_bytes():
    nodes = f"""f = Exp (x) z = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (f)
        z8 = QuantizeLinear (z, step, mid) l8 = {LAST} (z8) y8 = {FIRST} (l8) y = DequantizeLinear (y8, step, mid)"""
    model = quantized.graph(nodes, "(float[b, 5, h, w_] x) => (float[b, 5, h_, w__] y)", CONSTANTS)
    done = rewrites.apply(model, ["quant_max_pool"])
    assert (done.missed, done.ops()) == ({}, {"QuantMaxPool": 1})
    same(model, done.model, X)


@pytest.fixture(scope="module")
def detector() -> onnx.ModelProto:
    """The parts of a detector: a stem and its pool, a fork and its Concat, a neck with an upscaling and an average."""
    weights = {"s": (8, 3, 3, 3), "p": (8, 8, 3, 3), "q": (8, 8, 3, 3), "d": (8, 16, 3, 3), "o": (8, 8, 1, 1)}
    return parse(
        """g (float[2, 3, 32, 32] x) => (float[2, 8, 8, 8] y) <float[4] twice = {1, 1, 2, 2}>
        {
            c1 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, s, sb) l1 = LeakyRelu <alpha = 0.1> (c1)
            m = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (l1)
            c2 = Conv <pads = [1, 1, 1, 1]> (m, p, pb) l2 = LeakyRelu <alpha = 0.1> (c2)
            c3 = Conv <pads = [1, 1, 1, 1]> (l2, q, qb) l3 = LeakyRelu <alpha = 0.1> (c3)
            both = Concat <axis = 1> (l3, l2)
            c4 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (both, d, db)
            up = Resize <mode = "linear"> (c4, , twice) t = Add (up, l3)
            a = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (t) u = Add (a, c4)
            again = Resize <mode = "nearest"> (u, , twice)
            y = Conv (again, o, ob)
        }""",
        weights | {f"{name}b": (8,) for name in weights},
    )


def observed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Ranges, Arrays]:
    """``model`` in 8 bits, its ranges, and the inputs that they were observed on."""
    x = {"x": RNG.normal(0, 1, (2, 3, 32, 32)).astype(np.float32)}
    ranges = static.observe(model, [x], static.Params())
    return static.quantize(model, ranges, static.Params()), ranges, x


def test_a_detector_stays_in_bytes_with_channels_last(detector, library, tmp_path):
    model, ranges, x = observed(detector)
    done = rewrites.apply(model, rewrites.swaps())
    ops = {
        "QuantAdd": 2,
        "QuantConv": 3,
        "QuantDepthwise": 1,
        "QuantLinear": 1,
        "QuantLookup": 3,
        "QuantMaxPool": 1,
        "QuantPatches": 1,
        "QuantPointwise": 1,
    }
    assert done.ops() == ops
    left = kinds(done.model, tmp_path, library)
    assert ops.items() <= left.items()
    assert not {"Conv", "LeakyRelu", "MaxPool", "AveragePool", "Concat"} & left.keys()
    exact, expected = onnx_run(detector)(x)["y"], plain(model, x)["y"]
    assert np.linalg.norm(expected - exact) < 0.1 * np.linalg.norm(exact)
    low, high = ranges["y"]
    for using in (library, None):  # as the standard operators, but for ties
        apart = np.abs(onnx_run(done.model, library=using)(x)["y"] - expected)
        assert apart.max() <= 1.01 * (high - low) / 255
        assert (apart > 1e-6).mean() < 0.01


def test_what_only_moves_numbers_has_one_grid(detector):
    """A maximum and a Concat have the steps of their inputs; sums, averages and upscalings have their own."""
    model, ranges, _ = observed(detector)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    step = {
        node.output[0].removesuffix("_uint8"): constants[node.input[1]].item()
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }

    def of_range(*names):
        return pytest.approx((max(ranges[name][1] for name in names) - min(ranges[name][0] for name in names)) / 255)

    assert step["l1"] == step["m"] == of_range("l1")
    assert step["l2"] == step["l3"] == step["both"] == of_range("l2", "l3")
    assert {name: step[name] for name in ("c4", "up", "t", "a", "u")} == {
        name: of_range(name) for name in ("c4", "up", "t", "a", "u")
    }
    assert len({step[name] for name in ("l1", "l2", "c4", "up", "t", "a", "u", "x", "y")}) == 9
