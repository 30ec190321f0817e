"""Attention of 8 bits, from q, k and v to what makes 8 bits of their mixture -> `ai.calmclip.QuantAttention`.

    q, k, v [B, T, W] -> Reshape, Transpose to heads -> QuantizeLinear -> DequantizeLinear
    q k^T [-> Add(mask)] -> Softmax, plain or ours -> QuantizeLinear at 1/255 -> DequantizeLinear
    or exp(logits - their greatest) for Softmax, and p v divided by the sum of what was rounded (`_qdq.relate`)
    p v -> Transpose, Reshape to [B, T, W] [-> Mul by a positive number for each column] -> QuantizeLinear

q in uint8, k and v in int8 around 0, which the op reads as uint8 around 128: the same numbers. q, k and v are then
quantized before they are made heads; where they are parts of one tensor of 8 bits, the op is given that, and where.

A gate between p v and its Transpose, and a mask that is not float32 added to the logits, are left alone. The op is
`calmclip.models.ops.spec.QUANT_ATTENTION`. Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _patterns
from calmclip.export.rewrites._eight import (
    Eight,
    constant,
    insert,
    like,
    maker,
    only,
    put,
    read,
    shape,
    sweep,
    writer,
    written,
)
from calmclip.export.rewrites.quant_linear import widths
from calmclip.models.ops.spec import DOMAIN, QUANT_ATTENTION, SOFTMAX

_HEADS, _KEYS = [0, 2, 1, 3], [0, 2, 3, 1]  # what Transpose makes of [B, T, H, d]
_STEP = np.float32(1 / 255)


class _No(Exception):
    """Why it is none: almost one."""


@dataclass(frozen=True)
class Attention:
    q: Eight
    k: Eight
    v: Eight
    step: ir.Value | None  # of probabilities; None where they are relative
    mask: ir.Value | None
    heads: int
    width: int
    gamma: float
    zeta: float
    after: Eight


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        if node.graph is None:
            continue
        if node.domain == DOMAIN and node.op_type == QUANT_ATTENTION.name:
            fired += _whole(node)
            continue
        if node.domain or node.op_type != "MatMul":
            continue
        chances, v = read(node.inputs[0], ir.DataType.UINT8), read(node.inputs[1], ir.DataType.INT8)
        softmax = None if chances is None else _softmax(chances)
        if softmax is None or chances is None or v is None:
            continue
        try:
            _put(node, _attention(node, chances, softmax, v))
            fired += 1
        except _No as error:
            missed[str(node.name)] = str(error)
    return Outcome(fired, missed)


@dataclass(frozen=True)
class _Softmax:
    """``logits``, mask included, and the last node of what is made of them; ``relative``: to the row's greatest."""

    logits: ir.Value | None
    last: ir.Node
    relative: bool = False

    @property
    def limits(self) -> list[float]:
        return [self.last.attributes.get_float(name, float(i)) for i, name in enumerate(("gamma", "zeta"))]


def _softmax(chances: Eight) -> _Softmax | None:
    node = maker(chances.value, "QuantizeLinear")
    if node is None:
        return None
    plain = maker(node.inputs[0], "Softmax") or maker(node.inputs[0], SOFTMAX.name, domain=DOMAIN)
    if plain is not None:
        return _Softmax(plain.inputs[0], plain)
    exp = maker(node.inputs[0], "Exp")
    below = None if exp is None else maker(exp.inputs[0], "Sub")
    greatest = None if below is None else maker(below.inputs[1], "ReduceMax")
    if exp is None or below is None or greatest is None or greatest.inputs[0] is not below.inputs[0]:
        return None
    return _Softmax(below.inputs[0], exp, relative=True) if _of_the_last(greatest) else None


def _of_the_last(node: ir.Node) -> bool:
    """Whether a Reduce is over the last axis, and keeps it."""
    axes = _patterns.array(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and axes.tolist() == [-1] and node.attributes.get_int("keepdims", 1) == 1


def _attention(mixing: ir.Node, chances: Eight, softmax: _Softmax, v: Eight) -> Attention:
    _check_chances(chances, softmax)
    logits, mask = softmax.logits, None
    add = maker(logits, "Add")
    if add is not None:
        first, second = add.inputs
        logits, mask = (first, second) if maker(first, "MatMul") else (second, first)
        _check_mask(mask, logits)
    scoring = maker(logits, "MatMul")
    if scoring is None:
        raise _No("its logits are no product, or something else than a mask is done to them")
    q, k = read(scoring.inputs[0], ir.DataType.UINT8), read(scoring.inputs[1], ir.DataType.INT8)
    if q is None or k is None:
        raise _No("its logits are no product of uint8 and int8")
    if any(_patterns.array(one.zero) is None or _patterns.array(one.zero).any() for one in (k, v)):  # type: ignore[union-attr]
        raise _No("k or v is not around 0")
    if any(one.scale.shape is None or len(one.scale.shape) for one in (q, k, v)):
        raise _No("q, k or v has several scales")
    (q, heads, each), (k, *of_k), (v, *of_v) = (
        _rows(one, perm) for one, perm in ((q, _HEADS), (k, _KEYS), (v, _HEADS))
    )
    if not [heads, each] == of_k == of_v:
        raise _No(f"q has {heads} heads of {each}, k {of_k[0]} of {of_k[1]}, v {of_v[0]} of {of_v[1]}")
    rows, keys, values = (shape(one.real) or () for one in (q, k, v))
    if not rows[0] == keys[0] == values[0]:
        raise _No(f"q is {rows}, k {keys}, v {values}: not surely of one batch")
    after = _answer(mixing, chances if softmax.relative else None, rows)
    step = None if softmax.relative else chances.scale
    return Attention(q, k, v, step, mask, heads, heads * each, *softmax.limits, after)


def _check_chances(chances: Eight, softmax: _Softmax) -> None:
    if writer(chances) is None:
        raise _No("its probabilities are read in other steps than they are written in")
    step, zero = _patterns.array(chances.scale), _patterns.array(chances.zero)
    if step is None or zero is None or step.size != 1 or zero.any():
        raise _No("its probabilities are not in steps from 0")
    if softmax.relative and abs(step.item() - _STEP) > 1e-7 * _STEP:
        raise _No("its relative probabilities are not in steps of 1/255")
    rank = None if softmax.logits is None or softmax.logits.shape is None else len(softmax.logits.shape)
    if softmax.last.attributes.get_int("axis", -1) not in (-1, None if rank is None else rank - 1):
        raise _No("its Softmax is not over the last axis")
    if only(softmax.last.outputs[0]) is None or only(chances.value) is None:
        raise _No("its probabilities are read elsewhere too")
    if len(list(chances.real.uses())) != 1 + softmax.relative:
        raise _No("its probabilities are read elsewhere too")


def _check_mask(mask: ir.Value | None, logits: ir.Value | None) -> None:
    if mask is None or mask.dtype != ir.DataType.FLOAT or mask.shape is None or not 2 <= len(mask.shape) <= 4:
        raise _No("what is added to its logits is not float32 of a known rank, 2 to 4")
    if logits is not None and logits.shape is not None:
        for own, other in zip(reversed(list(mask.shape)), reversed(list(logits.shape)), strict=False):
            if own not in (1, other) and (other == 1 or (isinstance(own, int) and isinstance(other, int))):
                raise _No(f"its mask is {mask.shape} and makes more of its logits, {logits.shape}")


def _rows(eight: Eight, perm: list[int]) -> tuple[Eight, int, int]:
    """What is made heads -> [B, T, W] instead, the number of heads, and the width of one."""
    node = maker(eight.value, "QuantizeLinear")
    turned = maker(node.inputs[0], "Transpose") if node is not None else None
    reshaped = maker(turned.inputs[0], "Reshape") if turned is not None else None
    if turned is None or reshaped is None or list(turned.attributes.get_ints("perm", [])) != perm:
        raise _No("q, k or v is no Transpose of a Reshape to heads")
    if writer(eight) is None:
        raise _No("q, k or v is read in other steps than it is written in")
    rows = reshaped.inputs[0]
    sizes, before = shape(reshaped.outputs[0]), shape(rows)
    if sizes is None or before is None or len(sizes) != 4 or len(before) != 3 or not isinstance(before[-1], int):
        raise _No("q, k or v has no known width, heads or rank")
    heads, each = sizes[2:]
    if not (isinstance(heads, int) and isinstance(each, int) and heads * each == before[-1]):
        raise _No("its heads do not make up its width")
    if not _as_before(sizes, before):
        raise _No(f"q, k or v is {before} and its heads are {sizes}, other batches or tokens")
    assert rows is not None  # it has a shape
    return Eight(rows, eight.value, eight.scale, eight.zero, ()), heads, each


def _as_before(sizes: tuple[int | str, ...] | None, before: tuple[int | str, ...]) -> bool:
    """Whether a Reshape left batch and tokens alone: one of them, for then the other is what is left."""
    return sizes is not None and any(one == other for one, other in zip(sizes[:2], before[:2], strict=True))


def _answer(mixing: ir.Node, chances: Eight | None, rows: tuple[int | str, ...]) -> Eight:
    """``chances``: those whose sum divides it; ``rows``: the shape it goes back to."""
    mixture = mixing.outputs[0]
    if chances is not None:
        div = only(mixture)
        total = maker(div.inputs[1], "ReduceSum") if div is not None and div.op_type == "Div" else None
        if total is None or total.inputs[0] is not chances.real or not _of_the_last(total):
            raise _No("its relative probabilities are not divided by their sum")
        mixture = div.outputs[0]  # type: ignore[union-attr]
    turned = only(mixture)
    if turned is None or turned.op_type != "Transpose" or list(turned.attributes.get_ints("perm", [])) != _HEADS:
        raise _No("its mixture is gated, or read otherwise than by one Transpose back")
    reshaped = only(turned.outputs[0])
    flat = None if reshaped is None or reshaped.op_type != "Reshape" else shape(reshaped.outputs[0])
    if reshaped is None or flat is None or len(flat) != 3 or flat[2] != rows[2] or not _as_before(flat, rows):
        raise _No(f"its mixture is not made rows again, {rows}")
    after = written(reshaped.outputs[0])
    if after is None:
        raise _No("its mixture is read in float")
    return after


def _put(mixing: ir.Node, found: Attention) -> None:
    last = found.after.nodes[-1]
    around = constant(last, "around_128", np.array(128, np.uint8))
    eights = {}
    for name, one, zero in (("q", found.q, found.q.zero), ("k", found.k, around), ("v", found.v, around)):
        out = ir.Value(name=f"{one.value.name}_rows", shape=one.real.shape, type=ir.TensorType(ir.DataType.UINT8))
        insert(last, "QuantizeLinear", [one.real, one.scale, zero], {}, [out], domain="")
        eights[name] = out
    step = found.step or constant(last, "relative", np.array(0, np.float32))
    mask = found.mask or constant(last, "no_mask", np.zeros(1, np.float32))
    y = like(found.after.value)
    put(found.after.value, y)
    inputs = [eights["q"], found.q.scale, found.q.zero, eights["k"], found.k.scale, eights["v"], found.v.scale]
    given = {name: getattr(found, name) for name in ("heads", "width", "gamma", "zeta")}
    starts = dict.fromkeys(("q_start", "k_start", "v_start"), 0)
    inputs += [step, mask, found.after.scale, found.after.zero]
    insert(last, QUANT_ATTENTION.name, inputs, given | starts, [y])
    sweep(last.graph, [last])  # type: ignore[arg-type]


def _whole(node: ir.Node) -> bool:
    """Reads what its inputs are parts of, where they are: no copies."""
    moved = False
    for name, place in (("q", 0), ("k", 3), ("v", 5)):
        value = node.inputs[place]
        split = maker(value, "Split")
        sizes = None if split is None else widths(split)
        rank = len(shape(value) or ())
        if split is None or sizes is None or rank != 3 or split.attributes.get_int("axis", 0) not in (-1, 2):
            continue
        starts = dict(zip(split.outputs, accumulate([0, *sizes]), strict=False))
        node.replace_input_with(place, split.inputs[0])
        key = f"{name}_start"
        before = node.attributes.get_int(key, 0)
        node.attributes[key] = ir.AttrInt64(key, before + starts[value])  # type: ignore[index]
        sweep(node.graph, [split])  # type: ignore[arg-type]
        moved = True
    return moved


REWRITES.register("quant_attention")(
    Rewrite(
        QUANT_ATTENTION,
        lambda params: BODIES[QUANT_ATTENTION.name](**QUANT_ATTENTION.attributes),
        rewrite,
        replaces=16,
        holds=(SOFTMAX,),
    )
)
