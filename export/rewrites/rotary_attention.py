"""Attention of decoders in float -> `ai.calmclip.RotaryAttention`, whose memory is linear in the number of tokens.

    rows [B, S, n d] -> Reshape, Transpose to heads [B, n, S, d] [-> norm] [-> x * cos + swap(x) * sin]      q and k
    q as [B, G, H / G S, d] @ k^T, as [B, H, S, T] [-> cap * tanh] -> Add(mask) -> Softmax, plain or ours
    as [B, G, H / G S, T] @ v, as [B, H, S, d] -> Transpose, Reshape to rows [B, S, H d]

If q, k and v are parts of one tensor, the op reads that tensor and the columns where they start. A gate on the heads is
not matched, nor a mask for single heads. Without a norm or a rotation of q or k the rule leaves attention to others.

The op is `calmclip.models.ops.spec.ROTARY_ATTENTION`. Source: Su et al. 2021 (arXiv 2104.09864), section 3.4; Ainslie
et al. 2023 (arXiv 2305.13245), section 2.
"""

from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.attention import Mismatch
from calmclip.export.matching.rows import Norm, norm, number
from calmclip.export.matching.values import (
    insert,
    is_transpose,
    new_constant,
    producer,
    shape,
    sole_consumer,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.export.rewrites.quant_linear import split_widths
from calmclip.models.ops.spec import DOMAIN, ROTARY_ATTENTION, SOFTMAX

_HEADS = (0, 2, 1, 3)  # `perm` between [B, S, n, d] and [B, n, S, d]
_KEYS = (0, 1, 3, 2)
Sizes = tuple[int | str, ...]


@dataclass(frozen=True)
class _Part:
    """q, k or v: ``count`` heads of ``dims`` numbers, the columns of ``rows`` from ``start`` on."""

    rows: ir.Value
    start: int
    count: int
    dims: int
    sizes: Sizes  # B and S
    norm: Norm | None = None
    cos: ir.Value | None = None
    sin: ir.Value | None = None


def match(node: ir.Node) -> Match | str | None:
    if node.domain or node.op_type != "MatMul":
        return None
    p = _unshaped(node.inputs[0])
    softmax = producer(p, "Softmax") or producer(p, SOFTMAX.name, domain=DOMAIN)
    if softmax is None:
        return None
    logits = softmax.inputs[0]
    add = producer(logits, "Add")
    for place in (0, 1) if add is not None else ():
        assert add is not None
        scoring, cap = _scores(add.inputs[place])
        if scoring is not None:
            query = _prepared(_unshaped(scoring.inputs[0]))
            if query is None or (query.norm is None and query.cos is None):
                return None
            try:
                return _attention(node, softmax, scoring, add.inputs[1 - place], query, cap)
            except Mismatch as mismatch:
                return str(mismatch)
    return None


def _attention(
    mixing: ir.Node, softmax: ir.Node, scoring: ir.Node, mask: ir.Value | None, query: _Part, cap: float
) -> Match:
    transpose = producer(scoring.inputs[1], "Transpose")
    key = None if transpose is None else _prepared(transpose.inputs[0])
    value = _heads(mixing.inputs[1])
    if transpose is None or not is_transpose(transpose, _KEYS) or key is None or value is None:
        raise Mismatch("its k or v are no heads of rows")
    heads, groups, dims = query.count, key.count, query.dims
    tokens, keys, batch = query.sizes[1], key.sizes[1], query.sizes[0]
    if (key.dims, value.dims, value.count, value.sizes) != (dims, dims, groups, key.sizes) or key.sizes[0] != batch:
        raise Mismatch("its q, k and v differ in width, in batch, or k and v in heads or tokens")
    if heads % groups or dims % 2:
        raise Mismatch(f"it has {heads} heads of q, {groups} of k and v, of {dims} numbers each")
    together = shape(scoring.outputs[0])
    if together is None or together[:2] != (batch, groups) or together[3] != keys:
        raise Mismatch(f"its logits are {together}; expected {(batch, groups, '...', keys)}")
    if shape(softmax.outputs[0]) != (batch, heads, tokens, keys) or shape(mixing.inputs[0]) != together:
        raise Mismatch("its probabilities are not those of every head, or not put together as its logits are")
    if softmax.attributes.get_int("axis", -1) not in (-1, 3) or sole_consumer(softmax.outputs[0]) is None:
        raise Mismatch("its Softmax is not over the last axis, or its probabilities are read elsewhere too")
    seen = shape(mask)
    if mask is None or seen is None or mask.dtype != ir.DataType.FLOAT or not 2 <= len(seen) <= 4:
        raise Mismatch("its mask is not float32 of a known rank, 2 to 4")
    sides = (*(1,) * (4 - len(seen)), *seen)
    if sides[0] not in (1, batch) or sides[1] != 1 or sides[2] not in (1, tokens) or sides[3] != keys:
        raise Mismatch(f"its mask is {seen}; expected {(batch, 1, tokens, keys)} or 1 in place of the first or third")
    epsilons = {part.norm.epsilon for part in (query, key) if part.norm is not None}
    if len(epsilons) > 1:
        raise Mismatch("the norms of q and k have different epsilons")
    if (query.cos is None) != (key.cos is None):
        raise Mismatch("one of q and k is rotated")
    for part in (query, key):
        for table in (part.cos, part.sin):
            rows = shape(table) if table is not None else (part.sizes[1], dims)
            if rows is None or len(rows) not in (2, 4) or rows[-2:] != (part.sizes[1], dims):
                raise Mismatch(f"its rotation is {rows}; expected {(part.sizes[1], dims)}")
            if len(rows) == 4 and (rows[0] not in (1, batch) or rows[1] != 1):
                raise Mismatch(f"its rotation is {rows}; expected {(batch, 1, part.sizes[1], dims)}")
    rows_out = _rows(mixing, (batch, heads, tokens, dims))
    last = rows_out.producer()
    assert last is not None
    limits = {name: softmax.attributes.get_float(name, at) for name, at in (("gamma", 0.0), ("zeta", 1.0))}

    def insert_op(y: ir.Value) -> None:
        unit = new_constant(last, "no_norm", np.ones(1, np.float32))
        still = new_constant(last, "no_rotation", np.zeros(1, np.float32))
        weights = [unit if part.norm is None else part.norm.weight for part in (query, key)]
        tables = [table or still for part in (query, key) for table in (part.cos, part.sin)]
        insert(
            last, ROTARY_ATTENTION, [query.rows, key.rows, value.rows, *weights, *tables, mask], y,
            heads=heads, groups=groups, dims=dims, q_start=query.start, k_start=key.start, v_start=value.start,
            epsilon=epsilons.pop() if epsilons else 0.0, cap=cap, **limits,
        )  # fmt: skip

    return Match((rows_out,), insert_op)


def _scores(value: ir.Value | None) -> tuple[ir.Node | None, float]:
    """The product q k^T that makes ``value``, and the cap of its logits, 0 without one."""
    capped, cap = producer(value, "Mul"), 0.0
    if capped is not None:
        tangents = [producer(side, "Tanh") for side in capped.inputs]
        place = 0 if tangents[0] is not None else 1
        factor = number(capped.inputs[1 - place])
        tangent = tangents[place]
        if tangent is None or factor is None or factor <= 0:
            return None, 0.0
        value, cap = tangent.inputs[0], factor
    return producer(_unshaped(value), "MatMul"), cap


def _unshaped(value: ir.Value | None) -> ir.Value | None:
    """The value before Reshapes that keep its first and last axis, and between them split or join two."""
    while (reshape := producer(value, "Reshape")) is not None:
        before, after = shape(reshape.inputs[0]), shape(value)
        if before is None or after is None or (before[0], before[-1]) != (after[0], after[-1]) or len(before) < 4:
            break
        value = reshape.inputs[0]
    return value


def _prepared(value: ir.Value | None) -> _Part | None:
    """The heads q or k, normalized and rotated; None if they are no heads of rows."""
    cos = sin = None
    add = producer(value, "Add")
    for place in (0, 1) if add is not None else ():
        assert add is not None
        straight, across = (producer(side, "Mul") for side in (add.inputs[place], add.inputs[1 - place]))
        swapped = None if across is None else producer(across.inputs[0], "Concat")
        if straight is None or across is None or swapped is None:
            continue
        if (x := straight.inputs[0]) is not None and _swaps(swapped, x):
            value, cos, sin = x, straight.inputs[1], across.inputs[1]
            break
    before = norm(value)
    part = _heads(before.x if before else value)
    return None if part is None else _Part(part.rows, part.start, part.count, part.dims, part.sizes, before, cos, sin)


def _swaps(concat: ir.Node, x: ir.Value) -> bool:
    """Whether ``concat`` exchanges the halves of ``x`` along the last axis."""
    rank = len(x.shape or ())
    if concat.attributes.get_int("axis", 0) not in (-1, rank - 1) or len(concat.inputs) != 2:
        return False
    second, first = concat.inputs
    split = producer(first, "Split")
    if split is None or split.inputs[0] is not x or [*split.outputs] != [first, second]:
        return False
    widths = split_widths(split)
    return split.attributes.get_int("axis", 0) in (-1, rank - 1) and widths is not None and widths[0] == widths[1]


def _heads(value: ir.Value | None) -> _Part | None:
    """Heads [B, n, S, d] of rows [B, S, n d], which may be some columns of a wider tensor."""
    transpose, sizes = producer(value, "Transpose"), shape(value)
    reshape = producer(transpose.inputs[0], "Reshape") if is_transpose(transpose, _HEADS) and transpose else None
    flat = None if reshape is None else shape(reshape.inputs[0])
    if reshape is None or sizes is None or flat is None or len(sizes) != 4 or len(flat) != 3:
        return None
    rows, (batch, count, tokens, dims) = reshape.inputs[0], sizes
    if not isinstance(count, int) or not isinstance(dims, int) or rows is None:
        return None
    if flat != (batch, tokens, count * dims):
        return None
    split, start = producer(rows, "Split"), 0
    widths = None if split is None else split_widths(split)
    if split is not None and widths is not None and split.attributes.get_int("axis", 0) in (-1, 2) and split.inputs[0]:
        start, rows = sum(widths[: split.outputs.index(rows)]), split.inputs[0]
    return _Part(rows, start, count, dims, (batch, tokens))


def _rows(mixing: ir.Node, apart: Sizes) -> ir.Value:
    """The rows [B, S, H d] that the mixture becomes. Raises `Mismatch`."""
    value, (batch, heads, tokens, dims) = mixing.outputs[0], apart
    while shape(value) != apart and (reshape := sole_consumer(value, "Reshape")) is not None:
        value = reshape.outputs[0]
    back = sole_consumer(value)
    if shape(value) != apart or back is None or not is_transpose(back, _HEADS):
        raise Mismatch("its mixture is gated, or not read by one Transpose back alone")
    reshape = sole_consumer(back.outputs[0], "Reshape")
    assert isinstance(heads, int)
    assert isinstance(dims, int)
    if reshape is None or shape(reshape.outputs[0]) != (batch, tokens, heads * dims):
        raise Mismatch("its mixture does not become rows again")
    return reshape.outputs[0]


REWRITES.register("rotary_attention")(Rewrite(ROTARY_ATTENTION, at_each_node(match), replaces=40, includes=(SOFTMAX,)))
