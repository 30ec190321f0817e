"""`QuantLookup` as a local function: Gather, whose indices are no bytes."""

import onnx
from onnx import TensorProto, parser

from models.ops.spec import DOMAIN, QUANT_LOOKUP

OPSET = 20

_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{QUANT_LOOKUP.name} ({", ".join(QUANT_LOOKUP.inputs)}) => ({", ".join(QUANT_LOOKUP.outputs)})
{{
    places = Cast <to = {TensorProto.INT32}> (x)
    y = Gather (table, places)
}}
"""


def quant_lookup() -> onnx.FunctionProto:
    """The body of `models.ops.spec.QUANT_LOOKUP`."""
    return parser.parse_function(_TEXT)
