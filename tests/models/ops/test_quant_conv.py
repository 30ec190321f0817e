"""QuantConv: the oracle, both kernels of this processor, the op in ONNX Runtime and its function, against torch's
windows in float64, which sums integers exactly."""

import ctypes

import numpy as np
import onnx
import pytest
import torch

from calmclip.export.functions.quant_conv import quant_conv
from calmclip.models.ops import reference
from calmclip.models.ops.spec import DOMAIN, QUANT_CONV
from tests.models.ops import test_quant_linear as linear
from tests.models.ops.harness import ISAS, Contract, Edge, kernel, load, model, near, node, run, session

PANEL, PLACES, TILE, TILE_BLOCK, TILE_PLACES = 32, 14, 4, 7, 36
NONE, AROUND = (0, 0, 0, 0), (1, 1, 1, 1)
# x, window, columns, strides, pads: sides below, at and above tiles and panels; rows of windows that fill no whole
# words; windows larger than the picture, outside of it, and apart from each other; more weights than stay in a cache
CASES = [
    ((1, 5, 13, 32), (3, 3), 32, (1, 1), AROUND), ((2, 4, 29, 16), (3, 3), 16, (1, 1), AROUND),
    ((1, 9, 31, 64), (3, 3), 70, (2, 2), AROUND), ((1, 7, 30, 3), (3, 3), 33, (2, 2), (0, 0, 1, 1)),
    ((1, 3, 15, 5), (1, 1), 40, (1, 1), NONE), ((2, 9, 14, 6), (1, 1), 17, (2, 2), NONE),
    ((1, 6, 17, 9), (2, 5), 31, (1, 3), (0, 2, 1, 2)), ((1, 9, 12, 4), (5, 4), 65, (3, 1), (4, 1, 4, 2)),
    ((1, 2, 2, 7), (3, 3), 5, (1, 1), (3, 4, 2, 5)), ((1, 8, 40, 10), (2, 2), 9, (3, 5), (1, 0, 2, 1)),
    ((1, 1, 1, 33), (3, 3), 1, (1, 1), AROUND), ((1, 3, 28, 1), (3, 3), 2, (1, 1), NONE),
    ((1, 3, 9, 128), (3, 3), 70, (1, 1), AROUND), ((1, 2, 7, 516), (3, 3), 33, (1, 1), AROUND),
]  # fmt: skip
# x, columns, pads of a window of 3 x 3 with strides of 1: whole and partial tiles, blocks of tiles and panels
TILES = [
    ((1, 8, 16, 32), 32, AROUND), ((1, 9, 17, 64), 40, AROUND), ((2, 6, 7, 32), 70, (2, 0, 1, 3)),
    ((1, 12, 13, 96), 3, NONE), ((3, 4, 5, 32), 64, (0, 1, 4, 0)), ((1, 1, 1, 32), 33, (3, 3, 3, 3)),
]  # fmt: skip


class Work(ctypes.Structure):
    """`ConvWork` of csrc/kernels/quant_conv.h."""

    _fields_ = (
        ("of", linear.Work),
        *(
            (name, ctypes.c_size_t)
            for name in ("height", "width", "channels", "out_height", "out_width", "top", "left")
        ),
        *((name, ctypes.c_size_t) for name in ("high", "wide", "down", "across")),
        ("around", ctypes.c_uint8),
    )


class Part(ctypes.Structure):
    """`ConvPart` of the same file."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("first_row", "last_row", "first", "last")),
        *((name, ctypes.c_void_p) for name in ("lines", "room")),
    )


class TilesPart(ctypes.Structure):
    """`ConvTilesPart` of the same file."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("first", "last")),
        *((name, ctypes.c_void_p) for name in ("x", "sums", "room")),
    )


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Work), ctypes.POINTER(Part))
TILES_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Work), ctypes.POINTER(TilesPart))


def out_shape(x, window, columns, strides, pads):
    sides = (
        max(0, (side + before + behind - size) // stride + 1)
        for side, before, behind, size, stride in zip(x[1:3], pads[:2], pads[2:], window, strides, strict=True)
    )
    return (x[0], *sides, columns)


def convolved(x, weight, strides, pads, x_zero=0):
    """Exact integer sums."""
    top, left, bottom, right = pads
    centred = torch.from_numpy(x.astype(np.float64) - np.float64(x_zero)).permute(0, 3, 1, 2)
    centred = torch.nn.functional.pad(centred, (left, right, top, bottom))
    windows = torch.nn.functional.unfold(centred, weight.shape[:2], stride=strides)  # [B, C h w, P]
    kernels = torch.from_numpy(weight.astype(np.float64)).permute(2, 0, 1, 3).flatten(0, 2)
    sums = (windows.transpose(1, 2) @ kernels).numpy()
    return sums.reshape(out_shape(x.shape, weight.shape[:2], weight.shape[3], strides, pads))


def packed(weight):
    """[N/32][h][w C/4][32][4], padded with 0."""
    panels = [linear.packed(row.reshape(-1, weight.shape[3])) for row in weight]
    return np.ascontiguousarray(np.stack(panels, 1))


def packed_tiles(weight):
    """G w G' with G of Lavin and Gray, its rows times 4, 6, 6, 24, 24, 1: int16 [N/32][36][C/2][32][2]."""
    paper = [[1 / 4, 0, 0], [-1 / 6] * 3, [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6]]
    g = np.rint(np.array([*paper, [0, 0, 1]]) * np.array([[4], [6], [6], [24], [24], [1]]))
    tiles = np.einsum("ia,abcn,jb->ijcn", g, weight.astype(np.float64), g, optimize=True).reshape(
        TILE_PLACES, *weight.shape[2:]
    )
    channels, n = weight.shape[2:]
    padded = np.zeros((TILE_PLACES, channels, -(-n // PANEL) * PANEL), np.int16)
    padded[:, :, :n] = tiles
    return np.ascontiguousarray(padded.reshape(TILE_PLACES, channels // 2, 2, -1, PANEL).transpose(3, 0, 1, 4, 2))


class Call:
    """One call of a kernel: its work, and the arrays that it points to, each laid out by ``lay``."""

    def __init__(
        self, x, weight, strides, pads, lay, *, x_zero=0, scale=1.0, bias=0.0, y_scale=1.0, y_zero=0, floor=True
    ):
        """With a ``floor``, scale and bias are in steps of y."""
        n = weight.shape[3]
        panels = -(-n // PANEL)
        self.shape = out_shape(x.shape, weight.shape[:2], n, strides, pads)

        def columns(value, dtype):
            padded = np.zeros(panels * PANEL, dtype)
            padded[:n] = value
            return padded

        sums = weight.sum((0, 1, 2), dtype=np.int64)
        inverse = 1 / np.float32(y_scale)
        factor = np.float64(inverse) if floor else 1.0
        arrays = {
            "panels": packed(weight), "start": columns((-int(x_zero) * sums).astype(np.int32), np.int32),
            "signed_start": columns(((128 - int(x_zero)) * sums).astype(np.int32), np.int32),
            "scale": columns(np.float32(scale) * factor, np.float32),
            "bias": columns(np.float32(bias) * factor, np.float32),
            "inverse": columns(inverse, np.float32), "zero": columns(y_zero, np.int32), "x": x,
        }  # fmt: skip
        if floor:
            arrays["floor"] = columns(0, np.uint8)
        self.lay = lay
        self.work = Work(
            of=linear.Work(**{name: lay(array) for name, array in arrays.items()}, n=n),
            height=x.shape[1], width=x.shape[2], channels=x.shape[3], out_height=self.shape[1], out_width=self.shape[2],
            top=pads[0], left=pads[1], high=weight.shape[0], wide=weight.shape[1], down=strides[0], across=strides[1],
            around=x_zero,
        )  # fmt: skip
        self.panels = panels
        self.weight = weight

    def part(self, rows=None, panels=None):
        work = self.work
        line = (PLACES - 1) * min(work.across, work.wide) * work.channels + work.wide * work.channels + 3
        room = np.full((work.high + 1) * line, 77, np.uint8)
        lines = np.zeros(work.high, np.uintp)
        (first_row, last_row), (first, last) = rows or (0, self.shape[0] * self.shape[1]), panels or (0, self.panels)
        return Part(first_row, last_row, first, last, self.lay(lines), self.lay(room))

    @property
    def tiles(self):
        return self.shape[0] * -(-self.shape[1] // TILE) * -(-self.shape[2] // TILE)

    def tiles_part(self, first=0, last=None):
        numbers = TILE_PLACES * TILE_BLOCK
        room = [np.full(numbers * self.work.channels, 77, np.int16), np.full(numbers * PANEL, 77, np.int32),
                np.full(TILE_PLACES * self.work.channels, 77, np.uint8)]  # fmt: skip
        return TilesPart(
            self.lay(packed_tiles(self.weight)), first, self.tiles if last is None else last, *map(self.lay, room)
        )


class Kept:
    """Lays arrays out unaligned, and keeps them."""

    def __init__(self):
        self.arrays = []

    def __call__(self, array):
        array = np.ascontiguousarray(array)
        if array.dtype == np.uint8:
            array = np.concatenate([np.full(1, 77, np.uint8), array.ravel()])[1:]
        self.arrays.append(array)
        return array.ctypes.data


@pytest.fixture(params=[(name, isa) for name in ("quant_conv", "quant_conv_tiles") for isa in ISAS], ids="-".join)
def convolve(library, request):
    """A kernel as a function of bytes, its output between guard values. The kernel of tiles takes `TILES` alone."""
    name, isa = request.param
    tiled = name == "quant_conv_tiles"
    function = kernel(library, name, isa, TILES_PROTOTYPE if tiled else PROTOTYPE)

    def go(x, weight, strides=(1, 1), pads=AROUND, parts=((),), **how):
        call = Call(x, weight, strides, pads, lay=Kept(), **how)
        room = np.full(np.prod(call.shape) + 128, 99, np.uint8)
        y = room[64:-64].reshape(call.shape)
        call.work.of.bytes = y.ctypes.data
        for part in parts:
            function(call.work, call.tiles_part(*part) if tiled else call.part(*part))
        assert (room[:64] == 99).all()
        assert (room[-64:] == 99).all()
        return y.copy()

    go.tiled = tiled
    return go


def quantized(sums, scale, bias, y_scale, y_zero):
    """Before rounding, float64."""
    y = sums * np.float64(np.float32(scale)) + np.float64(np.float32(bias))
    return y / np.float64(np.float32(y_scale)) + y_zero


def draw(seed, shape, window, columns, *, per_column=False):
    """Inputs; results are about 1, in steps of about 0.02."""
    rng = np.random.default_rng(seed)
    each = columns if per_column else ()
    arrays = {
        "x": rng.integers(0, 256, shape), "x_scale": rng.uniform(0.01, 0.03), "x_zero": rng.integers(0, 256),
        "weight": rng.integers(-128, 128, (*window, shape[3], columns)),
        "weight_scale": rng.uniform(0.5, 1, columns if per_column or seed % 2 else ())
        / (80 * np.sqrt(np.prod(window) * shape[3])),
        "bias": rng.normal(0, 1, columns), "y_scale": rng.uniform(0.01, 0.03, each),
        "y_zero": rng.integers(0, 256, each),
    }  # fmt: skip
    types = {"x": np.uint8, "x_zero": np.uint8, "weight": np.int8, "y_zero": np.uint8}
    return {name: np.asarray(value, types.get(name, np.float32)) for name, value in arrays.items()}


def attributes(strides, pads):
    return {"strides": strides, "pads": pads}


def expected(feeds, strides, pads):
    """-> y before rounding, float64."""
    sums = convolved(feeds["x"], feeds["weight"], strides, pads, feeds["x_zero"])
    scale = feeds["x_scale"] * feeds["weight_scale"]
    return quantized(sums, scale, feeds["bias"], feeds["y_scale"], feeds["y_zero"].astype(np.float64))


# the kernels


def of_kernel(convolve, cases, tiles):
    return [(shape, (3, 3), columns, (1, 1), pads) for shape, columns, pads in tiles] if convolve.tiled else cases


@pytest.mark.parametrize("floor", [True, False])
def test_kernels_equal_torch(convolve, floor):
    for shape, window, columns, strides, pads in of_kernel(convolve, CASES, TILES):
        feeds = draw(3, shape, window, columns)
        scale, zero = feeds["x_scale"] * feeds["weight_scale"], int(feeds["x_zero"])
        how = {"scale": scale, "bias": feeds["bias"], "y_scale": feeds["y_scale"], "y_zero": feeds["y_zero"]}
        y = convolve(feeds["x"], feeds["weight"], strides, pads, x_zero=zero, floor=floor, **how)
        assert near(y, expected(feeds, strides, pads), most=2e-3), (shape, window, columns, strides, pads)


def test_sums_are_exact(convolve):
    """Steps of one: every sum is its own byte, whatever order and instructions computed it."""
    for shape, window, columns, strides, pads in of_kernel(convolve, CASES, TILES):
        rng = np.random.default_rng(1)
        x, zero = rng.choice([0, 1, 100, 254, 255], shape).astype(np.uint8), 100
        weight = rng.choice([-128, -127, 0, 1, 127], (*window, shape[3], columns)).astype(np.int8)
        sums = convolved(x, weight, strides, pads, zero)
        for offset in (0, 200_000, -100_000):
            y = convolve(x, weight, strides, pads, x_zero=zero, bias=offset, y_zero=128)
            assert (y == np.clip(sums + offset + 128, 0, 255)).all()


@pytest.mark.parametrize("zero", [0, 1, 255])
def test_the_greatest_possible_sums(convolve, zero):
    """The direct kernel sums 65536 products; tiles take under 131586 of |w| in a column."""
    window, channels = ((3, 3), 96) if convolve.tiled else ((32, 32), 64)
    for value, weight in ((255, -128), (255, 127), (0, -128), (zero, -128)):
        x, w = np.full((1, *window, channels), value, np.uint8), np.full((*window, channels, 2), weight, np.int8)
        y = convolve(x, w, pads=NONE, x_zero=zero, scale=2.0**-24, y_zero=128)
        exact = (value - zero) * weight * np.prod(window) * channels * 2.0**-24
        assert (y == np.clip(np.rint(exact) + 128, 0, 255)).all()


def test_values_outside_8_bits_are_clipped(convolve):
    x = np.full((1, 3, 3, 32), 255, np.uint8)
    bias = np.array([np.inf, -np.inf, 3e38], np.float32)
    for sign in (1, -1):
        y = convolve(x, np.full((3, 3, 32, 3), sign * 127, np.int8), scale=1e30, y_scale=1e-6, y_zero=7, floor=False)
        assert (y == (255 if sign > 0 else 0)).all()
    y = convolve(x, np.ones((3, 3, 32, 3), np.int8), pads=NONE, bias=bias, y_scale=1e-6, floor=False)
    assert y.tolist() == [[[[255, 0, 255]]]]


def test_parts_by_themselves(convolve):
    """Each number belongs to one part: rows and panels, or tiles."""
    feeds = draw(5, (2, 11, 30, 32), (3, 3), 70)
    whole = convolve(feeds["x"], feeds["weight"], scale=1e-3, y_zero=50)
    parts = [(0, 3), (3, 4), (4, 30), (30, 48)] if convolve.tiled else [
        (rows, panels) for rows in ((0, 1), (1, 13), (13, 22)) for panels in ((0, 1), (1, 3))
    ]  # fmt: skip
    assert (convolve(feeds["x"], feeds["weight"], parts=parts, scale=1e-3, y_zero=50) == whole).all()
    part = convolve(feeds["x"], feeds["weight"], parts=parts[1:2], scale=1e-3, y_zero=50)
    assert 0 < (part != 99).mean() < 0.5


# the oracle, the op and its function


@pytest.mark.parametrize(("shape", "window", "columns", "strides", "pads"), CASES)
def test_reference_equals_torch(shape, window, columns, strides, pads):
    feeds = draw(0, shape, window, columns, per_column=True)
    y = reference.quant_conv(**feeds, **attributes(strides, pads))
    assert near(y, expected(feeds, strides, pads), most=1e-4)


def test_reference_by_hand():
    """A window of 1 by 2, two channels, a column before the picture: 3 * 0 - 0 + 1 (4 - 3) + 2 (5 - 3) = 5."""
    feeds = {
        "x": np.array([4, 5, 1, 3], np.uint8).reshape(1, 1, 2, 2), "x_scale": np.float32(0.5), "x_zero": np.uint8(3),
        "weight": np.array([3, -1, 1, 2], np.int8).reshape(1, 2, 2, 1), "weight_scale": np.float32(4),
        "bias": np.array([1], np.float32), "y_scale": np.float32(2), "y_zero": np.uint8(20),
    }  # fmt: skip
    y = reference.quant_conv(**feeds, strides=(1, 1), pads=(0, 1, 0, 0))
    assert y.ravel().tolist() == [20 + 6, 20]  # 11 / 2 is a tie; 3 (1) - 1 (2) + 1 (-2) + 2 (0) = -1, so -1 / 2 is one
    with pytest.raises(ValueError, match=r"x has 1 channels; expected 2, because the weight is \(1, 2, 2, 1\)"):
        reference.quant_conv(**feeds | {"x": feeds["x"][..., :1]})


LARGER = [((1, 21, 23, 64), (3, 3), 48, (1, 1), AROUND), ((2, 20, 24, 32), (3, 3), 33, (1, 1), (0, 2, 1, 1))]


@pytest.mark.parametrize(("shape", "window", "columns", "strides", "pads"), [*CASES, *LARGER])
def test_op_equals_torch(library, shape, window, columns, strides, pads):
    """Constant weights of the larger cases run by tiles, fed ones do not, and the answers are the same."""
    feeds, how = draw(1, shape, window, columns), attributes(strides, pads)
    (y,) = run(QUANT_CONV, feeds, how, library=library)
    exact = expected(feeds, strides, pads)
    assert y.shape == exact.shape
    assert near(y, exact, most=1e-3)
    (same,) = run(QUANT_CONV, feeds, how, library=library, constants=[name for name in feeds if name != "x"])
    assert (same == y).all()


def test_weights_too_large_for_tiles_answer_the_same(library):
    """131586 of |w| in a column, or more: the sum of tiles would be known modulo less than it may be."""
    shape, how = (1, 20, 20, 128), attributes((1, 1), AROUND)
    feeds = draw(1, shape, (3, 3), 32) | {"weight": np.full((3, 3, 128, 32), -128, np.int8)}
    feeds |= {
        "x": np.full(shape, 255, np.uint8),
        "x_zero": np.array(0, np.uint8),
        "weight_scale": np.array(1e-6, np.float32),
    }
    (y,) = run(QUANT_CONV, feeds, how, library=library, constants=[name for name in feeds if name != "x"])
    assert near(y, expected(feeds, (1, 1), AROUND), most=1e-3)


@pytest.mark.parametrize(("shape", "window", "columns", "strides", "pads"), CASES)
def test_function_equals_torch(shape, window, columns, strides, pads):
    """ONNX Runtime rounds its bias to a step of the sums."""
    feeds = draw(2, shape, window, columns)
    (y,) = run(QUANT_CONV, feeds, attributes(strides, pads), library=None)
    assert near(y, expected(feeds, strides, pads))


def test_function_becomes_onnx_runtimes_own_convolution(library, tmp_path):
    """In 8 bits, channels last."""
    feeds = draw(1, (1, 12, 12, 20), (3, 3), 20)
    ends = [{f"x{i}": (np.uint8, ("b", 12, 12, 20))} for i in (0, 2)]
    chain = [
        node(QUANT_CONV, [f"x{i}", *list(feeds)[1:]], [f"x{i + 1}"], **attributes((1, 1), AROUND)) for i in range(2)
    ]
    proto = model(chain, *ends, {name: array for name, array in feeds.items() if name != "x"}, [quant_conv()])
    load(proto, None, path=tmp_path / "left.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "left.onnx").graph.node]
    assert kinds == ["QLinearConv"] * 2
    load(proto, library, path=tmp_path / "ours.onnx")
    assert [node.domain for node in onnx.load(tmp_path / "ours.onnx").graph.node] == [DOMAIN] * 2


def test_shapes_flow(library):
    feeds = draw(0, (2, 6, 7, 5), (3, 2), 4)
    how, constants = attributes((1, 1), (0, 2, 1, 0)), [name for name in feeds if name != "x"]

    def known(shape):
        more = {"constants": constants, "shapes": {"x": shape}}
        return session(QUANT_CONV, feeds, how, library=library, **more).get_outputs()[0].shape

    assert known(("b", 6, 7, 5)) == ["b", 5, 8, 4]
    assert known((2, 1, 7, 5)) == [2, 0, 8, 4]
    shape = known(("b", "h", 7, "c"))
    assert [shape[0], *shape[2:]] == ["b", 8, 4]
    assert isinstance(shape[1], str)


def convolve_at_edge(function, edge: Edge, shape, window, columns, strides, pads) -> None:
    feeds = draw(0, shape, window, columns)
    call = Call(feeds["x"], feeds["weight"], strides, pads, lay=edge.lay)
    call.work.of.bytes = edge.lay(np.zeros(call.shape, np.uint8))
    function(ctypes.byref(call.work), ctypes.byref(call.part()))


def convolve_tiles_at_edge(function, edge: Edge, shape, columns, pads) -> None:
    feeds = draw(0, shape, (3, 3), columns)
    call = Call(feeds["x"], feeds["weight"], (1, 1), pads, lay=edge.lay)
    call.work.of.bytes = edge.lay(np.zeros(call.shape, np.uint8))
    function(ctypes.byref(call.work), ctypes.byref(call.tiles_part()))


# a picture without pads ends where its memory ends
NARROW = [((1, 4, 14, channels), (3, 3), n, (1, 1), NONE) for channels in (1, 2, 3, 5) for n in (1, 16, 33)]
AT_THE_EDGE = [((1, 6, 6, 32), 32, NONE), ((1, 9, 10, 32), 31, NONE), ((2, 5, 5, 32), 33, AROUND)]
EDGES = [
    ("quant_conv", PROTOTYPE, convolve_at_edge, [*CASES, *NARROW]),
    ("quant_conv_tiles", TILES_PROTOTYPE, convolve_tiles_at_edge, AT_THE_EDGE),
]
CONTRACTS = [
    Contract(
        QUANT_CONV,
        lambda seed, columns: draw(seed, (2, 6, 7, 5), (3, 3), 4, per_column=columns),
        refused=[
            (
                {"x": [6, 7, 5]},
                r"x has the shape \[6, 7, 5\]; expected \[batch, height, width, 5\], because the weight is \[3, 3, 5",
            ),
            ({"x": [2, 6, 7, 4]}, r"x has the shape \[2, 6, 7, 4\]; expected \[batch, height, width, 5\]"),
            ({"weight": [3, 5, 4]}, r"weight has the shape \[3, 5, 4\]; expected \[height, width, C, N\]"),
            ({"weight": [0, 3, 5, 4]}, r"weight has the shape \[0, 3, 5, 4\]; expected a window of at least 1 x 1"),
            ({"weight": [65537, 1, 1, 4]}, r"weight has the shape .*; expected at most 65536 products a number"),
            ({"weight": [129, 128, 5, 4]}, r"weight has the shape .*; expected at most 65536 products a number"),
            ({"x_scale": [4]}, r"x_scale has the shape \[4\]; expected one number"),
            ({"x_zero": [2]}, r"x_zero has the shape \[2\]; expected one number"),
            ({"weight_scale": [3]}, r"weight_scale has the shape \[3\]; expected one number, or \[4\]"),
            ({"bias": [1]}, r"bias has the shape \[1\]; expected \[4\]"),
            ({"y_scale": [3]}, r"y_scale has the shape \[3\]; expected one number, or \[4\]"),
            ({"y_zero": [0]}, r"y_zero has the shape \[0\]; expected one number, or \[4\]"),
            ({"strides": (1,)}, r"strides is \[1\]; expected 2 numbers, 1 to 2147483647"),
            ({"strides": (0, 1)}, r"strides is \[0, 1\]; expected 2 numbers, 1 to"),
            ({"pads": (0, 0, -1, 0)}, r"pads is \[0, 0, -1, 0\]; expected 4 numbers"),
        ],
        large=(draw(2, (2, 70, 60, 64), (3, 3), 70), attributes((1, 1), AROUND)),
        any_side=("x",),
        empty=[
            (draw(0, shape, (3, 3), columns), {"pads": pads}, (*y, columns))
            for shape, columns, pads, y in (
                ((0, 5, 5, 8), 4, NONE, (0, 3, 3)),
                ((1, 5, 5, 8), 0, NONE, (1, 3, 3)),
                ((1, 2, 5, 8), 4, NONE, (1, 0, 3)),  # the window does not fit
                ((2, 5, 1, 8), 4, (1, 0, 1, 1), (2, 5, 0)),
            )
        ],
    ),
]
