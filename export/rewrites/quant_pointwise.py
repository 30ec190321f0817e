"""A convolution in 8 bits with a window of 1 x 1 -> `ai.calmclip.QuantPointwise`, with channels last.

    DequantizeLinear(x) -> Conv 1 x 1 -> QuantizeLinear

becomes Transpose, the operator, and Transpose back. ONNX Runtime removes Transposes that undo each other, and it moves
a Transpose past standard operators until it meets another.

The op is `models.ops.spec.QUANT_POINTWISE`. Source: Lin et al. 2013 (arXiv 1312.4400), section 3.1: a 1 x 1 convolution
is a linear layer at every place.
"""

from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.convolutions import channels_last, convolution
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.export.rewrites.quant_linear import MAX_INPUTS
from calmclip.models.ops.spec import QUANT_POINTWISE


def match(node: ir.Node) -> Match | str | None:
    conv = convolution(node, axis=1)
    if conv is None or len(conv.sizes) != 4 or conv.sizes[2:] != (1, 1):
        return None
    outputs, inputs = conv.sizes[:2]
    if conv.group != 1:
        return "its channels are in groups"
    if set(conv.strides) != {1} or any(conv.pads):
        return "it has strides or pads, so its places are not those of its input"
    if inputs > MAX_INPUTS:
        return f"it sums {inputs} products; the op takes at most {MAX_INPUTS}"
    sizes_name = f"{conv.weight.value.name}_flat_sizes"
    return channels_last(conv, QUANT_POINTWISE, (outputs, inputs), (1, 0), sizes_name, {})


REWRITES.register("quant_pointwise")(Rewrite(QUANT_POINTWISE, at_each_node(match), replaces=6))
