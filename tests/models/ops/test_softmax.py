"""Softmax: the reference, every kernel of this processor, and the op in ONNX Runtime, against float64."""

import ctypes
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from calmclip.models.errors import BadRequest
from calmclip.models.ops import build, reference
from calmclip.models.ops.spec import SOFTMAX
from tests.models.ops import harness
from tests.models.ops.harness import Contract, Edge, kernel, kernels, load, model, node

LOWEST = np.finfo(np.float32).min
ISAS = build.isas("")
FORMS = ("softmax_two_pass", "softmax_reload", "softmax_recompute")
# around the sizes of kernels: 1, 4, 8, 16 lanes; 4 or 8 vectors; up to 20 vectors in registers; 128 sums a lane
COLS = [*range(1, 41), 47, 48, 49, 50, 51, 63, 64, 65, 77, 127, 128, 129, 197, 255, 256, 257, 303, 304, 305, 319, 320]
COLS += [321, 322, 383, 384, 385, 511, 512, 513, 577, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 2063, 2064, 2065, 4096]
LENGTHS = (1, 2, 3, 15, 16, 17, 50, 77, 197, 257, 320, 321, 330, 577, 2500)
RANGES = {"wide": (-1e4, 1e4), "over": (90, 100), "under": (-90, -80), "usual": (-4, 4), "million": (-1e6, 1e6)}
FUNCTION = ctypes.CFUNCTYPE(
    None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2, *[ctypes.c_float] * 2, ctypes.c_bool
)  # SoftmaxRows of softmax_rows.h

# A.1 of the method reference: float64, computed outside this project's code.
GOLDEN_X = [2, 1, 0, -1, -6]
GOLDEN = [
    ((0, 1), [0.6437752, 0.23683166, 0.0871255, 0.03205168, 0.00021596]),
    ((-0.03, 1), [0.63308845, 0.21393661, 0.05973926, 0.00301323, 0]),
    ((-0.1, 1.1), [0.67253024, 0.18419799, 0.0045506, 0, 0]),
    ((0, 1.03), [0.66308845, 0.24393661, 0.08973926, 0.03301323, 0.00022244]),
]
GOLDEN_TWO_PASS = [  # A.3
    ([1, 2, 3, 4], [0.03205861, 0.08714432, 0.23688284, 0.6439142]),
    ([1000, 1001, 999], [0.24472848, 0.66524094, 0.09003057]),
]
# A.2: gamma = -alpha / T, and the largest p that becomes 0
THRESHOLDS = [(128, 3.2, 0.0243902), (512, 12, 0.0229008), (77, 4, 0.0493827), (197, 4, 0.0199005)]


def exact(x, gamma=0.0, zeta=1.0):
    """float64 [rows, cols], for finite values and -inf."""
    x = np.maximum(x.astype(np.float64), float(LOWEST))
    e = np.exp(x - x.max(-1, keepdims=True))
    low, high = float(np.float32(gamma)), float(np.float32(zeta))
    return np.clip((high - low) * (e / e.sum(-1, keepdims=True)) + low, 0, 1)


def compare(y, x):
    """Plain softmax: the bar of the method reference, 1.8."""
    p = exact(x)
    normal = p > 1e-37
    assert np.abs(y[normal] / p[normal] - 1).max() <= 2e-6
    assert y[~normal].max(initial=0) <= 2e-37
    assert np.abs(y.sum(-1, dtype=np.float64) - 1).max() <= 1e-5


# Scalar code has no streaming stores and ignores `stream`.
SIDES = [(form, isa, False) for form in FORMS for isa in ISAS]
SIDES += [(form, isa, True) for form in FORMS if form != "softmax_reload" for isa in ISAS if isa != "scalar"]


def near(a, b, rel=0.0, absolute=0.0):
    return np.allclose(a, b, rtol=rel, atol=absolute)  # pytest.approx takes seconds over arrays of this size


@pytest.fixture(params=SIDES, ids=str)
def run(library, request):
    """A kernel as a function of x [rows, cols], between guard values and one float off alignment."""
    form, isa, stream = request.param
    return guarded(kernel(library, form, isa, FUNCTION), stream)


def guarded(function, stream=False):
    def run(x, gamma=0.0, zeta=1.0, *, inplace=False, offset=1):
        rows, cols = x.shape
        size, guard = x.size, 32
        room = [np.full(size + 2 * guard + 16, np.float32(-7.25)) for _ in range(2)]
        starts = [(-(r.ctypes.data // 4) % 16) + guard // 2 + offset for r in room]
        source, target = (r[s : s + size] for r, s in zip(room, starts, strict=True))
        source[:] = x.ravel()
        out = source if inplace else target
        function(source.ctypes.data, out.ctypes.data, rows, cols, gamma, zeta, stream)
        for r, s in zip(room, starts, strict=True):
            assert (r[:s] == np.float32(-7.25)).all()
            assert (r[s + size :] == np.float32(-7.25)).all()
        if not inplace:
            assert (source.view(np.uint32) == np.ascontiguousarray(x, np.float32).ravel().view(np.uint32)).all()
        return out.reshape(rows, cols).copy()

    return run


# the reference


@pytest.mark.parametrize(("how", "expected"), GOLDEN)
def test_reference_golden_vectors(how, expected):
    y = reference.softmax(np.array(GOLDEN_X), -1, *how)
    assert y.dtype == np.float32
    assert y == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2])
def test_reference_equals_torch(axis):
    x = np.random.default_rng(0).normal(0, 9, (3, 5, 7)).astype(np.float32)
    expected = torch.softmax(torch.from_numpy(x).double(), axis).numpy()
    assert reference.softmax(x, axis) == pytest.approx(expected, rel=1e-6)


def test_reference_masks_and_nan():
    x = np.array([[-np.inf, LOWEST, -np.inf], [np.nan, 0, 0], [np.inf, 0, 0], [-np.inf, 0, 0], [1e30, -1e30, LOWEST]])
    y = reference.softmax(x)
    assert y[0] == pytest.approx([1 / 3] * 3)
    assert np.isnan(y[1:3]).all()
    assert y[3:].tolist() == [[0, 0.5, 0.5], [1, 0, 0]]
    assert reference.softmax(np.empty((2, 0, 3)), 1).shape == (2, 0, 3)


def test_reference_jacobian_is_the_derivative_in_torch():
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 2, 9))
    exact = torch.autograd.functional.jacobian(lambda row: torch.softmax(row, 0), x).numpy()
    jacobian = reference.softmax_jacobian(torch.softmax(x, 0).numpy())
    assert jacobian == pytest.approx(exact, abs=1e-15)
    assert np.linalg.norm(reference.softmax_jacobian([0.5, 0.5, 0.0]), 2) == pytest.approx(0.5)  # the bound is reached


@pytest.mark.parametrize(
    ("x", "how", "says"),
    [
        (0.0, {}, "axis"),
        ([0.0], {"axis": 1}, "axis is 1"),
        ([0.0], {"axis": -2}, "axis is -2"),
        ([0.0], {"gamma": 0.1}, "gamma is 0.1"),
        ([0.0], {"zeta": 0.9}, "zeta 0.9"),
        ([0.0], {"gamma": np.nan}, "gamma is nan"),
        ([0.0], {"zeta": np.inf}, "zeta inf"),
    ],
)
def test_reference_refuses(x, how, says):
    with pytest.raises(BadRequest, match=says):
        reference.softmax(np.array(x), **how)


# the kernels


def test_equals_float64(run):
    rng = np.random.default_rng(1)
    for cols in COLS:
        for low, high in RANGES.values():
            x = rng.uniform(low, high, (2, cols)).astype(np.float32)
            compare(run(x, offset=cols % 16), x)


def test_long_rows_equal_float64(run):
    rng = np.random.default_rng(2)
    for cols, (low, high) in ((16_383, RANGES["wide"]), (16_385, RANGES["under"]), (1_000_000, RANGES["over"])):
        x = rng.uniform(low, high, (1, cols)).astype(np.float32)
        compare(run(x), x)


def test_equal_values_do_not_add_up_their_roundings(run):
    for value in (-0.7, -0.1, 0.3, 0.99):
        x = np.full((1, 30_003), value, np.float32)
        x[0, 7] = 3.0
        compare(run(x), x)


@pytest.mark.slow
def test_64_million_values(library):
    x = np.random.default_rng(3).standard_normal((1, 64_000_000), dtype=np.float32)
    e = np.exp(x[0].astype(np.float64))
    for form in FORMS:
        for isa, function in kernels(library, form, FUNCTION).items():
            if isa != "scalar":
                y = np.empty_like(x)
                function(x.ctypes.data, y.ctypes.data, *x.shape, 0.0, 1.0, True)
                assert np.abs(y[0] / (e / e.sum()) - 1).max() <= 2e-6


def test_golden_vectors(run):
    for how, expected in GOLDEN:
        assert run(np.array([GOLDEN_X], np.float32), *how)[0] == pytest.approx(expected, abs=1e-6)
    for x, expected in GOLDEN_TWO_PASS:
        assert run(np.array([x], np.float32))[0] == pytest.approx(expected, abs=1e-6)


def test_zeros_are_those_under_the_threshold(run):
    for length, alpha, threshold in THRESHOLDS:
        gamma = -alpha / length
        x = np.random.default_rng(length).normal(0, 2, (16, length)).astype(np.float32)
        p, y = exact(x), run(x, gamma, 1.0)
        assert -gamma / (1 - gamma) == pytest.approx(threshold, abs=1e-6)
        sure = np.abs(p - threshold) > 1e-6
        assert ((y == 0) == (p <= threshold))[sure].all()
        assert 0 < (y == 0).mean() < 1
        assert np.abs(y - exact(x, gamma)).max() <= 1e-6


def test_clipped_equals_float64(run):
    rng = np.random.default_rng(4)
    for cols in LENGTHS:
        for gamma, zeta in ((-0.03, 1.0), (-0.1, 1.1), (0.0, 1.03), (-5.0, 7.0)):
            x = rng.normal(0, 4, (2, cols)).astype(np.float32)
            y = run(x, gamma, zeta)
            assert np.abs(y - exact(x, gamma, zeta)).max() <= 2e-6 * (zeta - gamma)
            assert ((y >= 0) & (y <= 1)).all()


def test_masked_values_are_zero_and_do_not_change_the_others(run):
    rng = np.random.default_rng(5)
    for cols in LENGTHS:
        for mask in (-np.inf, LOWEST, -1e9, -3e38):
            x = rng.uniform(-9, 9, (1, cols)).astype(np.float32)
            hidden = rng.random((1, cols)) < 0.5
            hidden[:, 0] = False
            x[hidden] = mask
            y = run(x)
            assert (y[hidden] == 0).all()
            assert np.abs(y[~hidden] / exact(x[~hidden][None])[0] - 1).max() <= 2e-6


def test_rows_of_masks_alone_are_uniform(run):
    for cols in LENGTHS:
        x = np.full((4, cols), -np.inf, np.float32)
        x[1] = LOWEST
        x[2, ::2] = LOWEST
        x[3] = -3e38
        assert np.abs(run(x) * cols - 1).max() <= 2e-6
        assert np.abs(run(x, -0.25, 1.25) - min(1.0, max(0.0, 1.5 / cols - 0.25))).max() <= 1e-6


def test_nan_or_infinity_makes_its_row_nan_and_no_other(run):
    rng = np.random.default_rng(6)
    for cols in LENGTHS:
        x = rng.normal(0, 3, (3, cols)).astype(np.float32)
        for bad in (np.nan, np.inf):
            for place in {0, cols // 2, cols - 1}:
                for fill in (0.5, -np.inf, LOWEST, 1e30):
                    x[1] = fill
                    x[1, place] = bad
                    y = run(x, -0.1, 1.1) if place else run(x)
                    assert np.isnan(y[1]).all()
                    assert np.isfinite(y[::2]).all()


def test_large_values_are_exact_beyond_the_domain_of_two_pass(run):
    rng = np.random.default_rng(7)
    for size in (1e6, 1.1e6, 1e7, 1e30, float(np.finfo(np.float32).max)):
        for cols in (1, 7, 50, 197, 400, 20_000):
            x = rng.uniform(-1, 1, (3, cols)).astype(np.float32) * np.float32(size)
            x[1] = np.abs(x[1])
            x[2] = -np.abs(x[2])
            assert np.abs(run(x) - exact(x)).max() <= 2e-6
            x[0] = np.float32(size)
            x[1] = np.float32(-size)
            assert np.abs(run(x[:2]) * cols - 1).max() <= 2e-6


def test_the_lower_end_of_two_pass(run):
    for top in (-8.9e5, -9e5, -9.1e5, -1e6, -1.1e6):
        x = np.full((1, 300), np.float32(top), np.float32)
        x[0, 100:] -= np.random.default_rng(8).integers(0, 80, 200).astype(np.float32)
        x[0, 200:] = np.float32(-2e6)
        compare(run(x), x)


def test_empty(run):
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert run(np.empty(shape, np.float32)).shape == shape


def test_in_place(run):
    rng = np.random.default_rng(8)
    for cols in (1, 9, 16, 50, 197, 320, 321, 577, 5000):
        x = rng.normal(0, 3, (5, cols)).astype(np.float32)
        for how in ((0.0, 1.0), (-0.1, 1.1)):
            assert (run(x, *how, inplace=True) == run(x, *how)).all()


def test_the_callers_rounding_and_flushing_stay(every):
    """Kernels flush subnormals while they run; numpy must not do so afterwards."""
    tiny = np.float32(1e-39)
    for run in every.values():
        run(np.zeros((3, 50), np.float32))
        assert np.array([tiny]) * np.float32(1.0) > 0


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70), elements=st.floats(-60, 60, width=32))
)
@settings(max_examples=60, deadline=None)
def test_every_kernel_equals_scalar(every, x):
    """Up to the rounding of x - max in float32, if there is a max: half a unit in the last place of 120."""
    results = {name: run(x) for name, run in every.items()}
    base = results["softmax_reload", "scalar"]
    for name, y in results.items():
        assert near(y, base, 1e-5, 1e-37), name


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 90)), elements=st.floats(-30, 30, width=32)),
    st.integers(-64, 64),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_neither_shift_nor_order_matters(every, x, shift, random):
    x = np.round(x * 64) / 64  # adding the shift is then exact
    order = list(range(x.shape[1]))
    random.shuffle(order)
    for name, run in every.items():
        y = run(x)
        assert near(run(x + np.float32(shift)), y, 2e-6), name
        assert near(run(x[:, order]), y[:, order], 2e-6), name


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(0, 40)), elements=st.floats(width=32)))
@settings(max_examples=150, deadline=None)
def test_any_float_at_all_equals_the_reference(every, x):
    expected = reference.softmax(x)
    for name, run in every.items():
        y = run(x)
        assert (np.isnan(y) == np.isnan(expected)).all(), name
        assert near(np.nan_to_num(y), np.nan_to_num(expected), 1e-5, 1e-6), name


@pytest.fixture(scope="module")
def every(library):
    return {(form, isa): guarded(f) for form in FORMS for isa, f in kernels(library, form, FUNCTION).items()}


# the op


def op(library, x, *, threads=1, **attributes):
    return harness.run(SOFTMAX, {"x": x}, attributes, library=library, threads=threads)[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape", [(5,), (3, 5), (2, 3, 4, 5), (4, 197, 197), (3, 5000, 7), (1, 70_000, 3), (40, 33, 100), (300, 1, 1, 9)]
)
def test_op_takes_any_axis(library, shape, threads):
    x = np.random.default_rng(9).normal(0, 4, shape).astype(np.float32)
    for axis in range(-len(shape), len(shape)):
        plain = op(library, x, axis=axis, threads=threads)
        expected = torch.softmax(torch.from_numpy(x).double(), axis).numpy()
        assert near(plain, expected, 4e-6, 1e-37)  # x - max is about 34 and rounds
        clipped = op(library, x, axis=axis, gamma=-0.02, zeta=1.1, threads=threads)
        assert np.abs(clipped - reference.softmax(x, axis, -0.02, 1.1)).max() <= 1e-6


def test_op_without_attributes_is_plain_along_the_last_axis(library):
    x = np.array([GOLDEN_X, GOLDEN_X[::-1]], np.float32)
    expected = np.array([GOLDEN[0][1], GOLDEN[0][1][::-1]])
    ends = {"x": (x.dtype, None)}, {"y": (x.dtype, None)}
    for attributes, rows in (({}, expected), ({"gamma": -0.03}, [GOLDEN[1][1], GOLDEN[1][1][::-1]])):
        (y,) = load(model([node(SOFTMAX, *ends, **attributes)], *ends), library).run(None, {"x": x})
        assert y == pytest.approx(np.array(rows), abs=1e-6)


def last_level():
    """Bytes of the last-level cache as the table counts them: 16 MiB if the system reports none, at most 64 MiB."""
    asked = subprocess.run(["getconf", "LEVEL3_CACHE_SIZE"], capture_output=True, text=True, check=False)
    reported = int(asked.stdout) if asked.stdout.strip().isdecimal() else 0  # os.sysconf does not know the name
    return min(reported if reported > 0 else 16 << 20, 64 << 20)


@pytest.mark.parametrize(
    ("columns", "caches", "form"),
    [
        (1000, 1.5, "reload"),  # measured: 110000 x 577 takes .95 ns an element so, 1.20 in two passes
        (4000, 1.5, "reload"),
        (8192, 0.1, "reload"),  # 128 x 8192: .26 and .35
        (8192, 0.75, "reload"),
        (50_000, 1.5, "two_pass"),  # 180 x 50000
        (None, 0.45, "reload"),  # one row, of the whole tensor
        (None, 0.75, "two_pass"),
        (None, 1.5, "two_pass"),  # 1 x 64M: .56 and .43
    ],
)
def test_op_takes_the_form_that_was_measured_as_faster(library, columns, caches, form):
    """By bits: two passes round otherwise. A tensor's bytes, read and written, are ``caches`` last-level caches."""
    size = int(caches * last_level() / 8)
    columns = columns or size
    if columns == size and form == "two_pass":
        assert columns > 262_143  # longer rows do not fit an L2 of 2 MiB
    x = np.random.default_rng(10).uniform(-3, 3, (max(1, size // columns), columns)).astype(np.float32)
    bits = {}
    for name in ("reload", "two_pass"):
        *_, best = kernels(library, f"softmax_{name}", FUNCTION).values()
        bits[name] = np.empty_like(x)
        best(x.ctypes.data, bits[name].ctypes.data, *x.shape, 0, 1, False)
    y = op(library, x)
    assert [name for name, expected in bits.items() if (y == expected).all()] == [form]
    assert near(y[-1:], exact(x[-1:]), 2e-6)


def test_op_masks(library):
    x = np.full((3, 9), -np.inf, np.float32)
    x[1, 4] = np.nan
    x[2, 3] = 1
    y = op(library, x)
    assert y[0] == pytest.approx([1 / 9] * 9)
    assert np.isnan(y[1]).all()
    assert y[2].tolist() == [0] * 3 + [1] + [0] * 5


def test_op_and_reference_take_the_same_limits(library):
    """1e30 as float32 is above 1e30."""
    x = np.array([GOLDEN_X], np.float32)
    expected = [[1, 0, 0, 0, 0]]  # 2e30 p - 1e30, clipped: 0.64 is over a half
    assert op(library, x, gamma=-1e30, zeta=1e30).tolist() == expected
    assert reference.softmax(x, -1, -1e30, 1e30).tolist() == expected


@pytest.mark.parametrize(("inputs", "outputs"), [([], ["y"]), (["x", "x"], ["y"]), (["x"], ["y", "z"]), ([""], ["y"])])
def test_op_refuses_other_numbers_of_inputs_and_outputs(library, inputs, outputs):
    wrong = model([node(SOFTMAX, inputs, outputs)], {"x": (np.float32, [3])}, dict.fromkeys(outputs, (np.float32, [3])))
    with pytest.raises(Exception, match="Softmax"):
        load(wrong, library)


def test_op_shapes_flow(library):
    known = harness.session(
        SOFTMAX, {"x": np.zeros((1, 3, 1), np.float32)}, {}, library=library, shapes={"x": ["a", 3, "b"]}
    )
    assert known.get_outputs()[0].shape == ["a", 3, "b"]


def soften_at_edge(function, edge: Edge, rows: int, cols: int) -> None:
    row = edge.lay(np.zeros((rows, cols), np.float32))
    function(row, row, rows, cols, 0.0, 1.0, False)


EDGE_COLUMNS = (*range(1, 70), 127, 128, 129, 319, 320, 321, 577)
EDGES = [
    (form, FUNCTION, soften_at_edge, [(rows, cols) for rows in (1, 2, 3) for cols in EDGE_COLUMNS]) for form in FORMS
]


def rows(seed, *shape):
    return {"x": np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)}


WRONG_AXES = ([], 0), ([], -1), ([3], 1), ([3], -2), ([2, 3], 2), ([2, 3], -(2**63)), ([2, 3], 2**63 - 1)
CONTRACTS = [
    Contract(
        SOFTMAX,
        lambda seed, columns: rows(seed, 2, 8),
        refused=[
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
        large=(rows(12, 640, 197), {"axis": 0}),
        in_place=("x",),
        any_side=("x",),
        empty=[
            (rows(0, *shape), {"axis": axis}, shape)
            for shape in ((0,), (0, 4), (4, 0), (2, 0, 3), (0, 0))
            for axis in range(len(shape))
        ],
    ),
]


# the derivative of every kernel


@pytest.mark.parametrize("count", [3, 17, 77])
def test_a_kernel_changes_as_the_jacobian_says(run, count):
    """Central differences of the kernel; a step of 2^-6 leaves 4e-6 of the third derivative and 6e-6 of rounding."""
    x, step = np.random.default_rng(count).uniform(-4, 4, count).astype(np.float32), np.float32(2**-6)
    moved = np.concatenate([x + step * np.eye(count, dtype=np.float32), x - step * np.eye(count, dtype=np.float32)])
    jacobian = reference.softmax_jacobian(exact(x[None])[0])
    ahead, behind = np.split(run(moved).astype(np.float64), 2)
    assert near((ahead - behind).T / (2 * step), jacobian, absolute=3e-5)
    assert np.linalg.norm((ahead - behind) / (2 * step), 2) <= 0.5 + 1e-4
    ahead, behind = np.split(run(moved, -0.003, 1.003).astype(np.float64), 2)  # 1.006 times as steep, flat at 0 and 1
    inside = ((ahead > 0) & (behind > 0) & (ahead < 1) & (behind < 1)).all(axis=0)
    flat = (ahead == behind).all(axis=0) & ((ahead == 0) | (ahead == 1)).all(axis=0)
    slopes = (ahead - behind).T / (2 * step)
    assert near(slopes[inside], 1.006 * jacobian[inside], absolute=3e-5)
    assert not slopes[flat].any()
    assert inside.any()


def test_outputs_of_a_kernel_are_at_most_half_as_far_apart_as_its_inputs(run):
    draw = np.random.default_rng(5)
    x = draw.normal(0, 3, (200, 50)).astype(np.float32)
    y = x + draw.normal(0, 1, x.shape).astype(np.float32) * draw.choice([1e-2, 1, 10], (200, 1)).astype(np.float32)
    apart = np.linalg.norm(run(x).astype(np.float64) - run(y), axis=1)
    assert (apart <= 0.5 * np.linalg.norm(x.astype(np.float64) - y, axis=1) + 1e-6).all()
