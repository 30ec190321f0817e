"""Attention of the shape that `ai.calmclip.QuantAttention` takes, in a float graph or between 8-bit pairs.

    q [B, H, T, d], k^T [B, H, d, T], v [B, H, T, d]
    q k^T [-> Add(mask)] -> Softmax -> p
    p v [-> Div(sum)] -> Transpose -> Reshape to rows [B, T, W], W = H d

`rewrites.quant_attention` replaces it, and `quantizers.attention` prepares it. Both read this module, so that the
quantizer prepares only what the rewrite replaces.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnxscript import ir

from calmclip.export.graph import activation_products, probabilities
from calmclip.export.matching import in_ir
from calmclip.export.matching.values import (
    constant_array,
    insert,
    is_transpose,
    new_constant,
    new_value,
    optional_input,
    producer,
    shape,
    sole_consumer,
)

Sizes = tuple[int | str, ...]
QUERIES, KEYS = "BHTd", "BHdT"  # the axes of q and v, and of k: batch, heads, tokens, numbers of a head
_APART = "BTHd"
_BACK = (0, 2, 1, 3)  # `perm` of the Transpose of p v
_FIRST = (2, 0, 3, 1, 4)  # `perm` of the Transpose of [B, T, parts, H, d]


class Mismatch(Exception):
    """Why attention is not of the shape that the op takes."""


@dataclass(frozen=True)
class Heads:
    """q, k or v: ``source``, of which a part, times ``factor``, becomes the heads. ``perm`` makes ``source``
    [B, T, H, d]; None if it has rows [B, T, ``parts`` W], of which ``part`` is the number. ``sizes``: B and T."""

    source: ir.Value
    perm: tuple[int, ...] | None
    sizes: Sizes
    heads: int
    width: int  # of one head
    factor: np.float32
    part: int = 0
    parts: int = 1

    @property
    def columns(self) -> int:
        return self.heads * self.width

    def rows(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Insert the nodes that make rows [B, T, W] of ``value``, which has the axes of ``source``."""
        if self.perm is None:
            return value
        name, dtype = value.name, ir.DataType(value.dtype or ir.DataType.UNDEFINED)
        if self.perm != (0, 1, 2, 3):
            apart = new_value(f"{name}_apart", dtype, (*self.sizes, self.heads, self.width))
            value = insert(before, "Transpose", [value], apart, perm=self.perm)
        rows = new_value(f"{name}_rows", dtype, (*self.sizes, self.columns))
        sides = new_constant(before, f"to_rows_of_{self.columns}", np.array([0, 0, self.columns]))
        return insert(before, "Reshape", [value, sides], rows)


def heads(value: ir.Value | None, axes: str) -> Heads:
    """``value``: q, k or v, with the ``axes`` `QUERIES` or `KEYS`. Raises `Mismatch`."""
    sizes = shape(value)
    if value is None or sizes is None or len(sizes) != 4:
        raise Mismatch("q, k or v has no known shape, or another rank")
    batch, tokens, number, width = (sizes[axes.index(axis)] for axis in _APART)
    if not isinstance(number, int) or not isinstance(width, int):
        raise Mismatch(f"q, k or v has {number} heads of {width}; both must be known")
    factor = np.float32(1)
    while (node := producer(value, "Transpose", "Mul")) is not None and node.inputs[0] is not None:
        if node.op_type == "Mul":
            scale = constant_array(node.inputs[1])
            if scale is None or scale.size != 1 or not scale > 0:
                break
            factor *= np.float32(scale.item())
        else:
            perm = node.attributes.get_ints("perm", (3, 2, 1, 0))
            axes = "".join(axes[perm.index(axis)] for axis in range(4))
        value = node.inputs[0]
    if axes == QUERIES and (split := _part(value, number * width)) is not None:
        return Heads(split[0], None, (batch, tokens), number, width, factor, *split[1:])
    while axes == _APART and (reshape := producer(value, "Reshape")) is not None:
        flat = shape(reshape.inputs[0])
        if reshape.inputs[0] is None or flat is None:
            break
        if len(flat) == 3 and flat[2] == number * width and _keeps_rows(flat, (batch, tokens)):
            return Heads(reshape.inputs[0], None, flat[:2], number, width, factor)
        if flat != shape(value):
            break
        value = reshape.inputs[0]
    return Heads(value, tuple(map(axes.index, _APART)), (batch, tokens), number, width, factor)


def _part(value: ir.Value, columns: int) -> tuple[ir.Value, int, int] | None:
    """If ``value`` [B, H, T, d] is taken from a transposed [parts, B, H, T, d]: its rows [B, T, parts W], the number of
    ``value``, and the number of parts. So timm takes q, k and v from one product."""
    squeeze = producer(value, "Squeeze")
    cut = None if squeeze is None else producer(squeeze.inputs[0], "Slice")
    transpose = None if cut is None else producer(cut.inputs[0], "Transpose")
    reshape = None if transpose is None else producer(transpose.inputs[0], "Reshape")
    if squeeze is None or cut is None or reshape is None or not is_transpose(transpose, _FIRST):
        return None
    rows, apart, taken = reshape.inputs[0], shape(reshape.outputs[0]), shape(cut.outputs[0])
    flat, start = shape(rows), constant_array(cut.inputs[1])
    axes = [constant_array(optional_input(*place)) for place in ((cut, 3), (squeeze, 1))]
    if rows is None or apart is None or taken is None or flat is None or start is None:
        return None
    parts = apart[2]
    if any(axis is None or axis.tolist() != [0] for axis in axes) or taken[0] != 1 or not isinstance(parts, int):
        return None
    if len(flat) != 3 or flat[2] != parts * columns or not _keeps_rows(flat, apart):
        return None
    return rows, int(start.item()) % parts, parts


def check_alike(query: Heads, key: Heads, value: Heads) -> None:
    """Raises `Mismatch` if the three do not make one attention."""
    parts = {"q": query, "k": key, "v": value}
    if len({(part.heads, part.width) for part in parts.values()}) > 1:
        sizes = (f"{name} {part.heads} x {part.width}" for name, part in parts.items())
        raise Mismatch(f"its heads differ in number or width: {', '.join(sizes)}")
    if len({part.sizes[0] for part in parts.values()}) > 1:
        sizes = (f"{name} {part.sizes}" for name, part in parts.items())
        raise Mismatch(f"batch and tokens are {', '.join(sizes)}; the batches may differ")


def scores(logits: ir.Value | None) -> tuple[ir.Node, ir.Value | None]:
    """-> the product q k^T that ``logits`` come from, and the mask added to it. Raises `Mismatch`."""
    mask = None
    if (add := producer(logits, "Add")) is not None:
        first, second = add.inputs
        logits, mask = (first, second) if producer(first, "MatMul") else (second, first)
        _check_mask(mask, logits)
    product = producer(logits, "MatMul")
    if product is None:
        raise Mismatch("its logits are not a product with at most a mask added")
    return product, mask


def rows_of(mixture: ir.Value, query: Heads) -> ir.Value:
    """The rows [B, T, W] that the mixture p v of the attention of ``query`` becomes. Raises `Mismatch`."""
    back = sole_consumer(mixture)
    if back is None or not is_transpose(back, _BACK):
        raise Mismatch("its mixture is gated, or not read by one Transpose back alone")
    reshape = sole_consumer(back.outputs[0], "Reshape")
    flat = None if reshape is None else shape(reshape.outputs[0])
    if reshape is None or flat is None or len(flat) != 3:
        raise Mismatch("its mixture does not become rows again")
    if flat[2] != query.columns or not _keeps_rows(flat, query.sizes):
        raise Mismatch(f"its mixture becomes {flat}; expected {(*query.sizes, query.columns)}")
    return reshape.outputs[0]


def fused(model: onnx.ModelProto, attention: Collection[str]) -> dict[str, str]:
    """The products p v of the float graph ``model`` that `rewrites.quant_attention` puts into one op if the products
    ``attention`` (node names) are in 8 bits; -> node name -> the rows that its mixture becomes.

    A product behind a clipped softmax is not among them: its probabilities are compared with 0 and 1, so they are not
    normalized otherwise.
    """
    mixed, mixers = probabilities(model.graph.node), dict[str, str]()
    if not any(node.name in attention and node.input[0] in mixed for node in activation_products(model)):
        return {}
    for node in in_ir(model).graph:
        softmax = producer(node.inputs[0], "Softmax") if node.op_type == "MatMul" else None
        if softmax is not None and node.name and node.name in attention:
            try:
                mixers[node.name] = _rows(node, softmax, attention)
            except Mismatch:
                continue
    return mixers


def _rows(mixing: ir.Node, softmax: ir.Node, attention: Collection[str]) -> str:
    p = softmax.outputs[0]
    rank = 0 if p.shape is None else len(p.shape)
    if softmax.attributes.get_int("axis", -1) not in (-1, rank - 1) or sole_consumer(p) is not mixing:
        raise Mismatch("its Softmax is not over the last axis, or its probabilities are read elsewhere too")
    scoring, _ = scores(softmax.inputs[0])
    if scoring.name not in attention:
        raise Mismatch("its logits are a product in float")
    query, key, value = (
        heads(scoring.inputs[0], QUERIES),
        heads(scoring.inputs[1], KEYS),
        heads(mixing.inputs[1], QUERIES),
    )
    check_alike(query, key, value)
    return str(rows_of(mixing.outputs[0], query).name)


def _check_mask(mask: ir.Value | None, logits: ir.Value | None) -> None:
    if mask is None or mask.dtype != ir.DataType.FLOAT or mask.shape is None or not 2 <= len(mask.shape) <= 4:
        raise Mismatch("its mask is not float32 of a known rank, 2 to 4")
    if logits is not None and logits.shape is not None:
        for side, other in zip(reversed(list(mask.shape)), reversed(list(logits.shape)), strict=False):
            if side not in (1, other) and (other == 1 or (isinstance(side, int) and isinstance(other, int))):
                raise Mismatch(f"its mask {mask.shape} broadcasts its logits {logits.shape}")


def _keeps_rows(sizes: Sizes, others: Sizes) -> bool:
    """Whether a Reshape keeps batch and tokens. If it keeps one of them, it keeps both."""
    return any(side == other for side, other in zip(sizes[:2], others[:2], strict=True))
