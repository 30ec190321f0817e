"""What is promised of every operator alike: constants, threads, the place of an input, shapes, types, empty tensors,
that what does not fit is refused by name. What an operator computes is in its own file.

The oracle is the same node in another way, and the reference where there is much to do.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper

from calmclip.models.ops import reference
from calmclip.models.ops.spec import (
    OPS,
    QUANT_ADD,
    QUANT_ATTENTION,
    QUANT_DEPTHWISE,
    QUANT_LAYER_NORM,
    QUANT_LINEAR,
    QUANT_LINEAR_TO_FLOAT,
    QUANT_LOOKUP,
    QUANT_PATCHES,
    QUANT_POINTWISE,
    SOFTMAX,
)
from tests.models.ops import test_quant_add as adding
from tests.models.ops import test_quant_attention as attention
from tests.models.ops import test_quant_depthwise as depthwise
from tests.models.ops import test_quant_layer_norm as norm
from tests.models.ops import test_quant_linear as linear
from tests.models.ops import test_quant_lookup as lookup
from tests.models.ops import test_quant_patches as patches
from tests.models.ops import test_soft_nms as suppression
from tests.models.ops.harness import load, model, near, node, run, session


def rows(seed, *shape):
    return {"x": np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)}


def picture(seed, columns):
    return {"image": np.full((5, 5, 3), seed, np.uint8)}


NAMED = {op.name: op for op in OPS}
# small inputs, by a seed and whether there are numbers for each column where they may be; attributes
SMALL = {
    "Softmax": (lambda seed, columns: rows(seed, 2, 8), {}),
    "SoftNMS": (lambda seed, columns: suppression.GOOD, {}),
    "ImageToPixels": (picture, {}),
    "ImageToQuantizedPixels": (picture, {}),
    "QuantLinear": (lambda seed, columns: linear.draw(seed, [2, 8], 5, per_column=columns), {"activation": 2}),
    "QuantLinearToFloat": (
        lambda seed, columns: linear.draw(seed, [2, 8], 5, True, per_column=columns), {"activation": 2},
    ),
    "QuantPointwise": (lambda seed, columns: linear.draw(seed, [1, 2, 3, 8], 5, per_column=columns), {}),
    "QuantAttention": (lambda seed, columns: attention.draw(seed, 1, 3, 4, 2, 8), {"heads": 2, "width": 16}),
    "QuantLayerNorm": (lambda seed, columns: norm.draw(seed, 2, 8, columns=columns), norm.HOW),
    "QuantPatches": (lambda seed, columns: patches.draw(seed, (1, 3, 8, 8)), {"patch": (4, 4)}),
    "QuantDepthwise": (lambda seed, columns: depthwise.draw(seed, (2, 6, 7, 5), (3, 3), columns=columns), {"group": 5}),
    "QuantLookup": (lambda seed, columns: lookup.draw(seed, (2, 8)), {}),
    "QuantAdd": (lambda seed, columns: adding.draw(seed, (5, 70), adding.NUMBERS if columns else ()), {}),
}  # fmt: skip


def small(name, seed=0, columns=False):
    """-> op, inputs, attributes, and the inputs but the first, which a graph mostly holds as constants."""
    draw, attributes = SMALL[name]
    feeds = draw(seed, columns)
    return NAMED[name], feeds, attributes, list(NAMED[name].inputs)[1:]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_what_is_constant_does_as_what_is_fed(library, name, columns):
    """All that may be, or all of it but one; in a second run too. Of other numbers that are fed others come."""
    op, feeds, attributes, held = small(name, 1, columns)
    fed = session(op, feeds, attributes, library=library)
    for inputs in (feeds, small(name, 3, columns)[1], feeds):
        answer = fed.run(None, inputs)
        for free in (None, *held):
            constants = [one for one in held if one != free]
            at_hand = session(op, inputs, attributes, library=library, constants=constants)
            for _ in range(2):
                found = at_hand.run(None, {one: array for one, array in inputs.items() if one not in constants})
                for part, expected in zip(found, answer, strict=True):
                    np.testing.assert_array_equal(part, expected, strict=True)


WINDOW = {"strides": (1, 1), "pads": (2, 2, 2, 2), "group": 100}
LARGE = [
    (SOFTMAX, reference.softmax, rows(12, 640, 197), {}),
    (QUANT_LINEAR, reference.quant_linear, linear.draw(4, [50, 768], 768), {"activation": 2}),
    (QUANT_LINEAR_TO_FLOAT, reference.quant_linear_to_float, linear.draw(5, [1, 600, 700], 130, True), {}),
    (QUANT_POINTWISE, reference.quant_pointwise, linear.draw(6, [2, 20, 20, 300], 130), {}),
    (QUANT_ATTENTION, reference.quant_attention, attention.draw(0, 2, 50, 50, 12, 64), {"heads": 12, "width": 768}),
    (QUANT_LAYER_NORM, reference.quant_layer_norm, norm.draw(5, 1, 1200, 64, columns=True), norm.HOW),
    (QUANT_PATCHES, reference.quant_patches, patches.draw(1, (1, 3, 260, 260)), {"patch": (3, 3), "strides": (2, 2)}),
    (QUANT_DEPTHWISE, reference.quant_depthwise, depthwise.draw(2, (2, 70, 70, 100), (5, 5)), WINDOW),
    (QUANT_LOOKUP, reference.quant_lookup, lookup.draw(2, (3, 300_001)), {}),
    (QUANT_ADD, reference.quant_add, adding.draw(2, (5001, 77), adding.NUMBERS), {}),
]


@pytest.mark.parametrize(("op", "oracle", "feeds", "attributes"), LARGE, ids=[op.name for op, *_ in LARGE])
def test_threads_share_what_is_large(library, op, oracle, feeds, attributes):
    """ONNX Runtime's, and those that use one session at once."""
    held = list(op.inputs)[1:]
    fed = {name: array for name, array in feeds.items() if name not in held}
    alone, two, three = (
        session(op, feeds, attributes, library=library, constants=held, threads=threads) for threads in (1, 2, 3)
    )
    answer, expected = alone.run(None, fed), oracle(**feeds, **attributes)
    for y, wanted in zip(answer, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert near(y, wanted) if y.dtype == np.uint8 else np.allclose(y, wanted, rtol=1e-5, atol=1e-5)
    gate = threading.Barrier(4)

    def work(_):
        gate.wait()
        return [alone.run(None, fed) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for found in (
            two.run(None, fed),
            three.run(None, fed),
            *(one for many in pool.map(work, range(4)) for one in many),
        ):
            assert all(np.array_equal(part, whole) for part, whole in zip(found, answer, strict=True))


@pytest.mark.parametrize(
    ("op", "place", "feeds", "attributes"),
    [
        (SOFTMAX, "x", rows(11, 300, 77), {"axis": 0}),
        (QUANT_LINEAR_TO_FLOAT, "residual", linear.draw(6, [60, 64], 64, True), {}),
        (QUANT_LOOKUP, "x", lookup.draw(4, (11, 70)), {}),
        (QUANT_ADD, "a", adding.draw(4, (11, 70)), {}),
        (QUANT_ADD, "b", adding.draw(4, (11, 70)), {}),
    ],
)
def test_in_the_place_of_an_input(library, op, place, feeds, attributes):
    """Between nodes, one of whose values has a second reader and must stay."""
    x, rest = feeds[place], {name: array for name, array in feeds.items() if name != place}
    back, join = (np.negative, np.add) if x.dtype == np.float32 else (np.invert, np.bitwise_xor)
    turn, both = ("Neg", "Add") if x.dtype == np.float32 else ("BitwiseNot", "BitwiseXor")
    inputs = lambda name: [name if one == place else one for one in op.inputs]  # noqa: E731
    nodes = [
        helper.make_node(turn, [place], ["p"]),
        node(op, inputs("p"), ["q"], **op.attributes | attributes),
        helper.make_node(turn, ["q"], ["r"]),
        node(op, inputs("r"), ["s"], **op.attributes | attributes),
        helper.make_node(both, ["r", "s"], ["t"]),
    ]
    made = model(nodes, {place: (x.dtype, x.shape)}, {"t": (x.dtype, x.shape)}, rest)
    (t,) = load(made, library, threads=2).run(None, {place: x})
    of = lambda array: run(op, feeds | {place: array}, attributes, library=library)[0]  # noqa: E731
    r = back(of(back(x)))
    np.testing.assert_array_equal(t, join(r, of(r)), strict=True)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("Softmax", "x"), ("QuantLinear", "x"), ("QuantLinearToFloat", "x"), ("QuantLayerNorm", ("x", "residual")),
        ("QuantDepthwise", "x"), ("QuantLookup", "x"), ("QuantAdd", "ab"),
    ],
)  # fmt: skip
def test_a_side_without_a_name_fits_any_other(library, name, places):
    """x is given a shape that is fed. What is added to our answer knows its sides, which -1 would not fit."""
    op, feeds, attributes, _ = small(name)
    (y,) = run(op, feeds, attributes, library=library)[:1]
    x, kind = feeds[places[0]], TensorProto.FLOAT if feeds[places[0]].dtype == np.float32 else TensorProto.UINT8
    nodes = [
        helper.make_node("Reshape", ["flat", "shape"], ["long"]),
        *(helper.make_node("Cast", ["long"], [place], to=kind) for place in places),
        node(op, op.inputs, ["y", *[""] * (len(op.outputs) - 1)], **op.attributes | attributes),
        helper.make_node("Cast", ["y"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["float", "known"], ["z"]),
    ]
    known = np.random.default_rng(0).normal(size=y.shape).astype(np.float32)
    inputs = {"flat": (x.dtype, [x.size]), "shape": (np.int64, [x.ndim]), "known": (np.float32, y.shape)}
    constants = {one: array for one, array in feeds.items() if one not in places}
    made = model(nodes, inputs, {"z": (np.float32, None), "y": (y.dtype, None)}, constants)
    z, same = load(made, library).run(None, {"flat": x.ravel(), "shape": np.array(x.shape), "known": known})
    assert same.shape == y.shape
    assert (z == same.astype(np.float32) + known).all()


EMPTY = [
    *((QUANT_LINEAR, linear.draw(0, shape, n), {}, (*shape[:-1], n))
      for shape, n in (([0, 8], 5), ([2, 0, 8], 5), ([3, 8], 0))),
    *((QUANT_LINEAR_TO_FLOAT, linear.draw(0, shape, n, True), {}, (*shape[:-1], n))
      for shape, n in (([0, 8], 5), ([2, 0, 8], 5), ([3, 8], 0))),
    *((QUANT_ADD, adding.draw(0, shape, columns), {}, shape)
      for shape in ((0,), (3, 0), (0, 5), (2, 0, 5)) for columns in ((), adding.NUMBERS)),
    *((QUANT_ATTENTION, attention.draw(0, *shape, 4, 2, 8), {"heads": 2, "width": 16}, (*shape, 16))
      for shape in ((0, 3), (2, 0))),
    (QUANT_LAYER_NORM, norm.draw(0, 2, 0, 8), norm.HOW, (2, 0, 8)),
    *((QUANT_DEPTHWISE, depthwise.draw(0, shape, (3, 3)), {"group": shape[3], "pads": pads}, (*y, shape[3]))
      for shape, pads, y in (
          ((0, 5, 5, 8), depthwise.NONE, (0, 3, 3)),
          ((1, 5, 5, 0), depthwise.NONE, (1, 3, 3)),
          ((1, 2, 5, 8), depthwise.NONE, (1, 0, 3)),  # the window does not fit
          ((2, 5, 1, 8), (1, 0, 1, 1), (2, 5, 0)),
          ((1, 0, 0, 8), depthwise.NONE, (1, 0, 0)),
      )),
]  # fmt: skip


@pytest.mark.parametrize(("op", "feeds", "attributes", "shape"), EMPTY)
def test_nothing_is_nothing(library, op, feeds, attributes, shape):
    for y in run(op, feeds, attributes, library=library):
        assert y.shape == shape


@pytest.mark.parametrize(("name", "place"), [(op.name, place) for op in OPS for place in op.inputs])
def test_another_type_is_refused(library, name, place):
    op, feeds, attributes, _ = small(name)
    with pytest.raises(Exception, match=r"tensor\(int32\)"):
        session(op, feeds | {place: feeds[place].astype(np.int32)}, attributes, library=library)


@pytest.mark.parametrize(
    ("name", "scale"), [(op.name, place) for op in OPS for place in op.inputs if place.endswith("_scale")]
)
def test_a_scale_is_positive_and_normal(library, name, scale):
    """What is refused once does a session no harm."""
    op, feeds, attributes, held = small(name, 0, True)
    fed = session(op, feeds, attributes, library=library)
    for value in (0, -1, np.nan, np.inf, 1e-39):
        wrong = feeds | {scale: feeds[scale].copy()}
        wrong[scale].flat[-1] = value
        if (scale, value) == ("p_scale", 0):  # that is the row's own step
            continue
        said = rf"{name}: {scale}(\[\d+\])? is .*; expected a positive, normal number"
        with pytest.raises(Exception, match=said) as refused:
            fed.run(None, wrong)
        assert type(refused.value).__name__ == "InvalidArgument"
        with pytest.raises(Exception, match=said):
            run(op, wrong, attributes, library=library, constants=held)
    fed.run(None, feeds)


WRONG_AXES = ([], 0), ([], -1), ([3], 1), ([3], -2), ([2, 3], 2), ([2, 3], -(2**63)), ([2, 3], 2**63 - 1)
# what an input or attribute is instead (a list: the shape of an input), and what is said
REFUSED = {
    "Softmax": [
        *(({"x": shape, "axis": axis}, f"axis is {axis} and x has the shape") for shape, axis in WRONG_AXES),
        ({"gamma": 0.1}, "expected -1e30 <= gamma <= 0 and 1 <= zeta <= 1e30"),
        ({"zeta": 0.5}, "zeta 0.5"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"zeta": float("nan")}, "zeta nan"),
        ({"gamma": float("-inf")}, "gamma is -inf"),
        ({"zeta": float("inf")}, "zeta inf"),
        ({"gamma": 0}, "gamma is not a float"),
        ({"zeta": "1"}, "zeta is not a float"),
        ({"zeta": [1.0]}, "zeta is not a float"),
        ({"axis": 1.0}, "axis is not an integer"),
        ({"axis": [0, 1]}, "axis is not an integer"),
        ({"axis": helper.make_tensor("t", TensorProto.INT64, [1], [0])}, "axis is not an integer"),
    ],
    "SoftNMS": [
        ({"scores": np.float32([0.5, 0.5, 0.5, np.nan, 0.5])}, "score 3 is NaN"),
        (
            {"boxes": [3, 5, 4], "scores": np.where(np.arange(15) == 14, np.nan, 0.5).reshape(3, 5), "classes": [3, 5]},
            "score 4 of image 2 is NaN",
        ),
        ({"scores": [4]}, r"scores has the shape \[4\]; expected \[5\].*\[5, 4\]"),
        ({"classes": [6]}, r"classes has the shape \[6\]; expected \[5\]"),
        ({"scores": [1, 5]}, r"scores has the shape \[1, 5\]; expected \[5\]"),
        ({"boxes": [5, 3]}, r"boxes has the shape \[5, 3\]; expected \[N, 4\] or \[B, N, 4\]"),
        ({"boxes": [4]}, r"boxes has the shape \[4\]"),
        ({"boxes": [1, 1, 5, 4]}, r"boxes has the shape \[1, 1, 5, 4\]"),
        ({"boxes": []}, r"boxes has the shape \[\]"),
        ({"method": np.array([3])}, "method is 3; expected 0 .hard., 1 .linear. or 2"),
        ({"method": np.array([-1])}, "method is -1"),
        ({"method": np.array([2**40])}, "method is 1099511627776"),
        ({"method": [2]}, r"method has the shape \[2\]; expected \[1\]"),
        ({"method": [0]}, r"method has the shape \[0\]"),
        ({"sigma": [1, 1]}, r"sigma has the shape \[1, 1\]"),
        ({"per_class": np.array([2])}, "per_class is 2; expected 0 or 1"),
        ({"iou_threshold": np.float32([np.nan])}, "iou_threshold is NaN"),
        ({"sigma": np.float32([0])}, "sigma is 0.0*; expected more than 0"),
        ({"sigma": np.float32([-1])}, "sigma is -1"),
        ({"sigma": np.float32([np.nan])}, "sigma is -?nan"),
        ({"min_score": np.float32([np.nan])}, "min_score is NaN"),
        ({"max_output": np.array([-1])}, "max_output is -1; expected 0 or more"),
    ],
    "ImageToPixels": [
        ({"image": [0, 5, 3]}, r"the picture has the shape \[0, 5, 3\]; expected sides within 1 to 65536"),
        ({"image": [65537, 1, 3]}, "expected sides within 1 to 65536"),
        ({"image": [5, 5, 4]}, r"the picture has the shape \[5, 5, 4\]; expected \[height, width, 3\]"),
        ({"image": [1, 5, 5, 3]}, r"expected \[height, width, 3\]"),
        ({"image": []}, r"expected \[height, width, 3\]"),
    ],
    "ImageToQuantizedPixels": [
        ({"size": (224,)}, "size has 1 numbers; expected height and width"),
        ({"size": (0, 5)}, r"size is \[0, 5\]; expected sides within 1 to 4096"),
        ({"size": (5, 4097)}, "expected sides within 1 to 4096"),
        ({"resize": "stretch"}, "resize is 'stretch'; expected one of shortest, exact, letterbox"),
        ({"resample": "nearest"}, "resample is 'nearest'; expected one of bilinear, bicubic"),
        ({"crop_offset": "ceil"}, "crop_offset is 'ceil'; expected one of round, floor"),
        ({"shortest": 223}, r"shortest is 223; expected the larger of size \[224, 224\] to 4096"),
        ({"shortest": 2**62}, "expected the larger of size"),
        ({"pad": 256}, "pad is 256; expected 0 to 255"),
        ({"pad": -1}, "pad is -1; expected 0 to 255"),
        ({"bias": (0.0, 0.0)}, "gain has 3 numbers and bias 2; expected 3 each"),
        ({"gain": (1.0, float("nan"), 1.0)}, "of channel 1; expected"),
        ({"bias": (float("inf"), 0.0, 0.0)}, "of channel 0; expected"),
        ({"scale": 0.0}, "scale is 0.000000; expected a finite number over 0"),
        ({"scale": float("nan")}, "expected a finite number over 0"),
        ({"zero_point": 256}, "zero_point is 256; expected 0 to 255"),
        ({"size": "big"}, "size has 0 numbers; expected height and width"),
        ({"pad": 1.5}, "the attribute pad cannot be read"),
    ],
    "QuantLinear": [
        ({"x": [2, 7]}, r"x has the shape \[2, 7\]; expected \[..., 8\], for the weight is \[8, 5\]"),
        ({"weight": [8]}, r"weight has the shape \[8\]; expected \[K, N\]"),
        ({"x_scale": [2]}, r"x_scale has the shape \[2\]; expected one number"),
        ({"weight_scale": [4]}, r"weight_scale has the shape \[4\]; expected one number, or \[5\]"),
        ({"y_scale": [4]}, r"y_scale has the shape \[4\]; expected one number, or \[5\]"),
        ({"y_zero": [5, 1]}, r"y_zero has the shape \[5, 1\]; expected one number, or \[5\]"),
        ({"activation": 5}, "activation is 5; expected 0 none"),
        ({"activation": -1}, "activation is -1"),
        ({"activation": 1.0}, "activation cannot"),
    ],
    "QuantLinearToFloat": [
        ({"x": []}, r"x has the shape \[\]; expected"),
        ({"weight": [65537, 1]}, r"weight has the shape \[65537, 1\]; expected at most 65536 rows"),
        ({"x_zero": [2]}, r"x_zero has the shape \[2\]; expected one number"),
        ({"bias": [1]}, r"bias has the shape \[1\]; expected \[5\]"),
        ({"bias": []}, r"bias has the shape \[\]; expected \[5\]"),
        ({"residual": [3, 5]}, r"residual has the shape \[3, 5\]; expected that of y, \[2, 5\], or one number"),
        ({"residual": [5]}, r"residual has the shape \[5\]"),
    ],
    "QuantPointwise": [
        ({"x": [2, 8]}, r"x has the shape \[2, 8\]; expected \[B, H, W, 8\]"),
    ],
    "QuantAttention": [
        ({"q": [1, 3]}, r"q has the shape \[1, 3\]; expected \[batch, tokens, columns\]"),
        ({"q": [1, 3, 15]}, r"q has the shape \[1, 3, 15\]; expected 16 columns from 0 on"),
        ({"k": [2, 4, 16]}, r"k has the shape \[2, 4, 16\]; expected the batch of q, 1"),
        ({"k": [1, 0, 16], "v": [1, 0, 16]}, r"k has the shape \[1, 0, 16\]; expected 1 to 65536 tokens"),
        ({"v": [1, 5, 16]}, r"v has the shape \[1, 5, 16\]; expected the batch and tokens of k, \[1, 4\]"),
        ({"q_scale": [2]}, r"q_scale has the shape \[2\]; expected one number"),
        ({"q_zero": [2]}, r"q_zero has the shape \[2\]; expected one number"),
        ({"y_scale": [15]}, r"y_scale has the shape \[15\]; expected one number, or \[16\]"),
        ({"y_zero": [1, 16]}, r"y_zero has the shape \[1, 16\]; expected one number, or \[16\]"),
        ({"mask": [3, 3]}, r"mask has the shape \[3, 3\]; expected \[1\], or .* to \[1, 2, 3, 4\]"),
        ({"mask": [2, 1, 3, 4]}, r"mask has the shape \[2, 1, 3, 4\]"),
        ({"mask": [1, 1, 1, 3, 4]}, r"mask has the shape \[1, 1, 1, 3, 4\]"),
        ({"mask": [4]}, r"mask has the shape \[4\]"),
        ({"mask": [1]}, "mask is one number, 1.0+; expected 0"),
        ({"heads": 3}, "width is 16 and heads 3; expected a width that the heads share evenly"),
        ({"heads": 0}, "heads is 0; expected 1 to"),
        ({"q_start": -1}, "q_start is -1; expected 0 to"),
        ({"gamma": 0.1}, "gamma is 0.1.* expected -1e30 <= gamma <= 0"),
        ({"zeta": 0.5}, "zeta 0.5"),
        ({"heads": 1, "width": 40000}, "at most 32768 each"),
        ({"gamma": -0.1}, r"p_scale is 0, gamma -0.1.*expected a p_scale over 0, or gamma 0 and zeta 1"),
    ],
    "QuantLayerNorm": [
        ({"x": []}, r"x has the shape \[\]; expected \[..., columns\], at least one"),
        ({"x": [2, 0]}, r"x has the shape \[2, 0\]; expected"),
        ({"residual": [1, 8]}, r"residual has the shape \[1, 8\]; expected that of x, \[2, 8\], or \[1\]"),
        ({"residual": [2]}, r"residual has the shape \[2\]"),
        ({"weight": [7]}, r"weight has the shape \[7\]; expected \[8\]"),
        ({"bias": [1, 8]}, r"bias has the shape \[1, 8\]; expected \[8\]"),
        ({"y_scale": [7]}, r"y_scale has the shape \[7\]; expected one number, or \[8\]"),
        ({"y_zero": [9]}, r"y_zero has the shape \[9\]; expected one number, or \[8\]"),
        ({"epsilon": -1.0}, r"epsilon is -1\.0.*; expected a number of at least 0"),
    ],
    "QuantPatches": [
        ({"x": [3, 8, 8]}, r"x has the shape \[3, 8, 8\]; expected \[batch, channels, height, width\]"),
        ({"patch": (4, 0)}, r"patch is \[4, 0\]; expected a height and a width"),
        ({"patch": (4, 4, 4)}, r"patch is \[4, 4, 4\]; expected a height and a width"),
        ({"strides": (1, -1)}, r"strides is \[1, -1\]; expected a step down and one to the right"),
        ({"strides": (1, 1, 1)}, r"strides is \[1, 1, 1\]; expected a step down"),
        ({"pads": (0, 0, 0, -1)}, r"pads is \[0, 0, 0, -1\]; expected top, left, bottom and right"),
        ({"strides": (1, 65537)}, r"strides is \[1, 65537\]; expected a step down and one to the right, up to 65536"),
        ({"pads": (1, 1)}, r"pads is \[1, 1\]; expected top, left"),
    ],
    "QuantDepthwise": [
        ({"x": [6, 7, 5]}, r"x has the shape \[6, 7, 5\]; expected \[batch, height, width, 5\], for group is 5"),
        ({"x": [2, 6, 7, 4]}, r"x has the shape \[2, 6, 7, 4\]; expected \[batch, height, width, 5\]"),
        ({"weight": [3, 5]}, r"weight has the shape \[3, 5\]; expected \[height, width, 5\], for group is 5"),
        ({"weight": [3, 3, 4]}, r"weight has the shape \[3, 3, 4\]; expected \[height, width, 5\]"),
        ({"weight": [0, 3, 5]}, r"weight has the shape \[0, 3, 5\]; expected a window of 1 to 65536 taps"),
        ({"weight": [257, 256, 5]}, r"weight has the shape \[257, 256, 5\]; expected a window of 1 to 65536 taps"),
        ({"x_scale": [2]}, r"x_scale has the shape \[2\]; expected one number, or \[5\]"),
        ({"x_zero": [5, 1]}, r"x_zero has the shape \[5, 1\]; expected one number, or \[5\]"),
        ({"weight_scale": [4]}, r"weight_scale has the shape \[4\]; expected one number, or \[5\]"),
        ({"bias": [1]}, r"bias has the shape \[1\]; expected \[5\]"),
        ({"y_scale": [4]}, r"y_scale has the shape \[4\]; expected one number, or \[5\]"),
        ({"y_zero": [0]}, r"y_zero has the shape \[0\]; expected one number, or \[5\]"),
        ({"strides": (1,)}, r"strides is \[1\]; expected 2 numbers, 1 to 2147483647"),
        ({"strides": (1, 0)}, r"strides is \[1, 0\]; expected 2 numbers, 1 to"),
        ({"pads": (0, 0)}, r"pads is \[0, 0\]; expected 4 numbers, 0 to"),
        ({"pads": (0, 0, -1, 0)}, r"pads is \[0, 0, -1, 0\]; expected 4 numbers"),
        ({"pads": (0, 0, 2**31, 0)}, r"pads is \[0, 0, 2147483648, 0\]; expected 4 numbers, 0 to 2147483647"),
        ({"group": -1}, r"group is -1; expected 0 to 2147483647"),
        ({"group": 4}, r"weight has the shape \[3, 3, 5\]; expected \[height, width, 4\], for group is 4"),
    ],
    "QuantLookup": [
        *(
            ({"table": list(shape)}, rf"table has the shape \[{said}\]; expected \[256\]")
            for shape, said in (((255,), "255"), ((257,), "257"), ((1, 256), "1, 256"), ((0,), "0"), ((), ""))
        ),
    ],
    "QuantAdd": [
        ({"b": [1, 70]}, r"b has the shape \[1, 70\]; .* \[5, 70\]"),
        ({"b": [70]}, r"b has the shape \[70\]; expected that of a, \[5, 70\]"),
        (
            {"y_scale": [69]},
            r"a has the shape \[5, 70\]; expected \[..., 69\], for scales or zero points are of 69 columns",
        ),
        ({"a_scale": [70], "b_zero": [69]}, r"a_scale has the shape \[70\]; expected one number, or \[69\]"),
        ({"a_zero": [1, 70]}, r"a_zero has the shape \[1, 70\]; expected one number, or \[1\]"),
        # steps too far apart
        (
            {"a_scale": np.array(1.001 * 2.0**20), "y_scale": []},
            r"a scale is 1049624.* times y_scale; expected at most 2\^20",
        ),
    ],
}


@pytest.mark.parametrize(("name", "change", "says"), [(name, *row) for name, table in REFUSED.items() for row in table])
def test_what_does_not_fit_is_refused_by_name(library, name, change, says):
    """Attributes when the model is loaded, what is fed when it runs, constants at either time."""
    op, feeds, attributes, held = small(name)
    for place, new in change.items():
        if place not in op.inputs:
            attributes = attributes | {place: new}
        elif isinstance(new, list):
            feeds = feeds | {place: np.ones(new, feeds[place].dtype)}
        else:
            feeds = feeds | {place: np.asarray(new, feeds[place].dtype)}
    with pytest.raises(Exception, match=f"{name}: .*{says}") as refused:
        run(op, feeds, attributes, library=library)
    if change.keys() & op.inputs.keys():
        assert type(refused.value).__name__ == "InvalidArgument"
    with pytest.raises(Exception, match=f"{name}: .*{says}"):
        run(op, feeds, attributes, library=library, constants=held)
