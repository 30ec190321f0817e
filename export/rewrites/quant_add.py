"""The sum of two 8-bit tensors whose result is quantized -> `ai.calmclip.QuantAdd`.

    DequantizeLinear(a) [-> Mul by a constant] \\
                                                Add [-> Mul by a constant] -> QuantizeLinear
    DequantizeLinear(b) [-> Mul by a constant] /

A constant is one number or one for each channel, and becomes a part of the scales: LayerScale of a residual branch, or
the factors of `quantizers.smooth`. Nothing else reads the sum; its operands may have other consumers.

Channels are the last axis, or, in pictures, the axis after the batch. Such pictures are transposed, with a Transpose
for each input and one for the result, as in `quant_pointwise`. So are pictures with one scale, if one of the operands
comes from such a Transpose. ONNX Runtime removes Transposes that undo each other.

The op is `calmclip.models.ops.spec.QUANT_ADD`. Source: Jacob et al. 2017 (arXiv 1712.05877), appendix A.2.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.quantized import is_normal, quantized_source
from calmclip.export.matching.values import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    constant_array,
    insert,
    insert_channels_last,
    is_transpose,
    new_constant,
    present,
    producer,
    shape,
    sole_consumer,
    transpose,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.flow import Array
from calmclip.models.ops.spec import QUANT_ADD

MAX_RATIO = 2.0**20  # of a_scale and b_scale to y_scale


@dataclass(frozen=True)
class Operand:
    """a, b or the result: ``value`` in 8 bits, the ``node`` that converts it from or to float, and ``gain``, the
    product of the constants between that node and the Add."""

    value: ir.Value
    node: ir.Node
    gain: Array


@dataclass(frozen=True)
class Steps:
    """``scale`` and ``zero`` of ``value``, in shapes that broadcast over it."""

    value: ir.Value
    scale: Array
    zero: Array


def match(node: ir.Node) -> Match | str | None:
    if node.domain or node.op_type != "Add":
        return None
    a, b = map(_operand, node.inputs)
    if a is None or b is None or a.node is b.node:  # a sum of one tensor is a function of it: `quant_lookup`
        return None
    y = _result(node.outputs[0])
    if y is None:
        return "its result is not quantized, or is read in float too"
    sizes = shape(node.outputs[0])
    if sizes is None or any(shape(operand.value) != sizes for operand in (a, b)):
        return "its operands differ in shape, or their shape is unknown"
    steps = present(_steps(operand, len(sizes)) for operand in (a, b, y))
    if len(steps) < 3:
        return "a scale or a zero point is no constant"
    if any(part.scale.ndim > len(sizes) or not is_normal(part.scale) for part in steps):
        return "its gains leave scales that are not positive and normal"
    if max((part.scale / steps[2].scale.astype(np.float64)).max() for part in steps) > MAX_RATIO:
        return f"the steps of its result are over {MAX_RATIO:.0f} times finer than those of an operand"
    axes = _axes(steps)
    if axes - {len(sizes) - 1} and (axes != {1} or len(sizes) != 4):
        return "its scales lie along an axis that is not the channels'"
    return Match((y.value,), lambda value: _insert(y.node, steps, value))


def _operand(value: ir.Value | None) -> Operand | None:
    gain: Array = np.ones((), np.float32)
    while (node := producer(value, "Mul")) is not None and (factors := _factors(node)) is not None:
        value, gain = factors[0], gain * factors[1]
    tensor = quantized_source(value, ir.DataType.UINT8, weight=True)
    return None if tensor is None else Operand(tensor.value, tensor.nodes[0], gain)


def _result(total: ir.Value) -> Operand | None:
    gain: Array = np.ones((), np.float32)
    node = sole_consumer(total)
    while node is not None and node.op_type == "Mul" and (factors := _factors(node)) is not None:
        node, gain = sole_consumer(node.outputs[0]), gain * factors[1]
    if node is None or node.op_type != "QuantizeLinear" or len(inputs := present(node.inputs)) != 3:
        return None
    return Operand(node.outputs[0], node, gain) if inputs[2].dtype == ir.DataType.UINT8 else None


def _factors(mul: ir.Node) -> tuple[ir.Value, Array] | None:
    """The factors of a Mul, if one of them is a constant: the other, and the constant."""
    first, second = present(mul.inputs)
    for value, factor in ((first, constant_array(second)), (second, constant_array(first))):
        if factor is not None:
            return value, factor
    return None


def _steps(operand: Operand, rank: int) -> Steps | None:
    """With the gain in the scale: a gain before the sum makes steps larger, one after it makes them smaller."""
    scale, zero = map(constant_array, present(operand.node.inputs)[1:])
    if scale is None or zero is None or scale.ndim > 1:
        return None
    axis = operand.node.attributes.get_int("axis", 1) % max(rank, 1)
    sizes = [-1 if place == axis else 1 for place in range(rank)]
    scale, zero = scale.reshape(sizes), zero.reshape(sizes)
    with np.errstate(all="ignore"):
        scale = scale / operand.gain if operand.node.op_type == "QuantizeLinear" else scale * operand.gain
    return Steps(operand.value, scale.astype(np.float32), zero)


def _axes(steps: Iterable[Steps]) -> set[int]:
    """The axes along which there are several scales."""
    return {axis for part in steps for axis, size in enumerate(part.scale.shape) if size != 1}


def _insert(last: ir.Node, steps: Sequence[Steps], y: ir.Value) -> None:
    axes, inputs = _axes(steps), []
    channels_first = axes == {1} and steps[0].scale.ndim == 4
    if not axes:
        channels_first = any(is_transpose(part.value.producer(), CHANNELS_FIRST) for part in steps)
    for part in steps:
        if part is not steps[2]:
            name = f"{part.value.name}_last"
            inputs.append(transpose(last, part.value, name, CHANNELS_LAST) if channels_first else part.value)
        sizes = () if part.scale.size == 1 else (part.scale.size,)
        zero = np.broadcast_to(part.zero, part.scale.shape).reshape(sizes).copy()
        for name, array in (("scale", part.scale.reshape(sizes)), ("zero", zero)):
            inputs.append(new_constant(last, f"{part.value.name}_{name}", array))
    (insert_channels_last if channels_first else insert)(last, QUANT_ADD, inputs, y)


REWRITES.register("quant_add")(Rewrite(QUANT_ADD, at_each_node(match), replaces=4))
