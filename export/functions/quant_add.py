"""`QuantAdd` as a local function of standard ops: Add between DequantizeLinear and QuantizeLinear."""

import onnx
from onnx import parser

from models.ops.spec import DOMAIN, QUANT_ADD

OPSET = 20

_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{QUANT_ADD.name} ({", ".join(QUANT_ADD.inputs)}) => ({", ".join(QUANT_ADD.outputs)})
{{
    one = DequantizeLinear <axis = -1> (a, a_scale, a_zero)
    other = DequantizeLinear <axis = -1> (b, b_scale, b_zero)
    sum = Add (one, other)
    y = QuantizeLinear <axis = -1> (sum, y_scale, y_zero)
}}
"""


def quant_add() -> onnx.FunctionProto:
    """The body of `models.ops.spec.QUANT_ADD`. It cannot raise: of shapes that differ it broadcasts."""
    return parser.parse_function(_TEXT)
