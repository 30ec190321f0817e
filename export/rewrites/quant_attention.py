"""Attention in 8 bits, from q, k and v to the quantized mixture of the values -> `ai.calmclip.QuantAttention`.

    q, k, v [B, T, W] -> Reshape, Transpose to heads -> QuantizeLinear -> DequantizeLinear
    q k^T [-> Add(mask)] -> Softmax, plain or ours -> QuantizeLinear at 1/255 -> DequantizeLinear
    or exp(logits - row maximum) for Softmax, and p v divided by the sum of the rounded p: normalized by the row maximum
    p v -> Transpose, Reshape to [B, T, W] [-> Mul by a positive number for each column] -> QuantizeLinear

q is uint8, k and v are int8 around 0, which the op reads as uint8 around 128: the same numbers. The rewrite quantizes
q, k and v before they become heads. If they are parts of one 8-bit tensor, the op reads that tensor and the columns
where they start.

A gate between p v and its Transpose is not matched, nor a mask that is not float32. The op is
`calmclip.models.ops.spec.QUANT_ATTENTION`. Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5.
"""

from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.quantized import QuantizedTensor, quantized_result, quantized_source, quantizer_of
from calmclip.export.matching.values import (
    constant_array,
    insert,
    is_transpose,
    new_constant,
    new_value,
    optional_input,
    producer,
    remove_dead,
    shape,
    sole_consumer,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.export.rewrites.quant_linear import split_widths
from calmclip.models.ops.spec import DOMAIN, QUANT_ATTENTION, SOFTMAX

_HEADS, _KEYS = (0, 2, 1, 3), (0, 2, 3, 1)  # `perm` of the Transpose of [B, T, H, d]
_STEP = np.float32(1 / 255)


class _Mismatch(Exception):
    """Why an attention in 8 bits is not one that the op takes."""


@dataclass(frozen=True)
class _Softmax:
    """``logits``, with their mask, and the ``last`` node of their softmax. ``by_maximum``: its results are
    probabilities normalized by the row maximum, not by the row sum."""

    logits: ir.Value | None
    last: ir.Node
    by_maximum: bool = False


@dataclass(frozen=True)
class _Heads:
    """q, k or v: ``rows`` [B, T, W] in float, and the 8-bit ``tensor`` that they become as heads."""

    rows: ir.Value
    tensor: QuantizedTensor
    heads: int
    width: int  # of one head

    @property
    def sizes(self) -> tuple[int | str, ...]:
        return shape(self.rows) or ()


def match(node: ir.Node) -> Match | str | None:
    if node.domain == DOMAIN and node.op_type == QUANT_ATTENTION.name:
        return _match_split(node)
    if node.domain or node.op_type != "MatMul":
        return None
    p = quantized_source(node.inputs[0], ir.DataType.UINT8)
    v = quantized_source(node.inputs[1], ir.DataType.INT8)
    softmax = None if p is None else _softmax(p)
    if softmax is None or p is None or v is None:
        return None
    try:
        return _attention(node, p, softmax, v)
    except _Mismatch as mismatch:
        return str(mismatch)


def _softmax(p: QuantizedTensor) -> _Softmax | None:
    quantize = producer(p.value, "QuantizeLinear")
    if quantize is None:
        return None
    source = quantize.inputs[0]
    softmax = producer(source, "Softmax") or producer(source, SOFTMAX.name, domain=DOMAIN)
    if softmax is not None:
        return _Softmax(softmax.inputs[0], softmax)
    exp = producer(source, "Exp")
    below = None if exp is None else producer(exp.inputs[0], "Sub")
    maximum = None if below is None else producer(below.inputs[1], "ReduceMax")
    if exp is None or below is None or maximum is None or maximum.inputs[0] is not below.inputs[0]:
        return None
    return _Softmax(below.inputs[0], exp, by_maximum=True) if _reduces_last_axis(maximum) else None


def _reduces_last_axis(node: ir.Node) -> bool:
    """Whether a Reduce is over the last axis, and keeps it."""
    axes = constant_array(optional_input(node, 1))
    return axes is not None and axes.tolist() == [-1] and node.attributes.get_int("keepdims", 1) == 1


def _attention(mixing: ir.Node, p: QuantizedTensor, softmax: _Softmax, v: QuantizedTensor) -> Match:
    _check_probabilities(p, softmax)
    logits, mask = softmax.logits, None
    if (add := producer(logits, "Add")) is not None:
        first, second = add.inputs
        logits, mask = (first, second) if producer(first, "MatMul") else (second, first)
        _check_mask(mask, logits)
    scoring = producer(logits, "MatMul")
    if scoring is None:
        raise _Mismatch("its logits are not a product with at most a mask added")
    q, k = quantized_source(scoring.inputs[0], ir.DataType.UINT8), quantized_source(scoring.inputs[1], ir.DataType.INT8)
    if q is None or k is None:
        raise _Mismatch("its logits are not a product of uint8 and int8")
    if not (k.symmetric and v.symmetric):
        raise _Mismatch("k or v has a zero point that is not 0, or no constant")
    if any(tensor.per_channel for tensor in (q, k, v)):
        raise _Mismatch("q, k or v has several scales")
    query, key, value = (_heads(tensor, perm) for tensor, perm in ((q, _HEADS), (k, _KEYS), (v, _HEADS)))
    if not (query.heads, query.width) == (key.heads, key.width) == (value.heads, value.width):
        sizes = (f"{name} {part.heads} x {part.width}" for name, part in (("q", query), ("k", key), ("v", value)))
        raise _Mismatch(f"its heads differ in number or width: {', '.join(sizes)}")
    if not query.sizes[0] == key.sizes[0] == value.sizes[0]:
        raise _Mismatch(f"q is {query.sizes}, k {key.sizes}, v {value.sizes}; their batches may differ")
    result = _result(mixing, p if softmax.by_maximum else None, query.sizes)
    limits = {
        name: softmax.last.attributes.get_float(name, default) for name, default in (("gamma", 0.0), ("zeta", 1.0))
    }

    def insert_op(y: ir.Value) -> None:
        last = result.nodes[-1]
        around = new_constant(last, "around_128", np.array(128, np.uint8))

        def quantized(part: _Heads, zero: ir.Value) -> ir.Value:
            rows = new_value(f"{part.tensor.value.name}_rows", ir.DataType.UINT8, part.rows.shape)
            return insert(last, "QuantizeLinear", [part.rows, part.tensor.scale, zero], rows)

        q8, k8, v8 = quantized(query, q.zero), quantized(key, around), quantized(value, around)
        step = new_constant(last, "relative", np.array(0, np.float32)) if softmax.by_maximum else p.scale
        masked = mask or new_constant(last, "no_mask", np.zeros(1, np.float32))
        inputs = [q8, q.scale, q.zero, k8, k.scale, v8, v.scale, step, masked, result.scale, result.zero]
        settings = {"heads": query.heads, "width": query.heads * query.width, **limits}
        insert(last, QUANT_ATTENTION, inputs, y, **settings, q_start=0, k_start=0, v_start=0)

    return Match((result.value,), insert_op)


def _check_probabilities(p: QuantizedTensor, softmax: _Softmax) -> None:
    if quantizer_of(p) is None:
        raise _Mismatch("its probabilities are dequantized in other steps than they are quantized in")
    step = constant_array(p.scale)
    if step is None or step.size != 1 or not p.symmetric:
        raise _Mismatch("its probabilities are not quantized with one constant scale and the zero point 0")
    if softmax.by_maximum and abs(step.item() - _STEP) > 1e-7 * _STEP:
        raise _Mismatch("its probabilities, normalized by the row maximum, are not in steps of 1/255")
    rank = None if softmax.logits is None or softmax.logits.shape is None else len(softmax.logits.shape)
    if softmax.last.attributes.get_int("axis", -1) not in (-1, None if rank is None else rank - 1):
        raise _Mismatch("its Softmax is not over the last axis")
    consumers = sole_consumer(softmax.last.outputs[0]), sole_consumer(p.value)
    if None in consumers or len(list(p.real.uses())) != 1 + softmax.by_maximum:
        raise _Mismatch("its probabilities are read elsewhere too")


def _check_mask(mask: ir.Value | None, logits: ir.Value | None) -> None:
    if mask is None or mask.dtype != ir.DataType.FLOAT or mask.shape is None or not 2 <= len(mask.shape) <= 4:
        raise _Mismatch("its mask is not float32 of a known rank, 2 to 4")
    if logits is not None and logits.shape is not None:
        for side, other in zip(reversed(list(mask.shape)), reversed(list(logits.shape)), strict=False):
            if side not in (1, other) and (other == 1 or (isinstance(side, int) and isinstance(other, int))):
                raise _Mismatch(f"its mask {mask.shape} broadcasts its logits {logits.shape}")


def _heads(tensor: QuantizedTensor, perm: tuple[int, ...]) -> _Heads:
    quantize = producer(tensor.value, "QuantizeLinear")
    transpose = None if quantize is None else producer(quantize.inputs[0], "Transpose")
    reshape = None if transpose is None else producer(transpose.inputs[0], "Reshape")
    if reshape is None or not is_transpose(transpose, perm):
        raise _Mismatch("q, k or v is not a Transpose of a Reshape to heads")
    if quantizer_of(tensor) is None:
        raise _Mismatch("q, k or v is dequantized in other steps than it is quantized in")
    rows = reshape.inputs[0]
    sizes, flat = shape(reshape.outputs[0]), shape(rows)
    if rows is None or sizes is None or flat is None or len(sizes) != 4 or len(flat) != 3:
        raise _Mismatch("q, k or v has no known shape, or another rank")
    heads, width = sizes[2:]
    if not (isinstance(heads, int) and isinstance(width, int) and heads * width == flat[-1]):
        raise _Mismatch("the width of its heads is unknown, or does not add up to its own")
    if not _keeps_rows(sizes, flat):
        raise _Mismatch(f"q, k or v is {flat} and its heads are {sizes}: other batches or tokens")
    return _Heads(rows, tensor, heads, width)


def _keeps_rows(sizes: tuple[int | str, ...], others: tuple[int | str, ...]) -> bool:
    """Whether a Reshape keeps batch and tokens. If it keeps one of them, it keeps both."""
    return any(side == other for side, other in zip(sizes[:2], others[:2], strict=True))


def _result(mixing: ir.Node, p: QuantizedTensor | None, rows: tuple[int | str, ...]) -> QuantizedTensor:
    """The quantized mixture, of shape ``rows``. ``p``: probabilities by the row maximum, by whose sum it is divided."""
    mixture = mixing.outputs[0]
    if p is not None:
        div = sole_consumer(mixture, "Div")
        total = None if div is None else producer(div.inputs[1], "ReduceSum")
        if div is None or total is None or total.inputs[0] is not p.real or not _reduces_last_axis(total):
            raise _Mismatch("its mixture is not divided by the sum of its probabilities, normalized by the row maximum")
        mixture = div.outputs[0]
    back = sole_consumer(mixture)
    if back is None or not is_transpose(back, _HEADS):
        raise _Mismatch("its mixture is gated, or not read by one Transpose back alone")
    reshape = sole_consumer(back.outputs[0], "Reshape")
    flat = None if reshape is None else shape(reshape.outputs[0])
    if reshape is None or flat is None or len(flat) != 3 or flat[2] != rows[2] or not _keeps_rows(flat, rows):
        raise _Mismatch(f"its mixture does not become rows {rows} again")
    result = quantized_result(reshape.outputs[0])
    if result is None:
        raise _Mismatch("its mixture is read in float")
    return result


def _match_split(node: ir.Node) -> Match | None:
    """An op that reads outputs of a Split reads the input of the Split instead, without a copy."""
    splits: list[tuple[str, int, ir.Node, int]] = []
    for name, place in (("q_start", 0), ("k_start", 3), ("v_start", 5)):
        value = node.inputs[place]
        split = producer(value, "Split")
        if split is None or split.attributes.get_int("axis", 0) not in (-1, 2) or len(shape(value) or ()) != 3:
            continue
        if value is not None and (widths := split_widths(split)) is not None:
            start: int = sum(widths[: split.outputs.index(value)])
            splits.append((name, place, split, start))

    def read_input_of_splits() -> None:
        for name, place, split, start in splits:
            node.replace_input_with(place, split.inputs[0])
            node.attributes[name] = ir.AttrInt64(name, node.attributes.get_int(name, 0) + start)
            remove_dead([split])

    return Match((), read_input_of_splits) if splits else None


REWRITES.register("quant_attention")(Rewrite(QUANT_ATTENTION, at_each_node(match), replaces=16, includes=(SOFTMAX,)))
