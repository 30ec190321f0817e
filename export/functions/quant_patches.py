"""`QuantPatches` as a local function of QuantizeLinear, Reshape and Transpose."""

import onnx
from onnx import parser

from models.ops.spec import DOMAIN, QUANT_PATCHES

OPSET = 20

_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{QUANT_PATCHES.name} <patch: ints = {list(QUANT_PATCHES.attributes["patch"])}>
({", ".join(QUANT_PATCHES.inputs)}) => ({", ".join(QUANT_PATCHES.outputs)})
{{
    sides = Constant <value_ints: ints = @patch> ()
    high, wide = Split <axis = 0, num_outputs = 2> (sides)
    shape = Shape (x)
    batch, channels, height, width = Split <axis = 0, num_outputs = 4> (shape)
    down = Div (height, high)
    across = Div (width, wide)
    patches = Mul (down, across)
    pixels = Mul (high, wide)
    numbers = Mul (channels, pixels)
    cut = Concat <axis = 0> (batch, channels, down, high, across, wide)
    rows = Concat <axis = 0> (batch, patches, numbers)

    bytes = QuantizeLinear (x, y_scale, y_zero)
    apart = Reshape <allowzero = 1> (bytes, cut)
    sorted = Transpose <perm = [0, 2, 4, 1, 3, 5]> (apart)
    y = Reshape <allowzero = 1> (sorted, rows)
}}
"""


def quant_patches() -> onnx.FunctionProto:
    """The body of `models.ops.spec.QUANT_PATCHES`."""
    return parser.parse_function(_TEXT)
