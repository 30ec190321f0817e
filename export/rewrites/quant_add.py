"""The sum of two tensors of 8 bits that becomes 8 bits -> `ai.calmclip.QuantAdd`.

    DequantizeLinear(a) [-> Mul by a constant] \\
                                                Add [-> Mul by a constant] -> QuantizeLinear
    DequantizeLinear(b) [-> Mul by a constant] /

A constant is one number or one for each channel, and goes into the scales: LayerScale of a residual branch, or what
`smooth` divides by. The sum is read by nobody else; what lies before it may be.

Channels are the last axis, or of pictures the first behind the batch. Such pictures are turned, by a Transpose for each
input and one behind, as `quant_pointwise` turns them; so are those without numbers of channels, where one of the two
has been turned already. ONNX Runtime takes out Transposes that undo each other.

The op is `calmclip.models.ops.spec.QUANT_ADD`. Source: Jacob et al. 2017 (arXiv 1712.05877), appendix A.2.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _patterns
from calmclip.export.rewrites._eight import (
    FIRST,
    LAST,
    constant,
    insert,
    like,
    maker,
    normal,
    only,
    put,
    read,
    shape,
    sweep,
    turned,
    turns,
    whole,
)
from calmclip.models.flow import Array
from calmclip.models.ops.spec import QUANT_ADD

MOST = 2.0**20  # a_scale and b_scale are at most so many y_scale


@dataclass(frozen=True)
class End:
    """An end of the sum: ``value`` in bytes, the ``node`` that makes floats of it or it of floats, and ``gain``, the
    product of what multiplies in between."""

    value: ir.Value
    node: ir.Node
    gain: Array


@dataclass(frozen=True)
class Steps:
    """``scale`` and ``zero`` of ``value``, as they are broadcast over it."""

    value: ir.Value
    scale: Array
    zero: Array


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        if node.graph is None or node.domain or node.op_type != "Add":
            continue
        a, b = (_before(value) for value in node.inputs)
        if a is None or b is None or a.node is b.node:  # of one tensor it is a function of one variable: `quant_lookup`
            continue
        found = _found(node, a, b)
        if isinstance(found, str):
            missed[str(node.name)] = found
        else:
            _put(*found)
            fired += 1
    return Outcome(fired, missed)


def _before(value: ir.Value | None) -> End | None:
    gain: Array = np.ones((), np.float32)
    while (node := maker(value, "Mul")) is not None and (parts := _multiplied(node)) is not None:
        value, gain = parts[0], gain * parts[1]
    found = read(value, ir.DataType.UINT8, weight=True)
    return None if found is None else End(found.value, found.nodes[0], gain)


def _behind(total: ir.Value) -> End | None:
    gain: Array = np.ones((), np.float32)
    reader = only(total)
    while reader is not None and reader.op_type == "Mul" and (parts := _multiplied(reader)) is not None:
        reader, gain = only(reader.outputs[0]), gain * parts[1]
    if reader is None or reader.op_type != "QuantizeLinear" or len(given := whole(reader.inputs)) != 3:
        return None
    return End(reader.outputs[0], reader, gain) if given[2].dtype == ir.DataType.UINT8 else None


def _multiplied(node: ir.Node) -> tuple[ir.Value, Array] | None:
    """What a Mul multiplies, and the constant that it does so by."""
    one, other = whole(node.inputs)
    for value, held in ((one, _patterns.array(other)), (other, _patterns.array(one))):
        if held is not None:
            return value, held
    return None


def _found(node: ir.Node, a: End, b: End) -> tuple[ir.Node, list[Steps]] | str:
    """The QuantizeLinear and the steps of a, b and the answer; or why not."""
    y = _behind(node.outputs[0])
    if y is None:
        return "what it answers is not quantized, or not for it alone"
    sizes = shape(node.outputs[0])
    if sizes is None or any(shape(end.value) != sizes for end in (a, b)):
        return "its two sides have not the same shape, or that is not known"
    steps = [one for one in (_steps(end, len(sizes)) for end in (a, b, y)) if one is not None]
    if len(steps) < 3:
        return "a scale or a zero point is no constant"
    if any(one.scale.ndim > len(sizes) or not normal(one.scale) for one in steps):
        return "what multiplies it leaves scales that are not positive and normal"
    if max((one.scale / steps[2].scale.astype(np.float64)).max() for one in steps) > MOST:
        return f"it answers in steps that are over {MOST:.0f} times finer than those it reads"
    axes = _axes(steps)
    if axes - {len(sizes) - 1} and (axes != {1} or len(sizes) != 4):
        return "its scales lie along an axis that is not that of channels"
    return y.node, steps


def _steps(end: End, rank: int) -> Steps | None:
    """With its gain in the scale: what is multiplied before the sum has larger steps, behind it smaller ones."""
    scale, zero = (_patterns.array(value) for value in whole(end.node.inputs)[1:])
    if scale is None or zero is None or scale.ndim > 1:
        return None
    axis = end.node.attributes.get_int("axis", 1) % max(rank, 1)
    scale, zero = (one.reshape([-1 if at == axis else 1 for at in range(rank)]) for one in (scale, zero))
    with np.errstate(all="ignore"):
        scale = scale / end.gain if end.node.op_type == "QuantizeLinear" else scale * end.gain
    return Steps(end.value, scale.astype(np.float32), zero)


def _axes(steps: Iterable[Steps]) -> set[int]:
    return {axis for one in steps for axis, size in enumerate(one.scale.shape) if size != 1}


def _put(last: ir.Node, steps: Sequence[Steps]) -> None:
    turn = _turned(steps)

    def numbers(one: Steps) -> list[ir.Value]:
        sizes = () if one.scale.size == 1 else (one.scale.size,)
        zero = np.broadcast_to(one.zero, one.scale.shape).reshape(sizes).copy()
        named = (("scale", one.scale.reshape(sizes)), ("zero", zero))
        return [constant(last, f"{one.value.name}_{name}", array) for name, array in named]

    inputs: list[ir.Value] = []
    for one in steps[:2]:
        inputs.append(turned(last, one.value, f"{one.value.name}_last", LAST) if turn else one.value)
        inputs += numbers(one)
    inputs += numbers(steps[2])
    old = steps[2].value
    y = like(old, ir.DataType.UINT8)
    put(old, y)
    answer = like(inputs[0], ir.DataType.UINT8, f"{y.name}_last") if turn else y
    insert(last, QUANT_ADD.name, inputs, {}, [answer])
    if turn:
        insert(last, "Transpose", [answer], {"perm": FIRST}, [y], domain="")
    sweep(last.graph, [last])  # type: ignore[arg-type]


def _turned(steps: Sequence[Steps]) -> bool:
    """Whether its channels are behind the batch; where it has no scales of channels, whether one that it reads has been
    turned so that they are."""
    axes = _axes(steps)
    return (
        axes == {1} and steps[0].scale.ndim == 4 if axes else any(turns(one.value.producer(), FIRST) for one in steps)
    )


REWRITES.register("quant_add")(
    Rewrite(QUANT_ADD, lambda params: BODIES[QUANT_ADD.name](**QUANT_ADD.attributes), rewrite, replaces=4)
)
