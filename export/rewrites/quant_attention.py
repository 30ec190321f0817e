"""Attention in 8 bits, from q, k and v to the quantized mixture of the values -> `ai.calmclip.QuantAttention`.

    q, k, v as heads -> QuantizeLinear -> DequantizeLinear
    q k^T [-> Add(mask)] -> Softmax, plain or ours -> QuantizeLinear at 1/255 -> DequantizeLinear
    or exp(logits - row maximum) for Softmax, and p v divided by the sum of the rounded p: normalized by the row maximum
    p v -> Transpose, Reshape to [B, T, W] [-> Mul by a positive number for each column] -> QuantizeLinear

q is uint8, k and v are int8 around 0, which the op reads as uint8 around 128: the same numbers. The rewrite quantizes
q, k and v before they become heads: as rows [B, T, W], or, behind a norm of each head or a rotation by positions, as
[B, T, H, d] or [B, H, T, d], and makes rows of the bytes. If they are parts of one 8-bit tensor, the op reads that
tensor and the columns where they start.

A gate between p v and its Transpose is not matched, nor a mask that is not float32. The op is
`calmclip.models.ops.spec.QUANT_ATTENTION`. Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.attention import (
    KEYS,
    QUERIES,
    Heads,
    Mismatch,
    check_alike,
    heads,
    rows_of,
    scores,
)
from calmclip.export.matching.quantized import (
    QuantizedTensor,
    is_normal,
    quantized_result,
    quantized_source,
    quantizer_of,
)
from calmclip.export.matching.values import (
    constant_array,
    insert,
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
from calmclip.models.flow import Array
from calmclip.models.ops.spec import DOMAIN, QUANT_ATTENTION, SOFTMAX

_STEP = np.float32(1 / 255)


@dataclass(frozen=True)
class _Softmax:
    """``logits``, with their mask, and the ``last`` node of their softmax. ``by_maximum``: its results are
    probabilities normalized by the row maximum, not by the row sum."""

    logits: ir.Value | None
    last: ir.Node
    by_maximum: bool = False


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
    except Mismatch as mismatch:
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
    scoring, mask = scores(softmax.logits)
    q, k = quantized_source(scoring.inputs[0], ir.DataType.UINT8), quantized_source(scoring.inputs[1], ir.DataType.INT8)
    if q is None or k is None:
        raise Mismatch("its logits are not a product of uint8 and int8")
    if not (k.symmetric and v.symmetric):
        raise Mismatch("k or v has a zero point that is not 0, or no constant")
    if any(tensor.per_channel for tensor in (q, k, v)):
        raise Mismatch("q, k or v has several scales")
    query, key, value = (heads(_real(tensor), axes) for tensor, axes in ((q, QUERIES), (k, KEYS), (v, QUERIES)))
    check_alike(query, key, value)
    parts = query, key, value
    for part, tensor in zip(parts, (q, k, v), strict=True):
        if part.factor != 1 and not is_normal(_steps(part, tensor)):
            raise Mismatch(f"q, k or v is multiplied by {part.factor}, and its scale is no constant that takes this")
    result = _result(mixing, p if softmax.by_maximum else None, query)
    limits = {
        name: softmax.last.attributes.get_float(name, default) for name, default in (("gamma", 0.0), ("zeta", 1.0))
    }

    def insert_op(y: ir.Value) -> None:
        last = result.nodes[-1]
        around = new_constant(last, "around_128", np.array(128, np.uint8))
        used = Counter(part.source for part in parts)
        whole = {part.source: part for part in parts if part.parts == used[part.source] > 1}
        splits = {source: _split(part, last) for source, part in whole.items()}

        def quantized(part: Heads, tensor: QuantizedTensor, zero: ir.Value) -> ir.Value:
            real, scale, name = part.source, tensor.scale, tensor.value.name
            if part.parts > 1:
                real = splits[real][part.part] if real in splits else _slice(part, last)
            if part.factor != 1:
                scale = new_constant(last, f"{name}_steps", _steps(part, tensor))
            source = new_value(f"{name}_source", ir.DataType.UINT8, real.shape)
            return part.rows(insert(last, "QuantizeLinear", [real, scale, zero], source), last)

        q8, k8, v8 = quantized(query, q, q.zero), quantized(key, k, around), quantized(value, v, around)
        step = new_constant(last, "relative", np.array(0, np.float32)) if softmax.by_maximum else p.scale
        masked = mask or new_constant(last, "no_mask", np.zeros(1, np.float32))
        inputs = [q8, q.scale, q.zero, k8, k.scale, v8, v.scale, step, masked, result.scale, result.zero]
        settings = {"heads": query.heads, "width": query.columns, **limits}
        insert(last, QUANT_ATTENTION, inputs, y, **settings, q_start=0, k_start=0, v_start=0)

    return Match((result.value,), insert_op)


def _steps(part: Heads, tensor: QuantizedTensor) -> Array:
    """The scale of ``tensor`` before the multiplication by `Heads.factor`; NaN if it is not constant."""
    steps = constant_array(tensor.scale)
    with np.errstate(over="ignore"):
        return np.asarray(np.nan if steps is None else steps / part.factor, np.float32)


def _split(part: Heads, before: ir.Node) -> list[ir.Value]:
    """Insert a Split of the rows into their parts."""
    sizes = (*part.sizes, part.columns)
    names = (f"{part.source.name}_part_{number}" for number in range(part.parts))
    outputs = [new_value(name, ir.DataType.FLOAT, sizes) for name in names]
    insert(before, "Split", [part.source], *outputs, axis=2, num_outputs=part.parts)
    return outputs


def _slice(part: Heads, before: ir.Node) -> ir.Value:
    """Insert a Slice of the rows: one of their parts."""
    bounds = [part.part * part.columns, (part.part + 1) * part.columns, 2]
    places = [new_constant(before, f"at_{place}", np.array([place])) for place in bounds]
    name = f"{part.source.name}_part_{part.part}"
    output = new_value(name, ir.DataType.FLOAT, (*part.sizes, part.columns))
    return insert(before, "Slice", [part.source, *places], output)


def _real(tensor: QuantizedTensor) -> ir.Value | None:
    """The float value that becomes ``tensor``."""
    quantize = quantizer_of(tensor)
    if quantize is None:
        raise Mismatch("q, k or v is dequantized in other steps than it is quantized in")
    return quantize.inputs[0]


def _check_probabilities(p: QuantizedTensor, softmax: _Softmax) -> None:
    if quantizer_of(p) is None:
        raise Mismatch("its probabilities are dequantized in other steps than they are quantized in")
    step = constant_array(p.scale)
    if step is None or step.size != 1 or not p.symmetric:
        raise Mismatch("its probabilities are not quantized with one constant scale and the zero point 0")
    if softmax.by_maximum and abs(step.item() - _STEP) > 1e-7 * _STEP:
        raise Mismatch("its probabilities, normalized by the row maximum, are not in steps of 1/255")
    rank = None if softmax.logits is None or softmax.logits.shape is None else len(softmax.logits.shape)
    if softmax.last.attributes.get_int("axis", -1) not in (-1, None if rank is None else rank - 1):
        raise Mismatch("its Softmax is not over the last axis")
    consumers = sole_consumer(softmax.last.outputs[0]), sole_consumer(p.value)
    if None in consumers or len(list(p.real.uses())) != 1 + softmax.by_maximum:
        raise Mismatch("its probabilities are read elsewhere too")


def _result(mixing: ir.Node, p: QuantizedTensor | None, query: Heads) -> QuantizedTensor:
    """The quantized mixture. ``p``: probabilities by the row maximum, by whose sum it is divided."""
    mixture = mixing.outputs[0]
    if p is not None:
        div = sole_consumer(mixture, "Div")
        total = None if div is None else producer(div.inputs[1], "ReduceSum")
        if div is None or total is None or total.inputs[0] is not p.real or not _reduces_last_axis(total):
            raise Mismatch("its mixture is not divided by the sum of its probabilities, normalized by the row maximum")
        mixture = div.outputs[0]
    result = quantized_result(rows_of(mixture, query))
    if result is None:
        raise Mismatch("its mixture is read in float")
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
