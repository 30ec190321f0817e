"""Convolutions in 8 bits: their settings, and their replacement by an operator with channels last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match
from calmclip.export.matching.quantized import (
    ASYMMETRIC,
    QuantizedTensor,
    dequantized_constant,
    quantized_result,
    quantized_source,
)
from calmclip.export.matching.values import (
    CHANNELS_LAST,
    fixed_shape,
    insert,
    insert_channels_last,
    new_constant,
    new_value,
    optional_input,
    producer,
    transpose,
)
from calmclip.models.flow import Array
from calmclip.models.ops.spec import Op


@dataclass(frozen=True)
class Convolution:
    """A Conv of a uint8 tensor by an int8 weight."""

    node: ir.Node
    x: QuantizedTensor
    weight: QuantizedTensor
    sizes: tuple[int, ...]  # of the weight, [outputs, channels, *window]

    @property
    def group(self) -> int:
        return self.node.attributes.get_int("group", 1)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.node.attributes.get_ints("strides", [1, 1]))

    @property
    def pads(self) -> tuple[int, ...]:
        return tuple(self.node.attributes.get_ints("pads", [0] * 4))

    @property
    def dilated(self) -> bool:
        return set(self.node.attributes.get_ints("dilations", [1, 1])) != {1}

    @property
    def auto_pad(self) -> bool:
        return self.node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "")

    @property
    def bias(self) -> Array | None:
        """In float32; None if there is none, or it is no constant."""
        value = optional_input(self.node, 2)
        return None if value is None else dequantized_constant(value)

    def unfit_parameters(self) -> str:
        """Why no op of ours takes the scales of its weight, or its bias; "" if one may."""
        if self.weight.per_channel and self.weight.axis % 4:
            return "its weight has a scale for each input; the op takes one for each output"
        return "its bias is no constant" if optional_input(self.node, 2) is not None and self.bias is None else ""


def convolution(node: ir.Node, axis: int = -1) -> Convolution | None:
    """``axis``: along which the input may have scales."""
    if node.domain or node.op_type != "Conv":
        return None
    x = quantized_source(node.inputs[0], ir.DataType.UINT8, axis=axis)
    weight = quantized_source(node.inputs[1], ir.DataType.INT8, weight=True)
    sizes = None if weight is None else fixed_shape(weight.value)
    return None if x is None or weight is None or sizes is None else Convolution(node, x, weight, sizes)


def reads_pixels(conv: Convolution) -> bool:
    """Whether its window is larger than a pixel, and its input a float input of the graph."""
    quantize = producer(conv.x.value, "QuantizeLinear")
    pixels = None if quantize is None else quantize.inputs[0]
    return pixels is not None and pixels.is_graph_input() and len(conv.sizes) == 4 and conv.sizes[2:] != (1, 1)


def channels_last(
    conv: Convolution, op: Op, flat: Sequence[int], perm: Sequence[int], sizes_name: str,
    attributes: Mapping[str, object],
) -> Match | str:  # fmt: skip
    """``conv`` as the op between two Transposes, or why it cannot be.

    The weight is reshaped to ``flat``, which a constant called ``sizes_name`` holds, and transposed by ``perm``. ONNX
    Runtime folds both when it loads the graph.
    """
    if conv.x.per_channel:
        return "its input has a scale for each channel"
    if not conv.weight.symmetric:
        return ASYMMETRIC
    if why := conv.unfit_parameters():
        return why
    result = quantized_result(conv.node.outputs[0], axis=1)
    if result is None:
        return "its result is not quantized, or is read in float too"
    if result.per_channel:
        return "its result has a scale for each channel"
    x, weight, last, scale, zero = conv.x, conv.weight, result.nodes[-1], result.scale, result.zero

    def insert_op(y: ir.Value) -> None:
        sizes = new_constant(last, sizes_name, np.array(flat))
        reshaped = new_value(f"{weight.value.name}_flat", ir.DataType.INT8, flat)
        window = new_value(f"{weight.value.name}_turned", ir.DataType.INT8, [flat[axis] for axis in perm])
        insert(last, "Reshape", [weight.value, sizes], reshaped)
        insert(last, "Transpose", [reshaped], window, perm=perm)
        pixels = transpose(last, x.value, f"{y.name}_places", CHANNELS_LAST)
        bias = np.zeros(conv.sizes[0], np.float32) + (0 if conv.bias is None else conv.bias.reshape(-1))
        summand = new_constant(last, f"{conv.node.outputs[0].name}_bias_float", bias.astype(np.float32))
        inputs = [pixels, x.scale, x.zero, window, weight.scale, summand, scale, zero]
        insert_channels_last(last, op, inputs, y, **attributes)

    return Match((result.value,), insert_op)
