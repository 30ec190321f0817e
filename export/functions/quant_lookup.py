"""`QuantLookup` as a local function: GatherElements of one row. Gather copies slices, and takes six times as long."""

import onnx
from onnx import TensorProto, parser

from calmclip.models.ops.spec import DOMAIN, QUANT_LOOKUP

OPSET = 20

_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{QUANT_LOOKUP.name} ({", ".join(QUANT_LOOKUP.inputs)}) => ({", ".join(QUANT_LOOKUP.outputs)})
{{
    one_row = Constant <value_ints = [-1]> ()
    shape = Shape (x)
    row = Reshape (x, one_row)
    places = Cast <to = {TensorProto.INT32}> (row)
    found = GatherElements (table, places)
    y = Reshape <allowzero = 1> (found, shape)
}}
"""


def quant_lookup() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_LOOKUP`."""
    return parser.parse_function(_TEXT)
