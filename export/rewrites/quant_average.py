"""An AveragePool between 8-bit pairs -> `ai.calmclip.QuantDepthwise`, with channels last.

    DequantizeLinear -> AveragePool -> QuantizeLinear

is a depthwise convolution with weights of 1 and a scale of 1 over the size of the window. It becomes Transpose, the
operator, and Transpose back, if its input or a consumer has channels last. ONNX Runtime removes Transposes that undo
each other. Its own average of bytes takes five times as long.

The op is `models.ops.spec.QUANT_DEPTHWISE`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.2.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.quantized import quantized_result, quantized_source
from calmclip.export.matching.values import CHANNELS_LAST, insert_channels_last, new_constant, shape, transpose
from calmclip.export.matching.windows import between_channels_last, unfit_window
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.ops.spec import QUANT_DEPTHWISE


def match(node: ir.Node) -> Match | str | None:
    if node.domain or node.op_type != "AveragePool":
        return None
    x, y = quantized_source(node.inputs[0], ir.DataType.UINT8), quantized_result(node.outputs[0])
    if x is None or y is None or not between_channels_last(x.value, y.value):
        return None
    if why := unfit_window(node):
        return why
    if any(node.attributes.get_ints("pads", [])):
        return "its windows at the border hold fewer numbers"
    channels = (shape(x.value) or ("",) * 4)[1]
    if not isinstance(channels, int):
        return "the number of its channels is unknown"
    window, strides = node.attributes.get_ints("kernel_shape"), node.attributes.get_ints("strides", [1, 1])
    last = y.nodes[-1]

    def insert_op(value: ir.Value) -> None:
        ones = new_constant(last, f"{value.name}_ones", np.ones((*window, channels), np.int8))
        share = new_constant(last, f"{value.name}_share", np.array(1 / np.prod(window), np.float32))
        none = new_constant(last, f"{value.name}_no_bias", np.zeros(channels, np.float32))
        places = transpose(last, x.value, f"{value.name}_places", CHANNELS_LAST)
        inputs = [places, x.scale, x.zero, ones, share, none, y.scale, y.zero]
        settings = {"strides": strides, "pads": (0,) * 4, "group": channels}
        insert_channels_last(last, QUANT_DEPTHWISE, inputs, value, **settings)

    return Match((y.value,), insert_op)


REWRITES.register("quant_average")(Rewrite(QUANT_DEPTHWISE, at_each_node(match), replaces=3))
