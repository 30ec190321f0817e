"""RotaryAttention: the oracle, every kernel of this processor, the op in ONNX Runtime and its function, against torch's
own attention in float64."""

import ctypes

import numpy as np
import pytest
import torch

from calmclip.models.ops import reference
from calmclip.models.ops.spec import ROTARY_ATTENTION
from tests.models.ops.harness import BYTE_ISAS, Contract, Edge, kernel, kernels, run

HIDDEN = -1e4


def attributes(heads=4, groups=2, dims=12, **others):
    """q, k and v are columns of one tensor."""
    starts = {"q_start": 1, "k_start": 1 + heads * dims, "v_start": 1 + (heads + groups) * dims}
    return {"heads": heads, "groups": groups, "dims": dims, **starts, "epsilon": 1e-5, **others}


def draw(seed, tokens=9, batch=2, *, heads=4, groups=2, dims=12, norm=True, turned=True, mask="causal"):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)  # noqa: E731
    qkv = normal(batch, tokens, 2 + (heads + 2 * groups) * dims)
    qkv[..., 1 : 1 + heads * dims] *= dims**-0.5
    none = np.zeros(1, np.float32)
    angle = np.tile(rng.uniform(-3, 3, (tokens, dims // 2)), 2)
    cos, sin = np.cos(angle), np.sin(angle) * np.repeat([-1, 1], dims // 2)
    tables = {"cos": cos.astype(np.float32), "sin": sin.astype(np.float32)} if turned else {"cos": none, "sin": none}
    weights = {name: rng.uniform(0.3, 1, dims).astype(np.float32) if norm else none for name in "qk"}
    return {
        "q": qkv, "k": qkv, "v": qkv, "q_weight": weights["q"], "k_weight": weights["k"],
        **{f"{part}_{name}": tables[name] for part in "qk" for name in ("cos", "sin")},
        "mask": masks(rng, mask, batch, tokens),
    }  # fmt: skip


def masks(rng, kind, batch, tokens):
    """Padding on the left of row 0 and on the right of the others, if ``kind`` says padded."""
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    mask = np.zeros((batch, 1, tokens, tokens), np.float32)
    if kind == "none":
        return np.zeros(1, np.float32)
    if kind == "bias":
        return rng.normal(0, 2, (tokens, tokens)).astype(np.float32)
    if "causal" in kind:
        mask[..., distance < 0] = HIDDEN
    if "window" in kind:
        mask[..., np.abs(distance) >= 3] = HIDDEN
    if "holes" in kind:
        mask[rng.random(mask.shape) < 0.4] = HIDDEN
    if "padded" in kind:
        mask[0, ..., : tokens // 3] = -np.inf
        mask[1:, ..., tokens - tokens // 3 :] = -np.inf
    return mask if kind != "causal" else mask[:1, 0]


def exact(feeds, heads, groups, dims, q_start=0, k_start=0, v_start=0, epsilon=1e-6, cap=0.0, gamma=0.0, zeta=1.0):
    """torch in float64, head by head."""
    wide = {name: torch.from_numpy(array.astype(np.float64)) for name, array in feeds.items()}

    def part(name, start, head, weight, table):
        x = wide[name][..., start + head * dims : start + (head + 1) * dims]
        if weight is not None and weight.numel() > 1:
            x = torch.nn.functional.rms_norm(x, (dims,), weight, epsilon)
        if table is not None and wide[f"{table}_cos"].numel() > 1:
            cos, sin = (
                wide[f"{table}_{way}"].reshape(-1, *wide[f"{table}_{way}"].shape[-2:]) for way in ("cos", "sin")
            )
            x = x * cos + torch.cat([x[..., dims // 2 :], x[..., : dims // 2]], -1) * sin
        return x

    answers = []
    for head in range(heads):
        group = head // (heads // groups)
        q = part("q", q_start, head, wide["q_weight"], "q")
        k = part("k", k_start, group, wide["k_weight"], "k")
        logits = q @ k.transpose(-1, -2)
        logits = cap * torch.tanh(logits) if cap else logits
        mask = wide["mask"].reshape(-1, *wide["mask"].shape[-2:]) if wide["mask"].ndim > 1 else wide["mask"]
        logits = torch.where(mask > HIDDEN, logits + mask, torch.tensor(-1e30, dtype=torch.float64))
        p = torch.clamp((zeta - gamma) * logits.softmax(-1) + gamma, 0, 1)
        answers.append(p @ part("v", v_start, group, None, None))
    return torch.cat(answers, -1).numpy()


def agree(y, expected):
    return y.shape == expected.shape and np.abs(y - expected).max(initial=0) < 2e-5


FORMS = [
    {},
    {"norm": False, "mask": "none"},
    {"turned": False, "mask": "causal padded"},
    {"mask": "window"},
    {"mask": "causal window padded"},
    {"mask": "holes padded"},
    {"mask": "bias"},
]
SIZES = [(1, 1, 1, 2), (3, 2, 2, 6), (9, 4, 2, 12), (16, 2, 1, 16), (17, 3, 1, 34), (37, 4, 4, 64), (70, 2, 1, 128)]
HOWS = [{}, {"cap": 5.0}, {"gamma": -0.03, "zeta": 1.1}]


class Work(ctypes.Structure):
    """`AttentionGroup` of rotary_attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "y")),
        *((f"{name}_step", ctypes.c_size_t) for name in ("q", "k", "v", "y")),
        *((name, ctypes.c_size_t) for name in ("rows", "keys", "dims", "heads")),
        *((name, ctypes.c_void_p) for name in ("q_weight", "k_weight", "q_cos", "q_sin", "k_cos", "k_sin", "mask")),
        ("mask_row", ctypes.c_size_t), ("shown", ctypes.c_void_p), ("shown_step", ctypes.c_size_t),
        *((name, ctypes.c_float) for name in ("epsilon", "cap", "gamma", "zeta")),
    ]  # fmt: skip


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.POINTER(Work), ctypes.c_void_p)


def shown(mask):
    """`Shown` of each row of a mask [T, S]."""
    rows = []
    for row in mask:
        seen = np.flatnonzero(row > HIDDEN)
        first, last = (seen[0], seen[-1] + 1) if len(seen) else (0, len(row))
        rows.append((first, last, len(seen) > 0 and not row[first:last].any()))
    return np.array(rows, np.uint32)


def group_work(place, feeds, how, out):
    """The work of the first group of the first text; ``place``: array -> address."""
    heads, width = how["heads"] // how["groups"], feeds["q"].shape[-1]
    tokens = feeds["q"].shape[1]
    rows = {}
    for name in "qkv":
        # without the columns before, so that the tensor ends with its memory
        rows[name] = place(np.ascontiguousarray(feeds[name][0])) + 4 * how[f"{name}_start"]
    others = {
        name: place(feeds[name]) if feeds[name].size > 1 else None
        for name in ("q_weight", "k_weight", "q_cos", "q_sin", "k_cos", "k_sin")
    }
    mask = {}
    if feeds["mask"].size > 1:
        plane = np.ascontiguousarray(feeds["mask"].reshape(-1, *feeds["mask"].shape[-2:])[0])
        mask = {
            "mask": place(plane), "mask_row": tokens * (len(plane) > 1), "shown": place(shown(plane)),
            "shown_step": int(len(plane) > 1),
        }  # fmt: skip
    limits = {name: how.get(name, default) for name, default in (("cap", 0.0), ("gamma", 0.0), ("zeta", 1.0))}
    return Work(
        **rows, **others, **mask, **limits, y=out, q_step=width, k_step=width, v_step=width, y_step=heads * how["dims"],
        rows=tokens, keys=tokens, dims=how["dims"], heads=heads, epsilon=how["epsilon"],
    )  # fmt: skip


def scratch(keys, dims):
    """`rotary_scratch`, with guard values behind it."""
    count = (keys + 16) * (dims + 16) + 16 * (2 * dims + 32)
    room = np.full(count + 64, 77, np.float32)
    start = -room.ctypes.data % 64 // 4
    return room[start : start + count + 16], count


def attend(function, feeds, how):
    """The first group of the first text by a kernel; outputs are between guard values."""
    kept = []
    tokens, width = feeds["q"].shape[1], how["heads"] // how["groups"] * how["dims"]
    y, (room, count) = np.full(tokens * width + 32, 77, np.float32), scratch(tokens, how["dims"])
    place = lambda array: kept.append(array) or array.ctypes.data  # noqa: E731
    function(ctypes.byref(group_work(place, feeds, how, y.ctypes.data + 64)), room.ctypes.data)
    assert {*y[:16], *y[-16:], *room[count:]} == {77}
    return y[16:-16].reshape(1, tokens, width)


def small():
    """Feeds and attributes at the edges of blocks of rows and tiles of keys."""
    for number, (tokens, heads, groups, dims) in enumerate(SIZES):
        for form in FORMS:
            for extra in HOWS if number < 4 else HOWS[:1]:
                feeds = draw(number, tokens, 2, heads=heads, groups=groups, dims=dims, **form)
                yield feeds, attributes(heads, groups, dims, **extra)


@pytest.mark.parametrize("isa", BYTE_ISAS)
def test_kernels_equal_float64(library, isa):
    function = kernel(library, "rotary_attention", isa, PROTOTYPE)
    for feeds, how in small():
        y = attend(function, feeds, how)
        expected = exact({n: a[:1] if a.ndim > 2 else a for n, a in feeds.items()}, **how)
        assert agree(y, expected[..., : y.shape[-1]]), (feeds["q"].shape, how)


def test_every_instruction_set_gives_the_same_bits(library):
    functions = kernels(library, "rotary_attention", PROTOTYPE).values()
    for feeds, how in small():
        assert len({attend(function, feeds, how).tobytes() for function in functions}) == 1, (feeds["q"].shape, how)


def test_reference_equals_torch():
    for form in FORMS:
        for extra in HOWS:
            feeds, how = draw(1, **form), attributes(**extra)
            assert agree(reference.rotary_attention(**feeds, **how), exact(feeds, **how))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_op_and_function_equal_float64(library, form):
    for number, (tokens, heads, groups, dims) in enumerate(SIZES[1:5]):
        for extra in HOWS:
            feeds = draw(number, tokens, heads=heads, groups=groups, dims=dims, **form)
            how = attributes(heads, groups, dims, **extra)
            for ops in (library, None):
                assert agree(run(ROTARY_ATTENTION, feeds, how, library=ops)[0], exact(feeds, **how))


def test_one_query_with_a_rotation_of_its_own(library):
    """The last token alone, as in the last block of a decoder."""
    feeds, how = draw(2, mask="padded"), attributes()
    whole = exact(feeds, **how)
    at = [8, 4]
    rows = {name: feeds[f"q_{name}"][at][:, None, None] for name in ("cos", "sin")}
    alone = feeds | {
        "q": np.stack([feeds["q"][b, [t]] for b, t in enumerate(at)]), "q_cos": rows["cos"], "q_sin": rows["sin"],
        "mask": feeds["mask"][:, :, [0]],
    }  # fmt: skip
    for ops in (library, None):
        (y,) = run(ROTARY_ATTENTION, alone, how, library=ops)
        assert agree(y, np.stack([whole[b, [t]] for b, t in enumerate(at)]))


def test_a_row_without_a_visible_key_is_uniform(library):
    feeds, how = draw(3, 20, mask="causal padded"), attributes()
    for ops in (library, None):
        (y,) = run(ROTARY_ATTENTION, feeds, how, library=ops)
        values = feeds["v"][0, :, how["v_start"] : how["v_start"] + 12]
        assert np.allclose(y[0, 0, :12], values.mean(0), atol=1e-5)


def test_padding_and_other_texts_do_not_change_an_answer(library):
    """A text alone has the bits of the text with padding on its left or right."""
    feeds, how = draw(4, 12, 1, mask="causal"), attributes()
    (alone,) = run(ROTARY_ATTENTION, feeds, how, library=library)
    for left in (0, 5):
        wide = {name: np.zeros((1, 17, feeds["q"].shape[-1]), np.float32) for name in "qkv"}
        for name in "qkv":
            wide[name][:, left : left + 12] = feeds[name]
        tables = {n: np.zeros((17, 12), np.float32) for n in ("q_cos", "q_sin", "k_cos", "k_sin")}
        for name, table in tables.items():
            table[left : left + 12] = feeds[name]
        mask = np.full((1, 1, 17, 17), HIDDEN, np.float32)
        mask[0, 0, left : left + 12, left : left + 12] = feeds["mask"][0]
        (y,) = run(ROTARY_ATTENTION, feeds | wide | tables | {"mask": mask}, how, library=library)
        assert np.abs(y[:, left : left + 12] - alone).max() < 2e-6


def test_large_logits_stay_finite(library):
    feeds, how = draw(5, 30, norm=False), attributes()
    feeds = feeds | {name: feeds["q"] * np.float32(1e4) for name in "qkv"}
    (y,) = run(ROTARY_ATTENTION, feeds, how, library=library)
    assert np.isfinite(y).all()


def attend_at_edge(function, edge: Edge, tokens: int, heads: int, groups: int, dims: int) -> None:
    how = {**attributes(heads, groups, dims), "q_start": 0, "k_start": 0, "v_start": 0}
    feeds = draw(0, tokens, 1, heads=heads, groups=groups, dims=dims, mask="causal padded")
    feeds |= {name: feeds[name][..., : heads * dims] for name in "qkv"}
    _, count = scratch(tokens, dims)
    out = edge.lay(np.zeros((tokens, heads // groups * dims), np.float32))
    work = group_work(edge.lay, feeds, how, out)
    aligned = edge.lay(np.zeros((count + 15) // 16 * 16, np.float32))
    assert aligned % 64 == 0
    function(ctypes.byref(work), aligned)


EDGES = [("rotary_attention", PROTOTYPE, attend_at_edge, [(t, h, h, d) for t, h, _, d in SIZES])]
CONTRACTS = [
    Contract(
        ROTARY_ATTENTION,
        lambda seed, columns: draw(seed, mask="causal" if columns else "window"),
        attributes=attributes(),
        refused=[
            ({"q": [2, 9]}, r"q has the shape \[2, 9\]; expected \[batch, tokens, columns\]"),
            ({"q": [2, 9, 48]}, r"q has the shape \[2, 9, 48\]; expected 48 columns from 1 on"),
            ({"k": [1, 9, 98]}, r"k has the shape \[1, 9, 98\]; expected the batch of q, 2"),
            ({"v": [2, 8, 98]}, r"v has the shape \[2, 8, 98\]; expected the batch and tokens of k, \[2, 9\]"),
            ({"q_weight": [11]}, r"q_weight has the shape \[11\]; expected \[12\], or one number"),
            ({"k_cos": [8, 12]}, r"k_cos has the shape \[8, 12\]; expected \[9, 12\]"),
            ({"q_sin": [9, 10]}, r"q_sin has the shape \[9, 10\]; expected \[9, 12\]"),
            ({"q_sin": [1]}, r"q_sin has the shape \[1\]; expected a table or one number, as q_cos"),
            ({"mask": [9]}, r"mask has the shape \[9\]; expected \[1\], or \[2 or 1, 1, 9 or 1, 9\]"),
            ({"mask": [4, 9, 9]}, r"mask has the shape \[4, 9, 9\]"),
            ({"mask": np.ones(1)}, r"mask is one number, 1\.0.*; expected 0, which means no mask"),
            ({"groups": 3}, "heads is 4 and groups 3; expected a multiple of groups"),
            ({"epsilon": -1.0}, r"epsilon is -1\.0.*; expected a number of at least 0"),
            ({"cap": -1.0}, r"cap is -1\.0.*; expected a number of at least 0"),
            ({"gamma": 0.1}, r"gamma is 0\.1.* and zeta 1.*; expected"),
        ],
        large=(draw(5, 90, 3, heads=8, groups=4, dims=32), attributes(8, 4, 32)),
        empty=[(draw(0, 9, 0, mask="none"), attributes(), (0, 9, 48))],
    ),
]
