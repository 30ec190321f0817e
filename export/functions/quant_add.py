"""`QuantAdd` as a local function of standard ops: Add between DequantizeLinear and QuantizeLinear.

ONNX Runtime makes a QLinearAdd of these where all their numbers are one. Column by column it quantizes in eighteen
times the time that products take: so with numbers of columns bytes become floats as they are, and the function
multiplies. What the If asks about, and the factors, are constants that ONNX Runtime works out when it loads the graph.
"""

import onnx
from onnx import parser

from calmclip.models.ops.spec import DOMAIN, QUANT_ADD

OPSET = 20

_NUMBERS = [name for name in QUANT_ADD.inputs if "_" in name]
_SIZES = "\n".join(f"    size_{name} = Size ({name})" for name in _NUMBERS)
_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{QUANT_ADD.name} ({", ".join(QUANT_ADD.inputs)}) => ({", ".join(QUANT_ADD.outputs)})
{{
{_SIZES}
    most = Max ({", ".join(f"size_{name}" for name in _NUMBERS)})
    alone = Constant <value_int = 1> ()
    has_columns = Greater (most, alone)
    y = If (has_columns) <
        then_branch = by_columns () => (uint8[] y_columns) {{
            a_factor = Div (a_scale, y_scale)
            b_factor = Div (b_scale, y_scale)
            a_middle = Cast <to = 1> (a_zero)
            b_middle = Cast <to = 1> (b_zero)
            y_middle = Cast <to = 1> (y_zero)
            a_none = Mul (a_middle, a_factor)
            b_none = Mul (b_middle, b_factor)
            none = Add (a_none, b_none)
            start = Sub (y_middle, none)
            one = Constant <value_float = 1.0> ()
            nil = Constant <value = uint8 {{0}}> ()
            a_bytes = DequantizeLinear (a, one, nil)
            b_bytes = DequantizeLinear (b, one, nil)
            a_steps = Mul (a_bytes, a_factor)
            b_steps = Mul (b_bytes, b_factor)
            steps = Add (a_steps, b_steps)
            moved = Add (steps, start)
            y_columns = QuantizeLinear (moved, one, nil)
        }},
        else_branch = at_once () => (uint8[] y_once) {{
            a_real = DequantizeLinear (a, a_scale, a_zero)
            b_real = DequantizeLinear (b, b_scale, b_zero)
            sum = Add (a_real, b_real)
            y_once = QuantizeLinear (sum, y_scale, y_zero)
        }}
    >
}}
"""


def quant_add() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_ADD`. It cannot raise: of shapes that differ it broadcasts."""
    return parser.parse_function(_TEXT)
