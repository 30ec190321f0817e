"""QuantDepthwise: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against torch's
windows in float64, which sums integers exactly."""

import ctypes

import numpy as np
import onnx
import pytest
import torch

from calmclip.export.functions.quant_depthwise import quant_depthwise
from calmclip.models.ops import reference
from calmclip.models.ops.spec import DOMAIN, QUANT_DEPTHWISE
from tests.models.ops.harness import ISAS, Contract, Edge, kernel, load, model, near, node, run, session

BLOCK = 64
NONE = (0, 0, 0, 0)
# x, window, strides, pads: usual windows and others; sides below, at and above tiles and pieces; windows larger than
# the picture; windows outside of the picture
CASES = [
    ((1, 9, 9, 70), (5, 5), (1, 1), (2, 2, 2, 2)), ((2, 16, 16, 64), (7, 7), (1, 1), (3, 3, 3, 3)),
    ((1, 11, 35, 33), (7, 7), (2, 2), (3, 3, 3, 3)), ((1, 13, 27, 96), (3, 3), (2, 2), (0, 0, 1, 1)),
    ((1, 10, 50, 32), (3, 3), (1, 1), (1, 1, 1, 1)), ((3, 4, 3, 130), (5, 5), (2, 2), (2, 1, 2, 3)),
    ((1, 2, 2, 17), (7, 7), (1, 1), (3, 3, 3, 3)), ((1, 1, 1, 5), (3, 3), (1, 1), (4, 7, 5, 6)),
    ((1, 8, 9, 48), (3, 3), (3, 2), (1, 0, 2, 1)), ((1, 8, 9, 48), (3, 3), (1, 3), (1, 0, 2, 1)),
    ((1, 7, 70, 20), (1, 1), (1, 1), NONE), ((1, 12, 12, 65), (9, 4), (1, 2), (4, 1, 4, 2)),
    ((2, 6, 8, 3), (2, 5), (1, 1), (0, 2, 1, 2)), ((1, 12, 12, 10), (8, 7), (1, 1), (0, 3, 0, 3)),
    ((1, 0, 3, 40), (3, 3), (1, 1), (2, 1, 2, 1)), ((1, 3, 0, 40), (2, 2), (1, 1), (0, 1, 0, 1)),
]  # fmt: skip
CHANNELS = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 128, 160, 161)


class Work(ctypes.Structure):
    """`DepthwiseWork` of csrc/kernels/quant_depthwise.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_size_t) for name in ("batch", "height", "width", "channels", "out_height", "out_width")),
        *((name, ctypes.c_size_t) for name in ("top", "left", "h", "w", "down", "across")),
        *((name, ctypes.c_void_p) for name in ("weights", "around", "start", "scale", "bias", "inverse", "zero")),
    )


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Work), ctypes.c_size_t, ctypes.c_size_t)


def blocks(numbers):
    """[..., C] -> [..., C/64, 64], padded with 0: channels 0 .. 3, 16 .. 19, 32 .. 35, 48 .. 51, 4 .. 7, ..."""
    padded = np.zeros((*numbers.shape[:-1], -(-numbers.shape[-1] // BLOCK) * BLOCK), numbers.dtype)
    padded[..., : numbers.shape[-1]] = numbers
    return padded.reshape(*numbers.shape[:-1], -1, 4, 4, 4).swapaxes(-2, -3).reshape(*numbers.shape[:-1], -1, BLOCK)


def rows_at_once(window, strides):
    usual = window in ((3, 3), (5, 5), (7, 7)) and strides[1] in (1, 2)
    return (-(-window[0] // 4) * 4 - window[0]) // strides[0] + 1 if usual else 1


def packed(weight, strides):
    """[block][row of y][four rows of x][column of the window][channel][4]"""
    h, w, channels = weight.shape
    rows, fours = rows_at_once((h, w), strides), -(-h // 4)
    below = np.zeros((rows, fours * 4, w, channels), np.int8)
    for row in range(rows):
        below[row, row * strides[0] : row * strides[0] + h] = weight
    taps = blocks(below).reshape(rows, fours, 4, w, -1, BLOCK)
    return np.ascontiguousarray(taps.transpose(4, 0, 1, 3, 5, 2))


def units(y, window, strides):
    """The number of units: images, blocks, pieces of columns, strips of rows."""
    usual = window in ((3, 3), (5, 5), (7, 7)) and strides[1] in (1, 2)
    columns = 48 // (-(-window[0] // 4) + strides[1] - 1) // 4 * 4 if usual else 64
    strips = -(-y.shape[1] // rows_at_once(window, strides))
    return y.shape[0] * -(-y.shape[3] // BLOCK) * -(-y.shape[2] // columns) * strips


@pytest.fixture(params=ISAS)
def convolve(library, request):
    """A kernel as a function of bytes, its output between guard values. ``once``: scale and bias are in steps of y."""
    function = kernel(library, "quant_depthwise", request.param, PROTOTYPE)

    def go(
        x, weight, strides, pads, *, x_zero=0, scale=1.0, bias=0.0, y_scale=1.0, y_zero=0, once=False, only=slice(None)
    ):
        channels = x.shape[3]
        each = {
            "scale": np.float32(scale), "bias": np.float32(bias), "inverse": 1 / np.float32(y_scale),
            "zero": np.int32(y_zero), "around": np.uint8(x_zero),
        }  # fmt: skip
        each = {name: np.broadcast_to(number, channels) for name, number in each.items()}
        sums = -each["around"].astype(np.int64) * weight.sum((0, 1), dtype=np.int64)
        arrays = {
            "x": np.concatenate([np.full(1, 77, np.uint8), x.ravel()])[1:],  # unaligned
            "weights": packed(weight, strides),
            "around": np.ascontiguousarray(each.pop("around")),
            "start": blocks(sums.astype(np.int32)),
        } | {name: np.ascontiguousarray(blocks(numbers)) for name, numbers in each.items()}
        if once:
            del arrays["inverse"]
        shape = out_shape(x.shape, weight.shape, strides, pads)
        room = np.full(np.prod(shape) + 128, 99, np.uint8)
        y = room[64:-64].reshape(shape)
        work = Work(
            **{name: array.ctypes.data for name, array in arrays.items()}, y=y.ctypes.data,
            batch=x.shape[0], height=x.shape[1], width=x.shape[2], channels=channels,
            out_height=shape[1], out_width=shape[2], top=pads[0], left=pads[1],
            h=weight.shape[0], w=weight.shape[1], down=strides[0], across=strides[1],
        )  # fmt: skip
        first, last, _ = only.indices(units(y, weight.shape[:2], strides))
        function(work, first, last)
        assert (room[:64] == 99).all()
        assert (room[-64:] == 99).all()
        return y.copy()

    return go


def out_shape(x, weight, strides, pads):
    sides = (
        max(0, (side + before + behind - size) // stride + 1)
        for side, before, behind, size, stride in zip(x[1:3], pads[:2], pads[2:], weight[:2], strides, strict=True)
    )
    return (x[0], *sides, x[3])


def convolved(x, weight, strides, pads, x_zero=0):
    """Exact integer sums: torch's windows in float64, because its convolution of many groups is slow."""
    top, left, bottom, right = pads
    centred = torch.from_numpy(x.astype(np.float64) - np.asarray(x_zero, np.float64)).permute(0, 3, 1, 2)
    centred = torch.nn.functional.pad(centred, (left, right, top, bottom))
    windows = torch.nn.functional.unfold(centred, weight.shape[:2], stride=strides).unflatten(1, (x.shape[3], -1))
    kernels = torch.from_numpy(weight.astype(np.float64)).permute(2, 0, 1).flatten(1)
    sums = torch.einsum("bckp,ck->bpc", windows, kernels)
    return sums.reshape(out_shape(x.shape, weight.shape, strides, pads)).numpy()


def quantized(sums, scale, bias, y_scale, y_zero):
    """The spec: each step in float32, half to even."""
    steps = (sums.astype(np.float32) * np.float32(scale) + np.float32(bias)) * (1 / np.float32(y_scale))
    return np.clip(np.rint(steps) + y_zero, 0, 255)


def draw(seed, shape, window, *, columns=False):
    """Inputs; results are about 1, in steps of about 0.02. ``columns``: one scale and zero point per channel."""
    rng = np.random.default_rng(seed)
    channels, each = shape[3], shape[3] if columns else ()
    arrays = {
        "x": rng.integers(0, 256, shape),
        "x_scale": rng.uniform(0.01, 0.03, each),
        "x_zero": rng.integers(0, 256, each),
        "weight": rng.integers(-128, 128, (*window, channels)),
        "weight_scale": rng.uniform(0.5, 1, channels if columns or seed % 2 else ()) / (80 * np.sqrt(np.prod(window))),
        "bias": rng.normal(0, 1, channels),
        "y_scale": rng.uniform(0.01, 0.03, each),
        "y_zero": rng.integers(0, 256, each),
    }
    types = {"x": np.uint8, "x_zero": np.uint8, "weight": np.int8, "y_zero": np.uint8}
    return {name: np.asarray(value, types.get(name, np.float32)) for name, value in arrays.items()}


def attributes(feeds, strides, pads):
    return {"strides": strides, "pads": pads, "group": feeds["x"].shape[-1]}


def expected(feeds, strides, pads):
    """-> y before rounding, float64."""
    sums = convolved(feeds["x"], feeds["weight"], strides, pads, feeds["x_zero"])
    scale = feeds["x_scale"] * feeds["weight_scale"]
    return (sums * scale.astype(np.float64) + feeds["bias"]) / feeds["y_scale"].astype(np.float64) + feeds["y_zero"]


# the kernels


@pytest.mark.parametrize(("shape", "window", "strides", "pads"), CASES)
def test_kernels_equal_float32(convolve, shape, window, strides, pads):
    """The same bits for every instruction set."""
    feeds = draw(3, shape, window, columns=True)
    output = {name: feeds[name] for name in ("bias", "y_scale", "y_zero")}
    scale = feeds["x_scale"] * feeds["weight_scale"]
    sums = convolved(feeds["x"], feeds["weight"], strides, pads, feeds["x_zero"])
    y = convolve(feeds["x"], feeds["weight"], strides, pads, x_zero=feeds["x_zero"], scale=scale, **output)
    assert (y == quantized(sums, scale, **output)).all()


@pytest.mark.parametrize(("shape", "window", "strides", "pads"), CASES)
def test_kernels_round_once_to_float32(convolve, shape, window, strides, pads):
    """In steps of y; the same bits for every instruction set."""
    feeds = draw(6, shape, window, columns=True)
    scale = feeds["x_scale"] * feeds["weight_scale"] / feeds["y_scale"]
    bias, zero = feeds["bias"] / feeds["y_scale"], feeds["y_zero"]
    sums = convolved(feeds["x"], feeds["weight"], strides, pads, feeds["x_zero"])
    steps = (sums.astype(np.longdouble) * scale + bias).astype(np.float32)
    arrays = {"x_zero": feeds["x_zero"], "scale": scale, "bias": bias, "y_zero": zero}
    y = convolve(feeds["x"], feeds["weight"], strides, pads, once=True, **arrays)
    assert (y == np.clip(np.rint(steps) + zero, 0, 255)).all()


@pytest.mark.parametrize("zero", [0, 5, 255])
def test_one_rounding_is_not_two(convolve, zero):
    """7 times the nearest number to 1 / 7 is over 1 by less than half a step of float32."""
    x, w, scale = np.full((1, 1, 1, 1), 7, np.uint8), np.full((1, 1, 1), 1, np.int8), np.float32(1 / 7)
    assert np.float32(7) * scale == 1
    for once, steps in ((False, 0), (True, 1)):  # 1/2 is a tie
        y = convolve(x, w, (1, 1), NONE, once=once, scale=scale, bias=-0.5, y_zero=zero)
        assert y.item() == min(steps + zero, 255)


@pytest.mark.parametrize("channels", CHANNELS)
def test_kernels_with_any_number_of_channels(convolve, channels):
    for window, strides in (((3, 3), (1, 1)), ((5, 5), (2, 2)), ((2, 3), (1, 1))):
        feeds = draw(channels, (1, 6, 9, channels), window)
        sums = convolved(feeds["x"], feeds["weight"], strides, (1, 1, 1, 1), 9)
        y = convolve(feeds["x"], feeds["weight"], strides, (1, 1, 1, 1), x_zero=9, scale=1e-3, y_scale=0.1, y_zero=99)
        assert (y == quantized(sums, 1e-3, 0, 0.1, 99)).all()


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_with_any_number_of_columns_and_rows(convolve, size, stride):
    for side in (*range(1, 20), 24, 25, 26, 47, 48, 49, 50, 51):
        for shape in ((1, 3, side, 40), (1, side, 3, 40)):
            feeds, pads = draw(side, shape, (size, size)), (size // 2,) * 4
            sums = convolved(feeds["x"], feeds["weight"], (stride, stride), pads, 100)
            how = {"x_zero": 100, "scale": 1e-3, "y_zero": 128, "once": side % 3 == 0}
            y = convolve(feeds["x"], feeds["weight"], (stride, stride), pads, **how)
            assert (y == quantized(sums, 1e-3, 0, 1, 128)).all()


@pytest.mark.parametrize("zero", [0, 1, 255])
def test_the_greatest_possible_sums(convolve, zero):
    """65536 products of 255 and -128 fit int32; the correction for the zero point alone may not."""
    for value, weight in ((255, -128), (255, 127), (0, -128), (zero, -128)):
        x, w = np.full((1, 256, 256, 2), value, np.uint8), np.full((256, 256, 2), weight, np.int8)
        y = convolve(x, w, (1, 1), NONE, x_zero=zero, scale=2.0**-24, y_zero=128)
        assert (y == quantized(np.float64((value - zero) * weight * 65536), 2.0**-24, 0, 1, 128)).all()


@pytest.mark.parametrize("window", [(3, 3), (5, 5), (7, 7), (4, 2)])
def test_neighbouring_products_do_not_saturate(convolve, window):
    """Two products of any sign overflow 16 bits."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x = rng.choice([0, 1, 128, 255], (1, 9, 9, 66)).astype(np.uint8)
        w = rng.choice([-128, -127, 127], (*window, 66)).astype(np.int8)
        y = convolve(x, w, (1, 1), NONE, scale=1e-3, y_zero=128)
        assert (y == quantized(convolved(x, w, (1, 1), NONE), 1e-3, 0, 1, 128)).all()


@pytest.mark.parametrize("zero", [0, 1, 127, 255])
def test_ties_go_to_the_even_step_before_the_zero_point_is_added(convolve, zero):
    x = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(2, 3)
    y = convolve(x, np.array([[[1, -1]]], np.int8), (1, 1), NONE, scale=0.5, y_zero=zero)
    steps = [[round(sign * value / 2) + zero for sign in (1, -1)] for value in range(256)]  # round: half to even
    assert (y[0, 0] == np.clip(steps, 0, 255)).all()


def test_values_outside_8_bits_are_clipped(convolve):
    x, bias = np.full((1, 3, 3, 3), 255, np.uint8), np.array([np.inf, -np.inf, 3e38], np.float32)
    for scale in (1.0, 1e30):
        for sign in (1, -1):
            y = convolve(x, np.full((3, 3, 3), sign * 127, np.int8), (1, 1), NONE, scale=scale, y_scale=1e-6, y_zero=7)
            assert (y == (255 if sign > 0 else 0)).all()
        w = np.ones((3, 3, 3), np.int8)
        assert convolve(x, w, (1, 1), NONE, scale=scale, bias=bias, y_scale=1e-6).tolist() == [[[[255, 0, 255]]]]


@pytest.mark.parametrize(("shape", "window", "strides", "pads"), CASES[:13])
def test_units_by_themselves(convolve, shape, window, strides, pads):
    """Each number belongs to one unit."""
    feeds = draw(5, shape, window)
    full = convolve(feeds["x"], feeds["weight"], strides, pads, scale=1e-3, y_zero=50) % 98
    count = units(full, window, strides)
    written = np.zeros_like(full, int)
    for unit in range(count):
        y = convolve(feeds["x"], feeds["weight"], strides, pads, scale=1e-3, y_zero=50, only=slice(unit, unit + 1))
        written += (y != 99) & (y % 98 == full)
        assert ((y == 99) | (y % 98 == full)).all()
    assert count > 0
    assert written.max() <= 1
    assert (written == 1).mean() > 0.9  # the others are 99 by chance


# the oracle, the op and its function


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("shape", "window", "strides", "pads"), CASES)
def test_reference_equals_torch(shape, window, strides, pads, columns):
    feeds = draw(0, shape, window, columns=columns)
    y = reference.quant_depthwise(**feeds, **attributes(feeds, strides, pads))
    assert near(y, expected(feeds, strides, pads), most=1e-4)


def test_reference_by_hand():
    """A window of 1 by 2, a stride of 2, a column before the picture: -1 * 0 + 2 (4 - 3) and -1 (7 - 3) + 2 (2 - 3)."""
    feeds = {
        "x": np.array([4, 7, 2], np.uint8).reshape(1, 1, 3, 1), "x_scale": np.float32(0.5), "x_zero": np.uint8(3),
        "weight": np.array([-1, 2], np.int8).reshape(1, 2, 1), "weight_scale": np.float32(4),
        "bias": np.array([3], np.float32), "y_scale": np.float32(2), "y_zero": np.uint8(20),
    }  # fmt: skip
    y = reference.quant_depthwise(**feeds, strides=(1, 2), pads=(0, 1, 0, 0), group=1)
    assert y.ravel().tolist() == [20 + 4, 20 - 4]  # 7 / 2 and -9 / 2 are ties
    with pytest.raises(ValueError, match="group is 2 and x has 1 channels"):
        reference.quant_depthwise(**feeds, strides=(1, 2), pads=(0, 1, 0, 0), group=2)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("shape", "window", "strides", "pads"), CASES)
def test_op_equals_torch(library, shape, window, strides, pads, columns):
    feeds = draw(1, shape, window, columns=columns)
    how = attributes(feeds, strides, pads)
    (y,) = run(QUANT_DEPTHWISE, feeds, how, library=library)
    exact = expected(feeds, strides, pads)
    assert y.shape == exact.shape
    assert near(y, exact, most=1e-3)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("shape", "window", "strides", "pads"), CASES[:14])
def test_function_equals_torch(shape, window, strides, pads, columns):
    """ONNX Runtime rounds its bias to a step of the sums."""
    feeds = draw(2, shape, window, columns=columns)
    (y,) = run(QUANT_DEPTHWISE, feeds, attributes(feeds, strides, pads), library=None)
    assert near(y, expected(feeds, strides, pads), most=1e-2)


def test_far_outside_the_output_is_the_bias(library):
    """Whole strips and pieces outside of a picture of 1 by 1."""
    feeds = draw(4, (1, 1, 1, 40), (3, 3))
    how = attributes(feeds, (1, 1), (40, 300, 60, 500))
    (y,) = run(QUANT_DEPTHWISE, feeds, how, library=library)
    assert near(y, expected(feeds, (1, 1), (40, 300, 60, 500)), most=1e-4)
    assert (y != y[0, 0, 0]).any(-1).sum() == 9


def test_function_becomes_onnx_runtimes_own_convolution(library, tmp_path):
    """In 8 bits, channels last, with no other node in a chain. Its bias is rounded to a step of the sums."""
    feeds = draw(1, (1, 12, 12, 40), (3, 3))
    how = attributes(feeds, (1, 1), (1, 1, 1, 1))
    ends = [{f"x{i}": (np.uint8, ("b", 12, 12, 40))} for i in (0, 3)]
    chain = [node(QUANT_DEPTHWISE, [f"x{i}", *list(feeds)[1:]], [f"x{i + 1}"], **how) for i in range(3)]
    proto = model(chain, *ends, {name: array for name, array in feeds.items() if name != "x"}, [quant_depthwise()])
    load(proto, None, path=tmp_path / "left.onnx")
    nodes = onnx.load(tmp_path / "left.onnx").graph.node
    assert [node.op_type for node in nodes] == ["QLinearConv"] * 3
    load(proto, library, path=tmp_path / "ours.onnx")
    assert [node.domain for node in onnx.load(tmp_path / "ours.onnx").graph.node] == [DOMAIN] * 3
    for ops in (library, None):
        (y,) = run(QUANT_DEPTHWISE, feeds, how, library=ops, constants=[name for name in feeds if name != "x"])
        assert near(y, expected(feeds, (1, 1), (1, 1, 1, 1)))


def test_shapes_flow(library):
    feeds = draw(0, (2, 6, 7, 5), (3, 2))
    how, constants = attributes(feeds, (1, 1), (0, 2, 1, 0)), [name for name in feeds if name != "x"]

    def known(shape):
        more = {"constants": constants, "shapes": {"x": shape}}
        return session(QUANT_DEPTHWISE, feeds, how, library=library, **more).get_outputs()[0].shape

    assert known(("b", 6, 7, 5)) == ["b", 5, 8, 5]
    assert known((2, 2, 7, 5)) == [2, 1, 8, 5]
    assert known((2, 1, 7, 5)) == [2, 0, 8, 5]
    shape = known(("b", "h", 7, "c"))
    assert [shape[0], *shape[2:]] == ["b", 8, "c"]
    assert isinstance(shape[1], str)


def convolve_at_edge(function, edge: Edge, channels: int, size: int, stride: int) -> None:
    """A picture that ends within a window, a strip and a tile."""
    height, width, window, strides = 6, 9, (size, size), (stride, stride)
    feeds, pads = draw(0, (1, height, width, channels), window), (size // 2, size // 2, 0, size - 1)
    shape = out_shape(feeds["x"].shape, feeds["weight"].shape, strides, pads)
    each = {name: blocks(np.ones(channels, np.float32)) for name in ("scale", "bias", "inverse")}
    each |= {name: blocks(np.ones(channels, np.int32)) for name in ("start", "zero")}
    ends = {name: edge.lay(numbers) for name, numbers in each.items()}
    y = np.zeros(shape, np.uint8)
    work = Work(
        x=edge.lay(feeds["x"]), y=edge.lay(y), batch=1, height=height, width=width, channels=channels,
        out_height=shape[1], out_width=shape[2], top=pads[0], left=pads[1], h=size, w=size, down=stride, across=stride,
        weights=edge.lay(packed(feeds["weight"], strides)), around=edge.lay(np.zeros(channels, np.uint8)),
        **ends,
    )  # fmt: skip
    function(ctypes.byref(work), 0, units(y, window, strides))


EDGES = [
    (
        "quant_depthwise",
        PROTOTYPE,
        convolve_at_edge,
        [(channels, size, stride) for channels in CHANNELS for size in (2, 3, 5, 7) for stride in (1, 2)],
    ),
]
CONTRACTS = [
    Contract(
        QUANT_DEPTHWISE,
        lambda seed, columns: draw(seed, (2, 6, 7, 5), (3, 3), columns=columns),
        attributes={"group": 5},
        refused=[
            (
                {"x": [6, 7, 5]},
                r"x has the shape \[6, 7, 5\]; expected \[batch, height, width, 5\], because group is 5",
            ),
            ({"x": [2, 6, 7, 4]}, r"x has the shape \[2, 6, 7, 4\]; expected \[batch, height, width, 5\]"),
            ({"weight": [3, 5]}, r"weight has the shape \[3, 5\]; expected \[height, width, 5\], because group is 5"),
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
            ({"group": 4}, r"weight has the shape \[3, 3, 5\]; expected \[height, width, 4\], because group is 4"),
        ],
        large=(draw(2, (2, 70, 70, 100), (5, 5)), {"strides": (1, 1), "pads": (2, 2, 2, 2), "group": 100}),
        any_side=("x",),
        empty=[
            (draw(0, shape, (3, 3)), {"group": shape[3], "pads": pads}, (*y, shape[3]))
            for shape, pads, y in (
                ((0, 5, 5, 8), NONE, (0, 3, 3)),
                ((1, 5, 5, 0), NONE, (1, 3, 3)),
                ((1, 2, 5, 8), NONE, (1, 0, 3)),  # the window does not fit
                ((2, 5, 1, 8), (1, 0, 1, 1), (2, 5, 0)),
                ((1, 0, 0, 8), NONE, (1, 0, 0)),
            )
        ],
    ),
]
