"""QuantLinear and QuantLinearToFloat: every kernel of this processor, and the ops in ONNX Runtime.

Against numpy's integers, torch's activations, and ONNX Runtime's own nodes.
"""

import ctypes

import numpy as np
import onnx
import pytest
import torch

from calmclip.models.ops import reference
from calmclip.models.ops.library import mask
from calmclip.models.ops.spec import (
    ACTIVATIONS,
    DOMAIN,
    QUANT_LINEAR,
    QUANT_LINEAR_TO_FLOAT,
    QUANT_POINTWISE,
    QUANT_ROWS_LINEAR,
)
from tests.models.ops import harness
from tests.models.ops.harness import ISAS, Contract, Edge, kernel, kernels

PANEL = 32
ACTIVATE = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": torch.nn.functional.silu,
}


class Work(ctypes.Structure):
    """`LinearWork` of csrc/kernels/quant_linear.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("rows", "k", "n")),
        *((name, ctypes.c_void_p) for name in ("panels", "start", "scale", "bias", "inverse", "zero", "floor")),
        *((name, ctypes.c_int32) for name in ("activation", "one_residual")),
        *((name, ctypes.c_void_p) for name in ("residual", "values", "bytes", "row_scale")),
        ("gated", ctypes.c_int32),
        ("signed_start", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
    )


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Work), ctypes.c_size_t, ctypes.c_size_t)


def packed(w):
    """[N/32][K/4][32][4], padded with 0."""
    k, n = w.shape
    padded = np.zeros((-(-k // 4) * 4, -(-n // PANEL) * PANEL), np.int8)
    padded[:k, :n] = w
    return np.ascontiguousarray(
        padded.reshape(padded.shape[0] // 4, 4, padded.shape[1] // PANEL, PANEL).transpose(2, 0, 3, 1)
    )


def ordered(library, panels):
    """The order of packed panels: [N/32, 4, K/4 + 3], by `order_linear`."""
    count, steps = panels.shape[:2]
    order = np.zeros((count, 4, steps + 3), np.uint16)
    library.handle.calmclip_order_linear(
        ctypes.c_void_p(panels.ctypes.data), ctypes.c_size_t(4 * steps), ctypes.c_size_t(count),
        ctypes.c_void_p(order.ctypes.data),
    )  # fmt: skip
    return order


@pytest.fixture(params=[*ISAS, *(f"{isa} ordered" for isa in ISAS if isa == "avx2")])
def run(library, request):
    """The kernel as a function of x [rows, K] and w [K, N], its output between guard values."""
    isa, *order = request.param.split()
    function = kernel(library, "quant_linear", isa, PROTOTYPE)

    def run(x, w, *, zero=0, scale=1.0, bias=0.0, activation="none", y=None, residual=0.0, inplace=False, panels=None,
            floor=None):  # fmt: skip
        """``y``: scale and zero point, for uint8 output. With a ``floor``, scale and bias are in steps of y."""
        (rows, k), n = x.shape, w.shape[1]
        count = -(-n // PANEL)

        def columns(value, dtype):
            padded = np.zeros(count * PANEL, dtype)
            padded[:n] = value
            return padded

        sums = columns(w.sum(0, dtype=np.int64), np.int64)
        arrays = {
            "x": np.concatenate([np.full(1, 77, np.uint8), x.ravel()])[1:],  # unaligned
            "panels": packed(w),
            "start": (-zero * sums).astype(np.int32),
            "signed_start": ((128 - zero) * sums).astype(np.int32),
            "scale": columns(scale, np.float32),
            "bias": columns(bias, np.float32),
            "inverse": columns(1 / np.float32(y[0]) if y else 0, np.float32),
            "zero": columns(y[1] if y else 0, np.int32),
            "residual": np.array(residual, np.float32).reshape(-1),
        }
        if floor is not None:
            arrays["floor"] = columns(floor, np.uint8)
        if order:
            arrays["order"] = ordered(library, packed(w[: k // 4 * 4]))
        dtype, guard = (np.uint8 if y else np.float32), 64
        room = np.full(rows * n + 2 * guard, 99, dtype)
        out = room[guard : guard + rows * n]
        if inplace:
            out[:] = arrays["residual"]
            arrays["residual"] = out
        work = Work(
            **{name: array.ctypes.data for name, array in arrays.items()},
            **{"rows": rows, "k": k, "n": n, "activation": ACTIVATIONS.index(activation)},
            one_residual=arrays["residual"].size == 1 and rows * n != 1,
            **{"bytes" if y else "values": out.ctypes.data},
        )
        function(work, *(panels or (0, count)))
        assert (room[:guard] == 99).all()
        assert (room[guard + rows * n :] == 99).all()
        return out.reshape(rows, n).copy()

    return run


def layer(seed, rows, k, n):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, k), np.uint8), rng.integers(-128, 128, (k, n), np.int8)


def product(x, w, zero=0):
    return (x.astype(np.int64) - zero) @ w.astype(np.int64)


# the kernels


@pytest.mark.parametrize("rows", [*range(1, 27), 50, 77])
def test_sums_are_exact(run, rows):
    """At and around the edges of tiles and panels, in k and in n."""
    for k, n in ((1, 1), (3, 31), (4, 32), (5, 33), (63, 65), (130, 100)):
        x, w = layer(rows, rows, k, n)
        assert (run(x, w, zero=rows) == product(x, w, rows)).all()


def test_panels_around_the_size_of_a_copy(run):
    """Kernels of i8mm reorder panels of up to 4096 rows of w, if more than 12 rows of x read them."""
    for rows, k in ((12, 4096), (13, 4096), (13, 4095), (14, 4100), (25, 4101)):
        x, w = layer(rows, rows, k, 33)
        assert (run(x, w, zero=rows) == product(x, w, rows).astype(np.float32)).all()


@pytest.mark.parametrize("zero", [0, 1, 128, 255])
def test_the_greatest_possible_sums(run, zero):
    """65536 products of 255 and -128 fit int32; the correction for the zero point alone may not."""
    for value, weight in ((255, -128), (255, 127), (0, -128), (zero, -128)):
        x, w = np.full((3, 65536), value, np.uint8), np.full((65536, 2), weight, np.int8)
        expected = np.full((3, 2), (value - zero) * weight * 65536)
        assert np.abs(expected).max() < 2**31
        assert (run(x, w, zero=zero) == expected.astype(np.float32)).all()


def test_neighbouring_products_do_not_saturate(run):
    """Two, four and a vector of products of any sign overflow 16 bits."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, w = rng.choice([0, 1, 128, 255], (5, 44)).astype(np.uint8), rng.choice([-128, -127, 127], (44, 37))
        assert (run(x, w.astype(np.int8)) == product(x, w)).all()


FORMS = ((0, 1, 2, 3), (1, 2, 3, 0), (0, 2, 1, 3))  # kForm of csrc/kernels/quant_linear.h
FORM_SHIFT, UNORDERED = 14, 0xFFFF


def weights_of_kind(kind, k, n, seed=0):
    """Weights whose orders have couples, single steps and others in any number."""
    rng = np.random.default_rng(seed)
    match kind:
        case "gaussian":
            w = np.clip(np.rint(rng.normal(0, 38, (k, n))), -128, 127)
        case "small":
            w = rng.integers(-16, 17, (k, n))
        case "half":  # the most that couples can bear, of either sign
            w = np.broadcast_to(rng.choice([-32, 32], (k, 1)), (k, n))
        case "whole":  # the most that single steps can bear
            w = np.broadcast_to(rng.choice([-64, 64], (k, 1)), (k, n))
        case "over":  # one more than that
            w = np.where(np.arange(k)[:, None] % 2, 65, 64) * np.ones((1, n))
        case "turned":  # only pairs of the second form are not too much
            w = np.resize([100, 100, -100, -100], k)[:, None] * np.ones((1, n))
        case "crossed":  # only those of the third
            w = np.where(
                np.arange(n) % 2, np.resize([0, 100, 100, 0], k)[:, None], np.resize([100, 100, 0, 0], k)[:, None]
            )
        case "few":  # one step of 16 bits among couples
            w = rng.integers(-16, 17, (k, n))
            w[k // 2 // 4 * 4 : k // 2 // 4 * 4 + 4] = -128
        case "mixed":
            w = rng.integers(-16, 17, (k, n))
            heavy = rng.random((-(-k // 4), 1)).repeat(4, axis=0)[:k] < 0.3
            w = np.where(heavy, rng.choice([-128, -127, 127], (k, n)), w)
    return np.ascontiguousarray(w.astype(np.int8))


KINDS = ("gaussian", "small", "half", "whole", "over", "turned", "crossed", "few", "mixed")


def loads(w, step, form):
    """The sums of positive and of negative weights of a step's pairs, [2, 2 pairs, columns]."""
    pairs = w[4 * step : 4 * step + 4][list(FORMS[form])].astype(int).reshape(2, 2, -1)
    return np.array([np.maximum(pairs, 0).sum(1), -np.minimum(pairs, 0).sum(1)])


@pytest.mark.skipif("avx2" not in ISAS, reason="only the AVX2 kernel reads orders")
@pytest.mark.parametrize("kind", KINDS)
def test_an_order_never_saturates(library, kind):
    """Each step once; couples and single steps within 16 bits for any x; the others in no form."""
    for k in (4, 8, 200, 1000):
        w = weights_of_kind(kind, k, 64, k)
        for panel, parts in enumerate(ordered(library, packed(w))):
            columns = [w[:, panel * 32 + 8 * part :][:, :8] for part in range(4)]
            no_form = [
                [s for s in range(k // 4) if min(loads(eight, s, form).max() for form in range(3)) > 128]
                for eight in columns
            ]
            if parts[0, 0] == UNORDERED:
                assert 2 * sum(map(len, no_form)) > k
                continue
            assert 2 * sum(map(len, no_form)) <= k
            for eight, order, rest in zip(columns, parts.astype(int), no_form, strict=True):
                first, other, single, *steps = order
                numbers = [step & ((1 << FORM_SHIFT) - 1) for step in steps]
                forms = [step >> FORM_SHIFT for step in steps]
                assert sorted(numbers) == list(range(k // 4))
                ends = np.cumsum([0, 2 * first, 2 * other, single])
                assert not any(forms[: ends[1]])
                assert sorted(numbers[ends[3] :]) == rest
                assert steps[ends[3] :] == numbers[ends[3] :]
                each = [loads(eight, number, form) for number, form in zip(numbers, forms, strict=True)]
                assert all((each[at] + each[at + 1]).max() <= 128 for at in range(0, ends[2], 2))
                assert all(load.max() <= 128 for load in each[ends[2] : ends[3]])


@pytest.mark.skipif("avx2" not in ISAS, reason="only the AVX2 kernel reads orders")
def test_orders_have_all_kinds_of_steps(library):
    """So that the products below run every loop: couples of the first form, other couples, single steps, the rest."""
    orders = {kind: ordered(library, packed(weights_of_kind(kind, 400, 32)))[0] for kind in KINDS}
    counts = {kind: order[:, :3].tolist() for kind, order in orders.items()}
    assert counts["small"] == counts["half"] == [[50, 0, 0]] * 4
    assert counts["over"][0][0] == UNORDERED
    assert counts["few"] == [[49, 0, 1]] * 4
    assert all(2 * first > 60 and 10 < single < 40 < 100 - single for first, _, single in counts["whole"])
    assert all(30 < first < 40 and 100 - 2 * first - single > 0 for first, _, single in counts["mixed"])
    assert all(first and other and single for first, other, single in counts["gaussian"])
    for form, kind in enumerate(("turned", "crossed"), 1):
        assert counts[kind] == [[0, 0, 100]] * 4
        assert (orders[kind][:, 3:] >> FORM_SHIFT == form).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_weights_of_every_kind(run, kind):
    """At the extremes of x, in every number of rows of a tile, with partial panels and remainders of k."""
    for rows, k, n in [
        *((rows, 100, 32) for rows in range(1, 23)),
        (11, 7, 5),
        (3, 4, 33),
        (10, 1003, 70),
        (21, 802, 64),
    ]:
        w = weights_of_kind(kind, k, n, rows)
        rng = np.random.default_rng(rows)
        for x in (np.full((rows, k), 255), rng.choice([0, 255], (rows, k)), rng.integers(0, 256, (rows, k))):
            assert (run(x.astype(np.uint8), w, zero=rows) == product(x, w, rows)).all()


def test_scale_and_bias_are_two_roundings(run):
    x, w = layer(1, 13, 64, 70)
    rng = np.random.default_rng(2)
    scale, bias = rng.normal(0, 1, 70).astype(np.float32), rng.normal(0, 1000, 70).astype(np.float32)
    expected = product(x, w, 9).astype(np.float32) * scale + bias
    assert (run(x, w, zero=9, scale=scale, bias=bias) == expected).all()
    residual = rng.normal(0, 100, expected.shape).astype(np.float32)
    for how in ({}, {"inplace": True}):
        assert (run(x, w, zero=9, scale=scale, bias=bias, residual=residual, **how) == expected + residual).all()
    assert (run(x, w, zero=9, scale=scale, bias=bias, residual=0.3) == expected + np.float32(0.3)).all()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 100])
def test_bytes_with_a_scale_and_zero_point_for_each_column(run, n):
    x, w = layer(n, 14, 40, n)
    rng = np.random.default_rng(3)
    scale, zero = rng.uniform(0.5, 90, n).astype(np.float32), rng.integers(0, 256, n)
    steps = np.rint(product(x, w, 100).astype(np.float32) * np.float32(0.01) * (1 / scale))
    expected = np.clip(steps + zero, 0, 255)
    assert 0 < (expected == 0).mean() + (expected == 255).mean() < 1 or n == 1
    assert (run(x, w, zero=100, scale=0.01, y=(scale, zero)) == expected).all()


@pytest.mark.parametrize("n", [1, 8, 15, 16, 17, 24, 31, 32, 33, 48, 100])
@pytest.mark.parametrize("k", [4, 27, 40])
def test_bytes_by_one_multiply_add_are_rounded_once(run, n, k):
    """sum * scale + bias in steps of y: float64 holds the product exactly, so its sum rounds once to float32."""
    rng = np.random.default_rng(n)
    for rows in (1, 5, 12, 13, 26):
        x, w = layer(n + rows, rows, k, n)
        scale, bias = rng.uniform(0.001, 0.01, n).astype(np.float32), rng.normal(0, 100, n).astype(np.float32)
        zero, floor = rng.integers(0, 256, n), rng.integers(0, 100, n)
        sums = product(x, w, 100).astype(np.float32).astype(np.float64) * scale + bias
        expected = np.clip(np.rint(sums.astype(np.float32)) + zero, floor, 255)
        got = run(x, w, zero=100, scale=scale, bias=bias, y=(1.0, zero), floor=floor)
        assert (got == expected).all()


@pytest.mark.parametrize(("zeros", "floors"), [((0,), (0,)), ((0, 1), (0,)), ((0,), (0, 1)), ((0, 1, 255), (0, 200))])
@pytest.mark.parametrize(("rows", "k", "n"), [
    (36, 16, 96), (37, 27, 40), (47, 31, 24), (96, 8, 33), (97, 3, 16), (109, 80, 100), (121, 700, 96), (50, 701, 97),
])  # fmt: skip
def test_bytes_of_many_rows(run, rows, k, n, zeros, floors):
    """Blocks of 9 to 12 rows; with and without bytes behind the last whole word of a row; few and many weights."""
    x, w = layer(rows, rows, k, n)
    rng = np.random.default_rng(k)
    scale, bias = rng.uniform(0.001, 0.01, n).astype(np.float32), rng.normal(0, 100, n).astype(np.float32)
    for columns in (slice(None), slice(n - 1, None)):  # the last column alone shifts its panel
        zero, floor = np.zeros(n, int), np.zeros(n, int)
        zero[columns], floor[columns] = rng.choice(zeros, zero[columns].size), rng.choice(floors, floor[columns].size)
        sums = product(x, w, 100).astype(np.float32).astype(np.float64) * scale + bias
        expected = np.clip(np.rint(sums.astype(np.float32)) + zero, floor, 255)
        assert (run(x, w, zero=100, scale=scale, bias=bias, y=(1.0, zero), floor=floor) == expected).all()


def test_bytes_by_one_multiply_add_are_clipped(run):
    x, w = np.full((2, 4), 255, np.uint8), np.full((4, 2), 127, np.int8)
    for scale, expected in ((8e3, 255), (-8e3, 3)):
        assert (run(x, w, scale=scale, y=(1.0, 7), floor=3) == expected).all()


@pytest.mark.parametrize("zero", [0, 1, 127, 255])
def test_ties_go_to_the_even_step_before_the_zero_point_is_added(run, zero):
    x = np.arange(256, dtype=np.uint8)[:, None]
    got = run(x, np.array([[1, -1]], np.int8), scale=0.5, y=(1.0, zero))
    expected = [[round(sign * value / 2) + zero for sign in (1, -1)] for value in range(256)]  # round: half to even
    assert (got == np.clip(expected, 0, 255)).all()


def test_values_outside_8_bits_are_clipped(run):
    x, w = np.full((2, 4), 255, np.uint8), np.full((4, 3), 127, np.int8)
    bias = np.array([np.inf, -np.inf, 3e38], np.float32)
    for scale in (1.0, 1e30):
        got = run(x, w, scale=scale, bias=bias, y=(1e-6, 7))
        assert got.tolist() == [[255, 0, 255]] * 2
        assert run(x, -w, scale=scale, y=(1e-6, 7)).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_equal_torch(run, activation):
    """Over every interval of their tables, and beyond."""
    bias = np.concatenate([np.linspace(-13, 13, 6000), np.linspace(-0.01, 0.01, 99), [-1e30, 1e30, -200, 200]])
    bias = bias.astype(np.float32)
    x, w = np.zeros((1, 1), np.uint8), np.zeros((1, bias.size), np.int8)
    got = run(x, w, bias=bias, activation=activation)[0]
    expected = ACTIVATE[activation](torch.from_numpy(bias).double()).numpy()
    assert np.abs((got - expected) / np.maximum(1, np.abs(expected))).max() <= 1e-6
    quantized = run(x, w, bias=bias, activation=activation, y=(0.05, 10))[0]
    exact = expected / np.float32(0.05)
    assert np.abs(quantized - np.clip(np.rint(exact) + 10, 0, 255)).max() <= 1
    sure = np.abs(exact - np.floor(exact) - 0.5) > 1e-3
    assert (quantized == np.clip(np.rint(exact) + 10, 0, 255))[sure].all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_and_infinity_is_activated(run, activation):
    bias = np.array([np.nan, np.inf, -np.inf], np.float32)
    y = run(np.zeros((1, 1), np.uint8), np.zeros((1, 3), np.int8), bias=bias, activation=activation)[0]
    assert np.isnan(y[0])
    assert y[1] == np.inf
    assert y[2] == -np.inf if activation == "none" else abs(y[2]) < 1e-6


def test_panels_by_themselves(run):
    x, w = layer(4, 25, 20, 130)
    expected = product(x, w)
    for first, last in ((0, 1), (1, 3), (4, 5), (2, 2)):
        got, mine = run(x, w, panels=(first, last)), slice(first * PANEL, last * PANEL)
        assert (got[:, mine] == expected[:, mine]).all()
        got[:, mine] = 99
        assert (got == 99).all()


def test_empty_shapes(run):
    assert run(*layer(5, 0, 8, 8)).shape == (0, 8)
    assert run(*layer(5, 3, 8, 0)).shape == (3, 0)
    assert (run(*layer(5, 3, 0, 40), bias=1.5) == 1.5).all()


def test_the_peak_measures_products(library):
    """More rounds take longer in each version, so no compiler removed the products."""
    from time import process_time

    def took(peak, rounds):
        start = process_time()
        peak(rounds)
        return process_time() - start

    for peak in kernels(library, "int8_peak", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_size_t)).values():
        few, many = (min(took(peak, rounds) for _ in range(5)) for rounds in (2_000, 20_000))
        assert 5 < many / few < 20
        assert 1536 * 20_000 / many < 2e12


# the ops


def draw(seed, shape, n, to_float=False, *, per_column=True):
    """Inputs; results are about 1, in steps of about 0.02."""
    rng = np.random.default_rng(seed)
    k = shape[-1]
    arrays = {
        "x": rng.integers(0, 256, shape, np.uint8),
        "x_scale": np.array(0.02),
        "x_zero": np.array(rng.integers(0, 256)),
        "weight": rng.integers(-128, 128, (k, n), np.int8),
        "weight_scale": rng.uniform(0.5, 1, n if per_column else ()) / (80 * np.sqrt(max(k, 1))),
        "bias": rng.normal(0, 1, n),
    }
    if to_float:
        arrays["residual"] = rng.normal(0, 1, (*shape[:-1], n))
    else:
        columns = n if per_column else ()
        arrays |= {"y_scale": rng.uniform(0.01, 0.03, columns), "y_zero": rng.integers(0, 256, columns)}
    types = {"x": np.uint8, "x_zero": np.uint8, "weight": np.int8, "y_zero": np.uint8}
    return {name: np.asarray(value, types.get(name, np.float32)) for name, value in arrays.items()}


def session(library, feeds, *, activation=0, fed=("x", "residual"), shapes=None, **how):
    """A session of one node: inputs other than ``fed`` are constants. ``library`` None: by the function."""
    op = QUANT_LINEAR_TO_FLOAT if "residual" in feeds else QUANT_LINEAR
    constants = [name for name in feeds if name not in fed]
    attributes = {"activation": activation}
    return harness.session(op, feeds, attributes, library=library, constants=constants, shapes=shapes, **how)


def answer(library, feeds, **how):
    return session(library, feeds, **how).run(None, {name: feeds[name] for name in feeds if name in ("x", "residual")})[
        0
    ]


def oracle(feeds, activation):
    return (reference.quant_linear_to_float if "residual" in feeds else reference.quant_linear)(
        **feeds, activation=activation
    )


@pytest.mark.parametrize("to_float", [False, True])
def test_op_equals_the_reference(library, to_float):
    """Any rank; some in several blocks of columns, and of rows if x exceeds the cache."""
    shapes = ([7], 9), ([3, 7], 64), ([2, 5, 64], 33), ([2, 1, 3, 20], 100), ([50, 768], 768), ([1, 600, 700], 130)
    for number, (shape, n) in enumerate(shapes):
        for activation in range(len(ACTIVATIONS)) if number < 3 else (2,):
            feeds = draw(number, shape, n, to_float, per_column=number % 2 == 0)
            got, expected = answer(library, feeds, activation=activation), oracle(feeds, activation)
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
            difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
            assert difference.max() <= (2e-6 if to_float else 1)
            if activation < 2:
                assert (difference == 0).mean() > 0.999


def test_a_column_outside_int32_is_clipped(library):
    """If one number overflows int32 in steps of y, all columns use two roundings."""
    feeds = draw(3, [4, 30], 40, False)
    feeds["bias"][:3] = 3e38, -3e38, 4e7
    with np.errstate(over="ignore"):
        got, expected = answer(library, feeds), oracle(feeds, 0)
    assert got[:, :3].tolist() == expected[:, :3].tolist() == [[255, 0, 255]] * 4
    assert (got == expected).mean() > 0.99


def test_numbers_of_shape_one(library):
    feeds = draw(1, [4, 9], 5, False, per_column=False)
    expected = answer(library, feeds)
    ones = {name: a.reshape(1) if a.ndim == 0 else a for name, a in feeds.items()}
    assert (answer(library, ones) == expected).all()
    feeds = draw(1, [4, 9], 5, True)
    for shape in ((), (1,)):
        feeds["residual"] = np.full(shape, 0.5, np.float32)
        assert (answer(library, feeds) == oracle(feeds, 0)).all()


@pytest.mark.parametrize("to_float", [False, True])
def test_without_columns_of_x_the_output_is_the_bias(library, to_float):
    feeds = draw(0, [3, 0], 5, to_float)
    assert (answer(library, feeds) == oracle(feeds, 0)).all()


@pytest.mark.parametrize("to_float", [False, True])
def test_op_equals_onnx_runtimes_own_nodes(library, to_float, tmp_path):
    """Its fusion gives MatMulIntegerToFloat, which is the same in float32. QuantizeLinear is too, but it divides."""
    for activation, name in enumerate(ACTIVATIONS):
        for seed in range(4):
            feeds = draw(seed, [2, 25, 100], 66, to_float, per_column=seed % 2 == 0)
            how = {"activation": activation, "shapes": {"x": ["b", "t", 100]}, "body": True}
            theirs = answer(None, feeds, path=tmp_path / "left.onnx", **how)
            kinds = [node.op_type for node in onnx.load(tmp_path / "left.onnx").graph.node]
            assert kinds[0] == "MatMulIntegerToFloat"
            assert "If" not in kinds
            assert len(kinds) <= 4
            ours = answer(library, feeds, path=tmp_path / "ours.onnx", **how)
            assert [node.domain for node in onnx.load(tmp_path / "ours.onnx").graph.node] == [DOMAIN]
            difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
            if name in ("none", "relu"):
                assert difference.max() <= 1 - to_float
                assert (difference == 0).mean() > 0.9999
            else:
                assert difference.max() <= (3e-6 if to_float else 1)


def test_shapes_flow(library):
    for to_float in (False, True):
        feeds = draw(0, [2, 3, 8], 5, to_float)
        known, fed = {"shapes": {"x": ["b", 3, 8]}}, {"fed": ("x", "residual", "weight")}
        assert session(library, feeds, **known).get_outputs()[0].shape == ["b", 3, 5]
        assert session(library, feeds, **known, **fed).get_outputs()[0].shape == ["b", 3, "weight_1"]
        unknown = {"shapes": {"x": None, "weight": None}}
        assert session(library, feeds, **unknown).get_outputs()[0].shape == []
        assert session(library, feeds, shapes={"weight": None} | known["shapes"], **fed).get_outputs()[0].shape == []


@pytest.mark.parametrize("op", [QUANT_LINEAR, QUANT_LINEAR_TO_FLOAT, QUANT_ROWS_LINEAR], ids=lambda op: op.name)
def test_masked_sets_change_no_bit_of_any_session(library, op):
    """A session prepares its weights for the set of its time; whatever runs later reads them."""
    if op is QUANT_ROWS_LINEAR:
        feeds, attributes = draw_rows(5, [23, 398], 70), {"gated": 1}
    else:
        feeds, attributes = draw(5, [23, 398], 70, op is QUANT_LINEAR_TO_FLOAT), {}
    feeds |= {"weight": weights_of_kind("gaussian", 398, 70)}
    per_run = [name for name in feeds if name in ("x", "residual") or (name == "x_scale" and op is QUANT_ROWS_LINEAR)]
    constants = [name for name in feeds if name not in per_run]
    masks = [ISAS[last + 1 :] for last in range(len(ISAS))]
    answers = []
    try:
        for prepared in masks:
            mask(prepared)
            of = harness.session(op, feeds, attributes, library=library, constants=constants)
            for running in masks:
                mask(running)
                answers.append(of.run(None, {name: feeds[name] for name in per_run})[0])
    finally:
        mask(())
    assert len(answers) == len(ISAS) ** 2
    assert all((y == answers[0]).all() for y in answers)


def test_weights_live_as_long_as_a_session(library):
    """Many sessions, sequential and concurrent: their packed weights share memory while any session needs it."""
    feeds = draw(10, [3, 300], 500, True)
    expected = answer(library, feeds)
    sessions = [session(library, feeds) for _ in range(5)]
    for number in (1, 3, 0, 2):
        sessions[number] = None
        session(library, draw(11, [3, 2000], 20, True))
        assert (sessions[4].run(None, {name: feeds[name] for name in ("x", "residual")})[0] == expected).all()


# the reference


def test_reference_by_hand():
    """x - x_zero = [1, -2]; sums [1 * 3 - 2 * -4, 1 * 5 - 2 * 6] = [11, -7]; times 0.5 * [2, 1], plus [1, 0]."""
    feeds = {
        "x": np.array([[11, 8]], np.uint8),
        "x_scale": np.float32(0.5),
        "x_zero": np.uint8(10),
        "weight": np.array([[3, 5], [-4, 6]], np.int8),
        "weight_scale": np.array([2, 1], np.float32),
        "bias": np.array([1, 0], np.float32),
    }
    assert reference.quant_linear_to_float(**feeds, residual=np.float32(100)).tolist() == [[112, 96.5]]
    assert reference.quant_linear_to_float(**feeds, residual=np.float32(0), activation=1).tolist() == [[12, 0]]
    per_column = {"y_scale": np.array([8, 1], np.float32), "y_zero": np.array([7, 5], np.uint8)}
    assert reference.quant_linear(**feeds, **per_column).tolist() == [[2 + 7, 1]]  # 12 / 8 and -3.5 are ties
    assert reference.quant_linear(**feeds, y_scale=np.float32(0.04), y_zero=np.uint8(100)).tolist() == [[255, 12]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_activations_equal_torch(activation):
    bias = np.linspace(-40, 40, 999, dtype=np.float32)
    y = reference.quant_linear_to_float(
        np.zeros((1, 1), np.uint8),
        1,
        0,
        np.zeros((1, 999), np.int8),
        1,
        bias,
        0,
        activation=ACTIVATIONS.index(activation),
    )
    expected = ACTIVATE[activation](torch.from_numpy(bias).double()).numpy()
    assert np.allclose(y, expected, rtol=2e-7, atol=1e-12)


WITHOUT_NUMBERS = ([0, 8], 5), ([2, 0, 8], 5), ([3, 8], 0)
# rows in steps of their own

GATED = {"activation": ACTIVATIONS.index("silu"), "gated": 1}


def draw_rows(seed, shape, n, gated=True, sizes=3):
    """Inputs with a scale for each row, some rows much larger than others; ``n``: columns of the weight."""
    rng, feeds = np.random.default_rng(seed), draw(seed, shape, n, True)
    scales = rng.uniform(0.01, 0.03, (*shape[:-1], 1)) * 10.0 ** rng.integers(-1, sizes - 1, (*shape[:-1], 1))
    residual = rng.normal(0, 1, (*shape[:-1], n // 2 if gated else n))
    return feeds | {"x_scale": scales.astype(np.float32), "residual": residual.astype(np.float32)}


def exact_rows(feeds, activation=0, gated=0):
    """float64, by torch; and the size of its numbers."""
    sums = (feeds["x"].astype(np.float64) - float(feeds["x_zero"])) @ feeds["weight"].astype(np.float64)
    z = torch.from_numpy(sums * feeds["x_scale"] * feeds["weight_scale"].astype(np.float64) + feeds["bias"])
    f = ACTIVATE[ACTIVATIONS[activation]]
    a, b = z.chunk(2, -1) if gated else (z, torch.ones(1))
    return (f(a) * b).numpy() + feeds["residual"], 1 + (a.abs() * b.abs()).numpy()


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_of_rows_equal_float64(library, isa):
    """Whole and partial panels, of 32 columns or of 16 and the 16 that they gate; the panels come in two calls."""
    function = kernel(library, "quant_linear", isa, PROTOTYPE)
    for number, (rows, k, n) in enumerate(((1, 3, 2), (13, 64, 64), (5, 33, 30), (26, 40, 34), (12, 130, 100))):
        for gated in (0, 1):
            feeds = draw_rows(number, (rows, k), n, bool(gated))
            answers, half = (n // 2, 16) if gated else (n, PANEL)
            panels = -(-answers // half)
            order = np.full(panels * PANEL, -1)
            for i in range(n):
                part, at = divmod(i, n // 2) if gated else (0, i)
                order[at // half * PANEL + part * 16 + at % half] = i

            def columns(values, order=order):
                return np.where(order >= 0, np.asarray(values)[..., order], 0)

            weight = columns(feeds["weight"]).astype(np.int8)
            room = np.full(rows * answers + 128, 99, np.float32)
            arrays = {
                "x": feeds["x"], "panels": packed(weight),
                "start": (-int(feeds["x_zero"]) * weight.sum(0, dtype=np.int64)).astype(np.int32),
                "signed_start": ((128 - int(feeds["x_zero"])) * weight.sum(0, dtype=np.int64)).astype(np.int32),
                "scale": columns(feeds["weight_scale"]).astype(np.float32),
                "bias": columns(feeds["bias"]).astype(np.float32),
                "residual": feeds["residual"], "row_scale": feeds["x_scale"],
            }  # fmt: skip
            for kind in (0, 1, 2, 5):
                work = Work(
                    **{name: array.ctypes.data for name, array in arrays.items()}, rows=rows, k=k, n=answers,
                    activation=kind, one_residual=0, values=room[64:].ctypes.data, gated=gated,
                )  # fmt: skip
                for first, last in ((0, panels // 2), (panels // 2, panels)):
                    function(work, first, last)
                expected, size = exact_rows(feeds, kind, gated)
                assert (np.abs(room[64:-64].reshape(rows, -1) - expected) < 3e-6 * size).all()
                assert (room[:64] == 99).all()
                assert (room[-64:] == 99).all()


def test_op_of_rows_equals_float64(library):
    """By the library and by the function; some inputs in several blocks of rows."""
    for number, (shape, n) in enumerate((([7], 10), ([3, 7], 64), ([2, 5, 64], 34), ([1, 300, 1100], 130))):
        for gated in (0, 1):
            for activation in (0, ACTIVATIONS.index("gelu_tanh"), ACTIVATIONS.index("silu")):
                feeds = draw_rows(number, shape, n, bool(gated))
                expected, size = exact_rows(feeds, activation, gated)
                attributes = {"activation": activation, "gated": gated}
                for ops in (library, None):
                    (y,) = harness.run(QUANT_ROWS_LINEAR, feeds, attributes, library=ops)
                    assert y.shape == expected.shape
                    assert (np.abs(y - expected) < 1e-5 * size).all()


def test_a_row_does_not_depend_on_other_rows(library):
    feeds = draw_rows(3, [5, 70], 40)
    (together,) = harness.run(QUANT_ROWS_LINEAR, feeds, GATED, library=library)
    for i in range(5):
        alone = feeds | {name: feeds[name][i : i + 1] for name in ("x", "x_scale", "residual")}
        assert (harness.run(QUANT_ROWS_LINEAR, alone, GATED, library=library)[0] == together[i]).all()


def multiply_at_edge(function, edge: Edge, rows: int, k: int, n: int, kind: str) -> None:
    x, w = layer(0, rows, k, n)
    columns = -(-n // PANEL) * PANEL
    names = ("scale", "bias", "inverse") + (("residual",) if kind == "values" else ())
    ends = {name: edge.lay(np.zeros(rows * n if name == "residual" else columns, np.float32)) for name in names}
    ends |= {name: edge.lay(np.zeros(columns, np.int32)) for name in ("start", "signed_start", "zero")}
    if kind == "floor":
        ends["floor"] = edge.lay(np.zeros(columns, np.uint8))
    y = np.zeros(rows * n, np.float32 if kind == "values" else np.uint8)
    work = Work(
        x=edge.lay(x), panels=edge.lay(packed(w)), rows=rows, k=k, n=n, activation=ACTIVATIONS.index("gelu"),
        **{"values" if kind == "values" else "bytes": edge.lay(y)}, **ends,
    )  # fmt: skip
    function(ctypes.byref(work), 0, columns // PANEL)


EDGES = [
    (
        "quant_linear",
        PROTOTYPE,
        multiply_at_edge,
        [
            (rows, k, n, kind)
            for rows in (1, 2, 3, 5, 6, 7, 13)
            for k, n in ((1, 1), (3, 15), (4, 16), (5, 17), (66, 47))
            for kind in ("bytes", "floor", "values")
        ]
        + [(rows, k, n, "floor") for rows in (12, 26, 37, 60) for k in (3, 16, 27, 41) for n in (8, 24, 40)],
    )
]
CONTRACTS = [
    Contract(
        QUANT_ROWS_LINEAR,
        lambda seed, columns: draw_rows(seed, [2, 8], 6),
        attributes=GATED,
        refused=[
            ({"x_scale": [2]}, r"x_scale has the shape \[2\]; expected \[2, 1\], one number for each row of x"),
            ({"x_scale": []}, r"x_scale has the shape \[\]; expected \[2, 1\]"),
            ({"weight": [8, 5]}, r"weight has the shape \[8, 5\]; expected an even number of columns"),
            ({"residual": [2, 6]}, r"residual has the shape \[2, 6\]; expected that of y, \[2, 3\], or one number"),
            ({"bias": [3]}, r"bias has the shape \[3\]; expected \[6\]"),
            ({"gated": 2}, "gated is 2; expected 0 or 1"),
            ({"activation": 6}, "activation is 6; expected 0 none"),
        ],
        large=(draw_rows(5, [1, 600, 70], 130, sizes=1), GATED),
        in_place=("residual",),
        empty=[(draw_rows(0, [2, 0, 8], 6), GATED, (2, 0, 3))],
    ),
    Contract(
        QUANT_LINEAR,
        lambda seed, columns: draw(seed, [2, 8], 5, per_column=columns),
        attributes={"activation": 2},
        refused=[
            ({"x": [2, 7]}, r"x has the shape \[2, 7\]; expected \[..., 8\], because the weight is \[8, 5\]"),
            ({"weight": [8]}, r"weight has the shape \[8\]; expected \[K, N\]"),
            ({"x_scale": [2]}, r"x_scale has the shape \[2\]; expected one number"),
            ({"weight_scale": [4]}, r"weight_scale has the shape \[4\]; expected one number, or \[5\]"),
            ({"y_scale": [4]}, r"y_scale has the shape \[4\]; expected one number, or \[5\]"),
            ({"y_zero": [5, 1]}, r"y_zero has the shape \[5, 1\]; expected one number, or \[5\]"),
            ({"activation": 6}, "activation is 6; expected 0 none"),
            ({"activation": -1}, "activation is -1"),
            ({"activation": 1.0}, "activation cannot"),
        ],
        large=(draw(4, [50, 768], 768), {"activation": 2}),
        any_side=("x",),
        empty=[(draw(0, shape, n), {}, (*shape[:-1], n)) for shape, n in WITHOUT_NUMBERS],
    ),
    Contract(
        QUANT_LINEAR_TO_FLOAT,
        lambda seed, columns: draw(seed, [2, 8], 5, True, per_column=columns),
        attributes={"activation": 2},
        refused=[
            ({"x": []}, r"x has the shape \[\]; expected"),
            ({"weight": [65537, 1]}, r"weight has the shape \[65537, 1\]; expected at most 65536 rows"),
            ({"x_zero": [2]}, r"x_zero has the shape \[2\]; expected one number"),
            ({"bias": [1]}, r"bias has the shape \[1\]; expected \[5\]"),
            ({"bias": []}, r"bias has the shape \[\]; expected \[5\]"),
            ({"residual": [3, 5]}, r"residual has the shape \[3, 5\]; expected that of y, \[2, 5\], or one number"),
            ({"residual": [5]}, r"residual has the shape \[5\]"),
        ],
        large=(draw(5, [1, 600, 700], 130, True), {}),
        in_place=("residual",),
        any_side=("x",),
        empty=[(draw(0, shape, n, True), {}, (*shape[:-1], n)) for shape, n in WITHOUT_NUMBERS],
    ),
    Contract(
        QUANT_POINTWISE,
        lambda seed, columns: draw(seed, [1, 2, 3, 8], 5, per_column=columns),
        refused=[
            ({"x": [2, 8]}, r"x has the shape \[2, 8\]; expected \[B, H, W, 8\]"),
        ],
        large=(draw(6, [2, 20, 20, 300], 130), {}),
    ),
]
