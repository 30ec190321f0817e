"""The convolution in 8 bits that reads the pixels -> `ai.calmclip.QuantPatches`, and a product of matrices.

    QuantizeLinear(pixels) -> DequantizeLinear -> Conv [-> activation] [-> QuantizeLinear]

becomes windows, DequantizeLinear, MatMul, the bias, the activation and QuantizeLinear, which `quant_linear` matches,
then Reshape to [B, H', W', N] and Transpose to [B, N, H', W']. ONNX Runtime runs convolutions in 8 bits with channels
last, and removes that Transpose together with its own. The sums and their rounding stay the same.

Windows may overlap, so they hold more bytes than the pixels. With few channels they are still few beside the result,
and with few channels ONNX Runtime's own convolution is slow.

The op is `models.ops.spec.QUANT_PATCHES`. Source: Chellapilla, Puri and Simard 2006, High Performance Convolutional
Neural Networks for Document Processing: an unrolled convolution is a product of matrices.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.convolutions import Convolution, convolution, reads_pixels
from calmclip.export.matching.quantized import ASYMMETRIC
from calmclip.export.matching.values import (
    CHANNELS_FIRST,
    constant_array,
    insert,
    new_constant,
    new_value_like,
    optional_input,
    present,
    shape,
    sole_consumer,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.export.rewrites.quant_lookup import POINTWISE
from calmclip.export.rewrites.quant_patches import insert_windows, unfit_windows
from calmclip.models.ops.spec import QUANT_PATCHES

_CHANNELS, _NUMBERS = 4, 256  # a window with more of both is not worth its bytes


def match(node: ir.Node) -> Match | str | None:
    conv = convolution(node)
    if conv is None or not reads_pixels(conv):
        return None
    if why := unfit_windows(conv):
        return why
    places = _places(conv)
    if isinstance(places, str):
        return places
    nodes = _activations(node)
    last = nodes[-1] if nodes else node
    quantize = sole_consumer(last.outputs[0], "QuantizeLinear")
    if quantize is not None and _has_one_step(quantize):
        nodes, last = [*nodes, quantize], quantize
    (high, wide), patch, outputs = places, conv.sizes[2:], conv.sizes[0]
    batch = (conv.x.real.shape or ("B",))[0]

    def insert_nodes(y: ir.Value) -> None:
        windows = {"patch": patch, "strides": conv.strides, "pads": conv.pads}
        old, value = node.outputs[0], insert_windows(conv, last, batch, high * wide, **windows)
        for activation in nodes:
            rows = new_value_like(activation.outputs[0], f"{activation.outputs[0].name}_rows")
            rows.shape = value.shape
            inputs = [value if source is old else source for source in activation.inputs]
            settings = {name: attribute.value for name, attribute in activation.attributes.items()}
            old, value = activation.outputs[0], insert(last, activation.op_type, inputs, rows, **settings)
        sizes = new_constant(last, f"{node.outputs[0].name}_places_shape", np.array([0, high, wide, outputs]))
        picture = new_value_like(y, f"{y.name}_places")
        picture.shape = ir.Shape([batch, high, wide, outputs])
        insert(last, "Reshape", [value, sizes], picture)
        insert(last, "Transpose", [picture], y, perm=CHANNELS_FIRST)

    return Match((last.outputs[0],), insert_nodes)


def _places(conv: Convolution) -> tuple[int, int] | str:
    """How many windows there are along the height and the width; or why ``conv`` stays."""
    picture, sizes = shape(conv.node.inputs[0]), conv.sizes
    if picture is None or not all(isinstance(side, int) for side in picture[1:]):
        return "the size of its pictures is unknown"
    numbers = int(np.prod(sizes[1:]))
    if sizes[1] > _CHANNELS and numbers > _NUMBERS:
        return f"its windows hold {numbers} numbers of {sizes[1]} channels; to write them costs more than it saves"
    if conv.group != 1:
        return "its channels are in groups"
    if conv.dilated:
        return "its window is dilated"
    if conv.auto_pad:
        return "its pads depend on the size of its input"
    if not conv.weight.symmetric:
        return ASYMMETRIC
    sides = [int(side) for side in picture[2:]]
    room = [side + conv.pads[axis] + conv.pads[axis + 2] - sizes[axis + 2] for axis, side in enumerate(sides)]
    if min(*conv.pads, *room) < 0:
        return "its pads are negative, or its pictures are smaller than a window"
    high, wide = (spare // stride + 1 for spare, stride in zip(room, conv.strides, strict=True))
    return high, wide


def _activations(conv: ir.Node) -> list[ir.Node]:
    """The nodes that follow it, each the sole consumer of the one before, and work on each number alone."""
    nodes, value = [], conv.outputs[0]
    while (node := sole_consumer(value, *POINTWISE)) is not None:
        others = [constant_array(other) for other in present(node.inputs) if other is not value]
        if any(other is None or other.size != 1 or other.ndim > 1 for other in others):
            break
        nodes.append(node)
        value = node.outputs[0]
    return nodes


def _has_one_step(quantize: ir.Node) -> bool:
    """Whether it writes uint8 with one scale."""
    scale, zero = quantize.inputs[1], optional_input(quantize, 2)
    one_scale = scale is not None and scale.shape is not None and len(scale.shape) == 0
    return one_scale and zero is not None and zero.dtype == ir.DataType.UINT8


REWRITES.register("quant_stem")(Rewrite(QUANT_PATCHES, at_each_node(match), replaces=4))
