"""`QuantLayerNorm` as a local function of Add, LayerNormalization and QuantizeLinear."""

import onnx
from onnx import parser

from calmclip.models.ops.spec import DOMAIN, QUANT_LAYER_NORM

OPSET = 20

_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{QUANT_LAYER_NORM.name} <epsilon: float = {QUANT_LAYER_NORM.attributes["epsilon"]}>
({", ".join(QUANT_LAYER_NORM.inputs)}) => ({", ".join(QUANT_LAYER_NORM.outputs)})
{{
    sum = Add (x, residual)
    normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (sum, weight, bias)
    y = QuantizeLinear <axis = -1> (normed, y_scale, y_zero)
}}
"""


def quant_layer_norm() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_LAYER_NORM`."""
    return parser.parse_function(_TEXT)
