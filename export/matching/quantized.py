"""Quantized tensors of a graph: which 8-bit tensor stands behind a float one, and in which steps (scale, zero point).

A quantized graph has standard ops between pairs of QuantizeLinear and DequantizeLinear; `export.quantizers` writes it.
"""

from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.matching.values import (
    columns,
    constant_array,
    new_constant,
    other_input,
    present,
    producer,
    same_value,
    sole_consumer,
)
from calmclip.models.flow import Array

ASYMMETRIC = "its weight has a zero point that is not 0, or no constant"


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in 8 bits: ``value`` = ``real`` / ``scale`` + ``zero``. ``nodes``: between ``real`` and ``value``."""

    real: ir.Value
    value: ir.Value
    scale: ir.Value
    zero: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def per_channel(self) -> bool:
        """Whether it has a scale for each place along an axis."""
        return bool(self.scale.shape)

    @property
    def axis(self) -> int:
        """The axis of the scales, if there are several."""
        return self.nodes[0].attributes.get_int("axis", 1)

    @property
    def symmetric(self) -> bool:
        """Whether its zero point is a constant 0."""
        zeros = constant_array(self.zero)
        return zeros is not None and not zeros.any()


def quantized_source(
    real: ir.Value | None, dtype: ir.DataType, weight: bool = False, axis: int = -1
) -> QuantizedTensor | None:
    """The tensor of ``dtype`` that ``real`` is dequantized from, with one scale or one for each place of ``axis``. The
    scales of a ``weight`` may lie along any axis."""
    node = producer(real, "DequantizeLinear")
    inputs = [] if node is None else present(node.inputs)
    if node is None or real is None or len(inputs) != 3:
        return None
    value, scale, zero = inputs
    fits = _is_float32(real, scale) and (weight or _lies_along(axis, node, value, scale))
    return QuantizedTensor(real, value, scale, zero, (node,)) if (zero.dtype or value.dtype) == dtype and fits else None


def quantizer_of(tensor: QuantizedTensor) -> ir.Node | None:
    """The QuantizeLinear that writes ``tensor`` in the same steps as it is read. Other steps would be a rescaling."""
    node = producer(tensor.value, "QuantizeLinear")
    steps = [] if node is None else present(node.inputs[1:])
    same = len(steps) == 2 and same_value(steps[0], tensor.scale) and same_value(steps[1], tensor.zero)
    return node if same else None


def quantized_result(real: ir.Value, axis: int = -1) -> QuantizedTensor | None:
    """The 8-bit tensor that ``real`` becomes, if nothing else reads ``real``. It has one scale, or one for each place
    of ``axis``. A Mul by a positive number, or one for each column, may precede the QuantizeLinear."""
    return _quantized_by(sole_consumer(real), real, axis)


def quantized_uses(real: ir.Value) -> list[QuantizedTensor]:
    """All 8-bit tensors that ``real`` becomes; other nodes may read it too."""
    return [tensor for use in real.uses() if (tensor := _quantized_by(use.node, real)) is not None]


def _quantized_by(node: ir.Node | None, real: ir.Value, axis: int = -1) -> QuantizedTensor | None:
    nodes: tuple[ir.Node, ...] = ()
    factor: Array | None = None
    if node is not None and node.op_type == "Mul":
        factor = constant_array(other_input(node, real))
        if factor is None or factor.ndim > 1 or factor.size not in (1, columns(real)) or not (factor > 0).all():
            return None
        nodes, node = (node,), sole_consumer(node.outputs[0])
    if node is None or node.domain or node.op_type != "QuantizeLinear" or len(inputs := present(node.inputs)) != 3:
        return None
    value, (source, scale, zero) = node.outputs[0], inputs
    if zero.dtype != ir.DataType.UINT8 or not _is_float32(real, scale):
        return None
    if not _lies_along(axis if factor is None else -1, node, source, scale):
        return None
    if factor is not None:
        steps, zeros = constant_array(scale), constant_array(zero)
        if steps is None or zeros is None:
            return None
        with np.errstate(over="ignore"):
            steps = (steps / factor).astype(np.float32)
        if not is_normal(steps):
            return None
        scale = new_constant(node, f"{value.name}_steps", steps)
        zero = new_constant(node, f"{value.name}_zeros", np.broadcast_to(zeros, steps.shape).copy())
    return QuantizedTensor(real, value, scale, zero, (*nodes, node))


def dequantized_constant(value: ir.Value | None) -> Array | None:
    """The float32 numbers of a constant, which may be quantized; None if ``value`` is no constant."""
    node = producer(value, "DequantizeLinear")
    if node is None:
        return constant_array(value)
    numbers, steps, zero = (*map(constant_array, node.inputs), np.zeros((), np.int32))[:3]
    if numbers is None or steps is None or zero is None:
        return None
    return ((numbers.astype(np.float64) - zero) * steps).astype(np.float32)


def is_normal(steps: Array) -> bool:
    """Whether scales are finite, positive and no denormals, as the ops require."""
    return bool((np.isfinite(steps) & (steps >= np.finfo(np.float32).tiny)).all())


def _is_float32(real: ir.Value, scale: ir.Value) -> bool:
    """Whether the ops take it: float32, with normal scales as far as they are constant."""
    steps = constant_array(scale)
    return {real.dtype, scale.dtype} <= {None, ir.DataType.FLOAT} and (steps is None or is_normal(steps))


def _lies_along(axis: int, node: ir.Node, value: ir.Value, scale: ir.Value) -> bool:
    """Whether there is one scale, or one for each place of ``axis``."""
    if not scale.shape:
        return scale.shape is not None
    stated = node.attributes.get_int("axis", 1)
    rank = len(value.shape or ())
    return len(scale.shape) == 1 and (stated == axis or (rank > 0 and (stated - axis) % rank == 0))
