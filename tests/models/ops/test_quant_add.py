"""QuantAdd: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against Python's
fractions if steps are powers of two, and float64 otherwise."""

import ctypes
from fractions import Fraction

import numpy as np
import pytest

from calmclip.models.ops import reference
from calmclip.models.ops.spec import QUANT_ADD
from tests.models.ops.harness import BYTE_ISAS, Contract, Edge, kernel, kernels, near, run

BLOCK = 64
NUMBERS = ("a_scale", "a_zero", "b_scale", "b_zero", "y_scale", "y_zero")
# columns: a scalar, parts of a block, blocks with a remainder, many
SHAPES = [
    (), (1,), (7, 1), (2, 5, 3), (9, 16), (3, 4, 64), (5, 65), (31, 77), (2, 3, 7, 80), (2, 640), (3, 1025), (1, 2000),
]  # fmt: skip


class Block(ctypes.Structure):
    """`AddBlock` of quant_add.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
        *((name, ctypes.c_size_t) for name in ("rows", "step", "width")),
        *((name, ctypes.c_void_p) for name in ("a_factor", "b_factor", "start", "zero")),
    )


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Block))


def draw(seed, shape, columns=()):
    """``columns``: the inputs with one number per column."""
    random = np.random.default_rng(seed)

    def numbers(name, dtype, low, high):
        drawn = random.uniform(low, high, shape[-1:] if name in columns else ())
        return np.asarray(drawn, dtype)

    feeds = {}
    for name in "aby":
        if name != "y":
            feeds[name] = np.asarray(random.integers(0, 256, shape), np.uint8)
        feeds[f"{name}_scale"] = numbers(f"{name}_scale", np.float32, 0.01, 0.03)
        feeds[f"{name}_zero"] = numbers(f"{name}_zero", np.uint8, 60, 200)
    return feeds


def exact(feeds):
    """float64, before rounding."""
    real = {name: np.asarray(value, np.float64) for name, value in feeds.items()}
    a, b = ((real[x] - real[f"{x}_zero"]) * real[f"{x}_scale"] for x in "ab")
    return (a + b) / real["y_scale"] + real["y_zero"]


def pairs():
    """Every pair of bytes; a third of the sums are ties."""
    a, b = (x.astype(np.uint8).reshape(-1) for x in np.mgrid[:256, :256])
    scales = {"a_scale": 0.25, "b_scale": 0.5, "y_scale": 1.0}
    zeros = {"a_zero": 3, "b_zero": 160, "y_zero": 101}
    return (
        {"a": a, "b": b}
        | {name: np.array(value, np.float32) for name, value in scales.items()}
        | {name: np.array(value, np.uint8) for name, value in zeros.items()}
    )


def by_hand():
    """The sums of `pairs`; Python rounds fractions half to even."""
    rounded = {four: min(255, max(0, round(Fraction(four, 4)) + 101)) for four in range(-3 - 2 * 160, 256 + 2 * 256)}
    return np.array([rounded[a - 3 + 2 * (b - 160)] for a in range(256) for b in range(256)], np.uint8)


@pytest.fixture(params=BYTE_ISAS)
def add(library, request):
    """A kernel as a function of rows of bytes and the columns' numbers, between guard values."""
    function = kernel(library, "quant_add", request.param, PROTOTYPE)
    return lambda *arguments, **how: call(function, *arguments, **how)


def call(function, a, b, numbers, *, step=None, into=None):
    """a and b uint8 [rows, width]; rows are ``step`` apart; y has the memory that ``into`` names, or its own."""
    rows, width = a.shape
    step = step or width
    laid = {name: np.full(rows * step + 2 * BLOCK, 77, np.uint8) for name in "aby"}
    views = {name: memory[BLOCK : BLOCK + rows * step].reshape(rows, step) for name, memory in laid.items()}
    views["a"][:, :width], views["b"][:, :width] = a, b
    padded = [np.concatenate([x, np.zeros(BLOCK - width, x.dtype)]) for x in numbers]
    padded = [np.ascontiguousarray(x.reshape(-1, 4).T) for x in padded]  # `add_place`
    into = into or "y"
    ends = {name: views[name].ctypes.data for name in "ab"} | {"y": views[into].ctypes.data}
    names = ("a_factor", "b_factor", "start", "zero")
    ends |= {name: x.ctypes.data for name, x in zip(names, padded, strict=True)}
    function(ctypes.byref(Block(rows=rows, step=step, width=width, **ends)))
    y = views[into][:, :width].copy()
    views[into][:, :width] = 77
    assert (laid[into] == 77).all()
    return y


def numbers_of(seed, width):
    """Factors, start and zero of a block."""
    random = np.random.default_rng(seed)
    a, b = random.uniform(0.1, 1.5, (2, width)).astype(np.float32)
    start = random.uniform(-250, 50, width).astype(np.float32)
    return a, b, start, random.integers(0, 256, width).astype(np.int32)


def test_reference_equals_fractions():
    np.testing.assert_array_equal(reference.quant_add(**pairs()), by_hand())


def test_reference_refuses_shapes_that_differ():
    feeds = draw(0, (3, 4)) | {"b": np.zeros((1, 4), np.uint8)}
    with pytest.raises(ValueError, match=r"b has the shape \[1, 4\]; expected that of a, \[3, 4\]"):
        reference.quant_add(**feeds)


@pytest.mark.parametrize("into", ["a", "b", "y"])
def test_kernels_add_every_pair_of_bytes(add, into):
    """Also with y in the memory of an input. Includes sums beyond 8 bits, and every tie."""
    feeds = pairs()
    start = -(3 * 0.25 + 160 * 0.5)
    numbers = [np.full(BLOCK, number, np.float32) for number in (0.25, 0.5, start)] + [np.full(BLOCK, 101, np.int32)]
    a, b = (feeds[name].reshape(-1, BLOCK) for name in "ab")
    np.testing.assert_array_equal(add(a, b, numbers, into=into).reshape(-1), by_hand())


def test_kernels_take_any_width_and_any_step(add):
    random = np.random.default_rng(0)
    for width in range(1, BLOCK + 1):
        a, b = random.integers(0, 256, (2, 5, width)).astype(np.uint8)
        numbers = numbers_of(width, width)
        exact_y = a * numbers[0].astype(np.float64) + b * numbers[1].astype(np.float64) + numbers[2] + numbers[3]
        for step in (width, width + 1, width + 70):
            assert near(add(a, b, numbers, step=step), exact_y)


def test_kernels_agree_to_the_bit(library):
    """Also next to ties, which numbers of few digits often give."""
    functions = kernels(library, "quant_add", PROTOTYPE).values()
    random = np.random.default_rng(1)
    a, b = random.integers(0, 256, (2, 300, 61)).astype(np.uint8)
    for seed in range(20):
        numbers = [np.round(x, 1 + seed % 3).astype(x.dtype) for x in numbers_of(seed, 61)]
        first, *others = (call(function, a, b, numbers) for function in functions)
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_kernels_take_the_widest_steps_that_the_op_has(add):
    """2^20 steps of y each: no sum leaves int32, and sums beyond 8 bits are clipped."""
    most = np.full(BLOCK, 2.0**20, np.float32)
    start = np.full(BLOCK, -510 * 2.0**19, np.float32)
    zero = np.full(BLOCK, 255, np.int32)
    a = np.array([[0], [255], [0], [255], [128], [127]], np.uint8).repeat(BLOCK, 1)
    b = np.array([[0], [255], [255], [0], [128], [127]], np.uint8).repeat(BLOCK, 1)
    expected = np.array([[0], [255], [255], [255], [255], [0]], np.uint8).repeat(BLOCK, 1)
    np.testing.assert_array_equal(add(a, b, (most, most, start, zero)), expected)


def test_op_adds_every_pair_of_bytes(library):
    (y,) = run(QUANT_ADD, pairs(), {}, library=library)
    np.testing.assert_array_equal(y, by_hand(), strict=True)


def test_function_adds_every_pair_of_bytes_except_ties():
    """ONNX Runtime fuses it to a QLinearAdd, which adds the zero point first; an odd one changes how ties round."""
    (y,) = run(QUANT_ADD, pairs(), {}, library=None)
    real = exact(pairs())
    tie = real % 1 == 0.5
    np.testing.assert_array_equal(y[~tie], by_hand()[~tie], strict=True)
    assert np.abs(y[tie] - np.clip(real[tie], 0, 255)).max() == 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "columns",
    [(), *((name,) for name in NUMBERS), ("a_scale", "a_zero"), ("b_scale", "b_zero", "y_scale", "y_zero"), NUMBERS],
    ids="-".join,
)
def test_op_and_function_are_near_the_sum(library, shape, columns):
    feeds = draw(len(shape), shape, columns)
    for ops in (library, None):
        (y,) = run(QUANT_ADD, feeds, {}, library=ops)
        assert y.shape == shape
        assert near(y, exact(feeds))


def add_at_edge(function, edge: Edge, rows: int, width: int) -> None:
    ends = {name: edge.lay(np.zeros(rows * width, np.uint8)) for name in "aby"}
    ends |= {name: edge.lay(np.zeros(BLOCK, np.float32)) for name in ("a_factor", "b_factor", "start")}
    ends |= {"zero": edge.lay(np.zeros(BLOCK, np.int32))}
    function(ctypes.byref(Block(rows=rows, step=width, width=width, **ends)))


EDGES = [("quant_add", PROTOTYPE, add_at_edge, [(3, width) for width in range(1, BLOCK + 1)])]
CONTRACTS = [
    Contract(
        QUANT_ADD,
        lambda seed, columns: draw(seed, (5, 70), NUMBERS if columns else ()),
        refused=[
            ({"b": [1, 70]}, r"b has the shape \[1, 70\]; .* \[5, 70\]"),
            ({"b": [70]}, r"b has the shape \[70\]; expected that of a, \[5, 70\]"),
            (
                {"y_scale": [69]},
                r"a has the shape \[5, 70\]; expected \[..., 69\], because scales or zero points have 69 columns",
            ),
            ({"a_scale": [70], "b_zero": [69]}, r"a_scale has the shape \[70\]; expected one number, or \[69\]"),
            ({"a_zero": [1, 70]}, r"a_zero has the shape \[1, 70\]; expected one number, or \[1\]"),
            # scales too far apart
            (
                {"a_scale": np.array(1.001 * 2.0**20), "y_scale": []},
                r"a scale is 1049624.* times y_scale; expected at most 2\^20",
            ),
        ],
        large=(draw(2, (5001, 77), NUMBERS), {}),
        in_place=("a", "b"),
        any_side=("a", "b"),
        empty=[
            (draw(0, shape, columns), {}, shape)
            for shape in ((0,), (3, 0), (0, 5), (2, 0, 5))
            for columns in ((), NUMBERS)
        ],
    ),
]
