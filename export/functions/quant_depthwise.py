"""`QuantDepthwise` as a local function of standard ops: a Conv with channels first, between Transpose nodes."""

import onnx
from onnx import parser

from models.ops.spec import DOMAIN, QUANT_DEPTHWISE

OPSET = 20

_ATTRIBUTES = ", ".join(
    f"{name}: ints = {list(value)}" if isinstance(value, tuple) else f"{name}: int = {value}"
    for name, value in QUANT_DEPTHWISE.attributes.items()
)
_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{QUANT_DEPTHWISE.name} <{_ATTRIBUTES}> ({", ".join(QUANT_DEPTHWISE.inputs)}) => ({", ".join(QUANT_DEPTHWISE.outputs)})
{{
    axis1 = Constant <value_ints = [1]> ()
    kernel_first = Transpose <perm = [2, 0, 1]> (weight)
    kernel = Unsqueeze (kernel_first, axis1)
    w = DequantizeLinear <axis = 0> (kernel, weight_scale)

    first = Transpose <perm = [0, 3, 1, 2]> (x)
    a = DequantizeLinear <axis = 1> (first, x_scale, x_zero)
    sum = Conv <group: int = @group, pads: ints = @pads, strides: ints = @strides> (a, w, bias)
    bytes = QuantizeLinear <axis = 1> (sum, y_scale, y_zero)
    y = Transpose <perm = [0, 2, 3, 1]> (bytes)
}}
"""


def quant_depthwise() -> onnx.FunctionProto:
    """The body of `models.ops.spec.QUANT_DEPTHWISE`. It cannot raise: a scale of 0 it computes."""
    return parser.parse_function(_TEXT)
