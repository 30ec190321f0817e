"""A MaxPool between 8-bit pairs of the same steps -> `ai.calmclip.QuantMaxPool`, with channels last.

    DequantizeLinear -> MaxPool -> QuantizeLinear;   behind an operation in float:   MaxPool -> QuantizeLinear

becomes Transpose, the operator, and Transpose back, if a convolution with channels last precedes or follows it. ONNX
Runtime removes Transposes that undo each other, but moves none past a MaxPool, and its MaxPool of bytes with channels
first takes 35 times as long as that with channels last. Behind an operation in float, ONNX Runtime itself moves the
QuantizeLinear before the MaxPool, and so does the rule.

The op is `models.ops.spec.QUANT_MAX_POOL`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.1: quantized numbers
have the order of the real ones.
"""

from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.quantized import quantized_result, quantized_source
from calmclip.export.matching.values import (
    CHANNELS_LAST,
    insert,
    insert_channels_last,
    new_value,
    same_value,
    shape,
    transpose,
)
from calmclip.export.matching.windows import between_channels_last, unfit_window
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.ops.spec import QUANT_MAX_POOL


def match(node: ir.Node) -> Match | str | None:
    if node.domain or node.op_type != "MaxPool" or len(node.outputs) != 1:
        return None
    x, y = quantized_source(node.inputs[0], ir.DataType.UINT8), quantized_result(node.outputs[0])
    if y is None or len(y.nodes) > 1 or not between_channels_last(x.value if x else None, y.value):
        return None
    if x is not None and not (same_value(x.scale, y.scale) and same_value(x.zero, y.zero)):
        return "its result has other steps than its input"
    if why := unfit_window(node):
        return why
    window, strides = node.attributes.get_ints("kernel_shape"), node.attributes.get_ints("strides", [1, 1])
    pads = node.attributes.get_ints("pads", [0] * 4)
    last, real, scale, zero = y.nodes[-1], node.inputs[0], y.scale, y.zero

    def insert_op(value: ir.Value) -> None:
        source = x.value if x else new_value(f"{value.name}_source", ir.DataType.UINT8, shape(real))
        if x is None:
            insert(last, "QuantizeLinear", [real, scale, zero], source)
        places = transpose(last, source, f"{value.name}_places", CHANNELS_LAST)
        insert_channels_last(last, QUANT_MAX_POOL, [places], value, window=window, strides=strides, pads=pads)

    return Match((y.value,), insert_op)


REWRITES.register("quant_max_pool")(Rewrite(QUANT_MAX_POOL, at_each_node(match), replaces=3))
