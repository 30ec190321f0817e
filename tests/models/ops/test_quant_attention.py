"""QuantAttention: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against torch in
float64 with rounded probabilities."""

import ctypes

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calmclip.models.errors import BadRequest
from calmclip.models.ops import reference
from calmclip.models.ops.spec import QUANT_ATTENTION
from tests.models.ops.harness import ISAS, Contract, Edge, kernel, near, run

LOWEST = np.finfo(np.float32).min
PAPER = float(np.float32(1 / 255))
# p_scale, gamma, zeta: the step of each row, the step of the paper, a step at which the greatest saturate, clipped
WAYS = [(0.0, 0.0, 1.0), (PAPER, 0.0, 1.0), (0.0011, 0.0, 1.0), (PAPER, -0.03, 1.1)]
# query rows, keys, dims: around what kernels take at once (8 and 16 rows; 2, 4, 12 and 24 keys; 4, 16, 32, 64 numbers)
SIZES = [(1, 1, 1), (1, 2, 4), (3, 3, 3), (7, 5, 15), (8, 11, 16), (9, 12, 17), (15, 13, 31), (16, 23, 32),
         (17, 24, 33), (5, 25, 48), (6, 47, 63), (16, 48, 64), (4, 49, 65), (50, 50, 64), (1, 50, 64), (2, 77, 72),
         (33, 96, 80), (1, 197, 64), (5, 257, 96), (2, 577, 16), (2, 31, 127), (2, 6, 128), (3, 9, 200)]  # fmt: skip


def exact(feeds, heads, width, q_start=0, k_start=0, v_start=0, gamma=0.0, zeta=1.0):
    """y before rounding, float64 [B, T, width]."""
    number = {name: float(x) for name, x in feeds.items() if x.ndim == 0}

    def real(name, start, zero):
        x = torch.from_numpy(feeds[name][..., start : start + width].astype(np.float64)) - zero
        return (x * number[f"{name}_scale"]).unflatten(2, (heads, width // heads)).transpose(1, 2)

    q, k, v = real("q", q_start, number["q_zero"]), real("k", k_start, 128), real("v", v_start, 128)
    logits = q @ k.transpose(2, 3) + torch.from_numpy(feeds["mask"].astype(np.float64))
    logits = logits.clamp(min=float(LOWEST))
    if number["p_scale"] == 0:
        weights = torch.round(255 * torch.exp(logits - logits.amax(-1, keepdim=True)))
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        low, high = float(np.float32(gamma)), float(np.float32(zeta))
        p = ((high - low) * torch.softmax(logits, -1) + low).clamp(0, 1)
        weights = torch.round(p / number["p_scale"]).clamp(max=255) * number["p_scale"]
    y = (weights @ v).transpose(1, 2).flatten(2).numpy()
    return y / feeds["y_scale"].astype(np.float64) + feeds["y_zero"]


def draw(seed, batch, rows, keys, heads, dims, *, mask=None, p_scale=0.0, zero=None, spread=1.0, spare=0):
    """Feeds; logits of a standard deviation of about 3 ``spread``. A step of p is worth less than one of y."""
    rng = np.random.default_rng(seed)
    width = heads * dims
    numbers = lambda *shape: rng.integers(0, 256, shape).astype(np.uint8)  # noqa: E731
    scale = 3 * spread / (74 * 74 * np.sqrt(dims))
    return {
        "q": numbers(batch, rows, width + spare), "q_scale": np.array(scale, np.float32),
        "q_zero": np.array(rng.integers(256) if zero is None else zero, np.uint8),
        "k": numbers(batch, keys, width + spare), "k_scale": np.array(1, np.float32),
        "v": numbers(batch, keys, width + spare), "v_scale": np.array(0.02, np.float32),
        "p_scale": np.array(p_scale, np.float32), "mask": np.zeros(1, np.float32) if mask is None else mask,
        "y_scale": rng.uniform(0.012, 0.02, width).astype(np.float32), "y_zero": numbers(width),
    }  # fmt: skip


def causal(rows, keys, hidden=-np.inf):
    return np.triu(np.full((rows, keys), hidden, np.float32), 1 + keys - rows)


class Head(ctypes.Structure):
    """`AttentionHead` of quant_attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "y")),
        *((name, ctypes.c_size_t) for name in ("q_step", "k_step", "v_step", "y_step", "rows", "keys", "dims")),
        ("mask", ctypes.c_void_p), ("mask_row", ctypes.c_size_t), ("mask_key", ctypes.c_size_t),
        ("seen", ctypes.c_void_p), ("seen_step", ctypes.c_size_t),
        ("y_scale", ctypes.c_void_p), ("y_zero", ctypes.c_void_p),
        ("y_scale_step", ctypes.c_size_t), ("y_zero_step", ctypes.c_size_t),
        *((name, ctypes.c_float) for name in ("scale", "v_scale", "p_scale", "gamma", "zeta")),
        ("q_zero", ctypes.c_uint8),
    ]  # fmt: skip


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Head), ctypes.c_void_p)


def scratch_bytes(keys, dims):
    """`attention_scratch` of quant_attention.h."""
    columns = -(-dims // 64) * 64
    return -(-dims // 32) * 64 * keys + (keys + 3) * (dims + 3) * 2 + 3 * (keys + 3) * 64 + columns * 48 + 2048


@pytest.fixture(params=ISAS)
def attend(library, request):
    """A kernel as a function of feeds of one head and one picture, between guard values."""
    function = kernel(library, "quant_attention", request.param, PROTOTYPE)

    def go(feeds, gamma=0.0, zeta=1.0, visible=None):
        (_, rows, q_step), (_, keys, k_step) = feeds["q"].shape, feeds["k"].shape
        dims = len(feeds["y_scale"])
        mask = np.broadcast_to(feeds["mask"], (rows, keys)) if feeds["mask"].ndim > 1 else None
        y = np.full(rows * dims + 128, 77, np.uint8)
        size = scratch_bytes(keys, dims)
        room = np.full(size + 192, 0xA5, np.uint8)
        at = -room.ctypes.data % 64
        head = Head(
            q=feeds["q"].ctypes.data, k=feeds["k"].ctypes.data, v=feeds["v"].ctypes.data, y=y.ctypes.data + 64,
            q_step=q_step, k_step=k_step, v_step=feeds["v"].shape[2], y_step=dims, rows=rows, keys=keys, dims=dims,
            mask=None if mask is None else mask.ctypes.data,
            mask_row=0 if mask is None else mask.strides[0] // 4, mask_key=0 if mask is None else mask.strides[1] // 4,
            seen=None if visible is None else visible.ctypes.data,
            seen_step=0 if visible is None or len(visible) == 1 else 1,
            y_scale=feeds["y_scale"].ctypes.data, y_zero=feeds["y_zero"].ctypes.data, y_scale_step=1, y_zero_step=1,
            scale=float(feeds["q_scale"] * feeds["k_scale"]), v_scale=float(feeds["v_scale"]),
            p_scale=float(feeds["p_scale"]), gamma=gamma, zeta=zeta, q_zero=int(feeds["q_zero"]),
        )  # fmt: skip
        function(ctypes.byref(head), room.ctypes.data + at)
        assert (room[:at] == 0xA5).all()
        assert (room[at + size :] == 0xA5).all()
        assert (y[:64] == 77).all()
        assert (y[-64:] == 77).all()
        return y[64:-64].reshape(1, rows, dims)

    return go


# the oracle


@pytest.mark.parametrize(("p_scale", "gamma", "zeta"), WAYS)
def test_reference_equals_torch(p_scale, gamma, zeta):
    for seed, (rows, keys, dims) in enumerate(SIZES[:12]):
        feeds = draw(seed, 2, rows, keys, 3, dims, p_scale=p_scale)
        how = {"heads": 3, "width": 3 * dims, "gamma": gamma, "zeta": zeta}
        assert near(reference.quant_attention(**feeds, **how), exact(feeds, **how), most=1e-3)


def test_the_rounding_of_probabilities_costs_little():
    """Against torch's own attention on the dequantized inputs."""
    feeds = draw(0, 2, 50, 50, 4, 64)

    def real(name, zero):
        x = torch.from_numpy(feeds[name].astype(np.float64) - zero) * float(feeds[f"{name}_scale"])
        return x.unflatten(2, (4, 64)).transpose(1, 2)

    y = scaled_dot_product_attention(real("q", int(feeds["q_zero"])), real("k", 128), real("v", 128), scale=1.0)
    y = y.transpose(1, 2).flatten(2).numpy() / feeds["y_scale"] + feeds["y_zero"]
    ours = reference.quant_attention(**feeds, heads=4, width=256)
    assert np.abs(ours - np.clip(y, 0, 255)).mean() <= 0.5  # the rounding of y alone gives 0.25


def test_reference_refuses_clipping_by_the_rows_own_step():
    with pytest.raises(BadRequest, match=r"p_scale is 0, gamma -0\.1"):
        reference.quant_attention(**draw(0, 1, 1, 1, 1, 4), heads=1, width=4, gamma=-0.1)


# the kernels


@pytest.mark.parametrize(("p_scale", "gamma", "zeta"), WAYS)
def test_kernels_equal_float64(attend, p_scale, gamma, zeta):
    for seed, (rows, keys, dims) in enumerate(SIZES):
        feeds = draw(seed, 1, rows, keys, 1, dims, p_scale=p_scale, zero=(None, 0, 128, 255)[seed % 4], spare=seed % 3)
        y = attend(feeds, gamma, zeta)
        assert near(y, exact(feeds, 1, dims, gamma=gamma, zeta=zeta)), (rows, keys, dims)


def test_no_product_saturates(attend):
    """Pairs of 255 times -128 or 127 overflow 16 bits."""
    for q, k, zero in ((255, 0, 0), (255, 255, 0), (0, 0, 255), (255, 0, 255)):
        feeds = draw(0, 1, 17, 50, 1, 64, zero=zero, spread=0.1)
        feeds["q"][:] = q
        feeds["k"][:, :25] = k
        for v in (0, 255):
            feeds["v"][:] = v
            assert near(attend(feeds), exact(feeds, 1, 64), most=0)


@pytest.mark.parametrize(("p_scale", "gamma", "zeta"), WAYS)
def test_masks(attend, p_scale, gamma, zeta):
    """Read in full, and, if it hides the end of every row, stated in advance; both give the same."""
    for rows, keys in ((17, 17), (50, 50), (77, 77), (20, 26)):
        rng = np.random.default_rng(rows)
        some = np.where(rng.random((rows, keys)) < 0.5, -np.inf, rng.normal(0, 2, (rows, keys))).astype(np.float32)
        some[::7] = -np.inf  # only masked keys: uniform
        some[3::7] = LOWEST
        padding = np.zeros((1, keys), np.float32)
        padding[0, keys // 3 :] = -np.inf
        ends = np.arange(1, rows + 1, dtype=np.uint32) + keys - rows
        for mask, visible in (
            (causal(rows, keys), ends),
            (causal(rows, keys, LOWEST), ends),
            (padding, np.array([keys // 3], np.uint32)),
            (some, np.zeros(rows, np.uint32)),
            (some[:, :1], None),
            (np.roll(padding, 3), None),
            (
                np.where(np.arange(rows)[:, None] == 4, some, causal(rows, keys)),
                np.where(np.arange(rows) == 4, 0, ends),
            ),
        ):
            feeds = draw(keys, 1, rows, keys, 1, 24, mask=np.ascontiguousarray(mask), p_scale=p_scale)
            expected = exact(feeds, 1, 24, gamma=gamma, zeta=zeta)
            read = attend(feeds, gamma, zeta)
            assert near(read, expected)
            if visible is not None:
                stated = attend(feeds, gamma, zeta, np.ascontiguousarray(visible, np.uint32))
                assert near(stated, expected)


def _again(feeds, rows):
    """The same with ``rows`` rows, which repeat."""
    pick = np.arange(rows) % feeds["q"].shape[1]
    mask = feeds["mask"]
    return feeds | {"q": feeds["q"][:, pick], "mask": mask[pick] if mask.ndim > 1 and len(mask) > 1 else mask}


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_answer_as_they_do_among_more(attend, rows):
    """Bit for bit, though kernels lay few rows out otherwise. Seventeen rows are more than any kernel takes as few."""
    rng = np.random.default_rng(rows)
    for seed, (keys, dims) in enumerate(
        ((64, 64), (65, 1), (79, 15), (80, 16), (97, 130), (128, 63), (129, 72), (197, 64), (300, 20), (1000, 80))
    ):
        some = np.where(rng.random((rows, keys)) < 0.5, -np.inf, rng.normal(0, 2, (rows, keys))).astype(np.float32)
        hidden = some.copy()
        hidden[-1] = -np.inf
        ends = rng.integers(1, keys + 1, rows).astype(np.uint32)
        tails = np.where(np.arange(keys) < ends[:, None], 0, -np.inf).astype(np.float32)
        for mask, visible in ((None, None), (some, None), (hidden, None), (some[:, :1], None), (tails, ends)):
            zero, spread = (None, 0, 128, 255)[seed % 4], (1.0, 1e-9, 30.0, 1e12)[seed // 2 % 4]
            feeds = draw(seed, 1, rows, keys, 1, dims, mask=mask, zero=zero, spread=spread, spare=seed % 3)
            alone = attend(feeds, visible=visible)
            among = attend(_again(feeds, 17), visible=None if visible is None else visible[np.arange(17) % rows])
            assert (alone == among[:, :rows]).all(), (keys, dims)
            if mask is None and spread < 100:
                assert near(alone, exact(feeds, 1, dims)), (keys, dims)
    for q, k, v, zero in ((255, 0, 0, 0), (255, 255, 255, 0), (0, 0, 255, 255), (0, 255, 0, 255)):
        feeds = draw(0, 1, rows, 65536 if rows == 1 else 100, 1, 8, zero=zero, spread=1e-6)
        for name, number in (("q", q), ("k", k), ("v", v)):
            feeds[name][:] = number
        assert (attend(feeds) == attend(_again(feeds, 17))[:, :rows]).all()
        assert near(attend(feeds), exact(feeds, 1, 8), most=0)


def test_a_row_of_masks_alone_is_the_mean(attend):
    feeds = draw(1, 1, 9, 51, 1, 20, mask=np.full((1, 51), -np.inf, np.float32))
    mean = (feeds["v"][0].astype(np.float64) - 128).mean(0) * 0.02
    assert near(attend(feeds), np.broadcast_to(mean / feeds["y_scale"] + feeds["y_zero"], (1, 9, 20)), most=0)


def test_logits_of_any_size(attend):
    """exp far under the smallest float, logits of any magnitude, and rows of equal logits."""
    for spread in (1e-9, 30.0, 1e4, 1e6, 1e12, 1e20):
        feeds = draw(2, 1, 18, 30, 1, 32, spread=spread)
        feeds["k"][0, 4] = feeds["k"][0, 9]
        assert near(attend(feeds), exact(feeds, 1, 32))


def test_any_scale_of_y(attend):
    for v_scale, y_scale in ((1e-30, 1e30), (1e30, 1e-30), (3e38, 1.2e-38), (1.2e-38, 3e38), (1.0, 1e-6)):
        feeds = draw(3, 1, 17, 30, 1, 32)
        feeds["v"][:, :, 0] = 128
        feeds["v_scale"] = np.array(v_scale, np.float32)
        feeds["y_scale"][:] = y_scale
        assert near(attend(feeds), exact(feeds, 1, 32), most=0.03)  # a sum near 0 over a tiny scale


def test_ties_are_rounded_to_even(attend):
    """One key, p = 128 steps of 1 / 128: y is v - 128, halved."""
    feeds = draw(4, 1, 1, 1, 1, 64, p_scale=1 / 128)
    feeds["v"][0, 0] = np.arange(96, 160)
    feeds["v_scale"], feeds["y_scale"][:], feeds["y_zero"][:] = np.array(0.5, np.float32), 1, 101
    expected = np.rint((np.arange(96, 160) - 128) / 2) + 101
    assert attend(feeds)[0, 0].tolist() == expected.tolist()


# the op


def test_op_equals_float64(library):
    for seed, (batch, rows, keys, heads, dims) in enumerate(
        ((2, 50, 50, 12, 64), (1, 197, 197, 3, 64), (3, 1, 77, 8, 64), (1, 300, 40, 1, 20), (2, 5, 9, 2, 18))
    ):
        feeds = draw(seed, batch, rows, keys, heads, dims)
        how = {"heads": heads, "width": heads * dims}
        (y,) = run(QUANT_ATTENTION, feeds, how, library=library)
        assert near(y, exact(feeds, **how))


@pytest.mark.parametrize(("p_scale", "gamma", "zeta"), WAYS)
def test_op_and_function_read_columns_of_one_tensor(library, p_scale, gamma, zeta):
    feeds = draw(5, 2, 21, 21, 1, 70, mask=causal(21, 21), p_scale=p_scale)
    qkv = feeds["q"]
    feeds |= {"k": qkv, "v": qkv, "y_scale": feeds["y_scale"][:24], "y_zero": feeds["y_zero"][:24]}
    how = {"heads": 2, "width": 24, "q_start": 1, "k_start": 25, "v_start": 46, "gamma": gamma, "zeta": zeta}
    expected = exact(feeds, **how)
    for ops in (library, None):
        (y,) = run(QUANT_ATTENTION, feeds, how, library=ops)
        assert near(y, expected)


def test_op_and_function_take_any_mask(library):
    rng = np.random.default_rng(6)
    for shape in ((), (1, 1), (13, 1), (1, 11), (13, 11), (3, 13, 11), (1, 3, 13, 1), (2, 1, 1, 11), (2, 3, 13, 11)):
        mask = rng.normal(0, 2, shape or 1).astype(np.float32) * (1 if shape else 0)
        if len(shape) > 2:
            mask[..., :6] = 0
            mask[..., 6:] = -np.inf if len(shape) == 4 else -1.5  # hides no key
            mask[1:, ..., 3:] = mask[0, ..., -1].min()  # pictures differ
        feeds = draw(7, 2, 13, 11, 3, 16, mask=mask)
        how = {"heads": 3, "width": 48}
        for ops in (library, None):
            (y,) = run(QUANT_ATTENTION, feeds, how, library=ops)
            assert near(y, exact(feeds, **how)), (shape, ops)


def test_op_and_function_take_one_scale(library):
    feeds = draw(8, 1, 5, 6, 2, 8)
    feeds |= {"y_scale": np.array(0.015, np.float32), "y_zero": np.array(200, np.uint8)}
    for ops in (library, None):
        (y,) = run(QUANT_ATTENTION, feeds, {"heads": 2, "width": 16}, library=ops)
        assert near(y, exact(feeds, 2, 16))


def attend_at_edge(function, edge: Edge, rows: int, keys: int, dims: int) -> None:
    mask = causal(rows, keys)
    mask[0] = -0.5
    feeds = draw(0, 1, rows, keys, 1, dims, mask=mask)
    ends = {name: edge.lay(feeds[name]) for name in ("q", "k", "v", "mask", "y_scale", "y_zero")}
    room = np.empty(scratch_bytes(keys, dims) + 64, np.uint8)
    head = Head(
        y=edge.lay(np.zeros(rows * dims, np.uint8)), q_step=dims, k_step=dims, v_step=dims, y_step=dims, rows=rows,
        keys=keys, dims=dims, mask_row=keys, mask_key=1, y_scale_step=1, y_zero_step=1, scale=1e-3, v_scale=0.02,
        zeta=1.0, q_zero=9, **ends,
    )  # fmt: skip
    function(ctypes.byref(head), room.ctypes.data + -room.ctypes.data % 64)


EDGES = [("quant_attention", PROTOTYPE, attend_at_edge, SIZES)]
CONTRACTS = [
    Contract(
        QUANT_ATTENTION,
        lambda seed, columns: draw(seed, 1, 3, 4, 2, 8),
        attributes={"heads": 2, "width": 16},
        refused=[
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
            ({"heads": 3}, "width is 16 and heads 3; expected a width that is a multiple of heads"),
            ({"heads": 0}, "heads is 0; expected 1 to"),
            ({"q_start": -1}, "q_start is -1; expected 0 to"),
            ({"gamma": 0.1}, "gamma is 0.1.* expected -1e30 <= gamma <= 0"),
            ({"zeta": 0.5}, "zeta 0.5"),
            ({"heads": 1, "width": 40000}, "at most 32768 each"),
            ({"gamma": -0.1}, r"p_scale is 0, gamma -0.1.*expected a p_scale over 0, or gamma 0 and zeta 1"),
        ],
        large=(draw(0, 2, 50, 50, 12, 64), {"heads": 12, "width": 768}),
        empty=[(draw(0, *shape, 4, 2, 8), {"heads": 2, "width": 16}, (*shape, 16)) for shape in ((0, 3), (2, 0))],
    ),
]
