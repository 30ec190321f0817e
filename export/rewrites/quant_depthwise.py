"""A depthwise convolution in 8 bits -> `ai.calmclip.QuantDepthwise`, with channels last.

    DequantizeLinear(x) -> Conv, a group for each channel -> QuantizeLinear

becomes Transpose, the operator, and Transpose back. ONNX Runtime removes Transposes that undo each other. x and the
result have one scale each: from a body with a scale for each channel, ONNX Runtime (1.32) makes a convolution that it
then refuses.

The op is `models.ops.spec.QUANT_DEPTHWISE`. Source: Howard et al. 2017 (arXiv 1704.04861), section 3.1; Jacob et al.
2017 (arXiv 1712.05877), section 2.4, fused layers.
"""

from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.convolutions import channels_last, convolution
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.ops.spec import QUANT_DEPTHWISE


def match(node: ir.Node) -> Match | str | None:
    conv = convolution(node, axis=1)
    if conv is None or conv.group == 1:
        return None
    if len(conv.sizes) != 4:
        return "its window does not have two sides"
    channels, inputs, *window = conv.sizes
    if (channels, inputs) != (conv.group, 1):
        return "its groups have more than one channel, or more than one output"
    if conv.dilated:
        return "its window is dilated"
    if conv.auto_pad:
        return "its pads depend on the size of its input"
    flat, sizes_name = (channels, *window), f"{conv.weight.value.name}_sizes"
    settings = {"strides": conv.strides, "pads": conv.pads, "group": channels}
    return channels_last(conv, QUANT_DEPTHWISE, flat, (1, 2, 0), sizes_name, settings)


REWRITES.register("quant_depthwise")(Rewrite(QUANT_DEPTHWISE, at_each_node(match), replaces=5))
