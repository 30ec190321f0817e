"""`QuantAdd` as a local function of standard ops: Add between DequantizeLinear and QuantizeLinear.

If every operand has one scale, ONNX Runtime makes a QLinearAdd of these nodes. With a scale for each column, its
QuantizeLinear takes eighteen times as long as products do, so the function converts bytes to float and multiplies them
by column factors. ONNX Runtime folds the condition and the factors when it loads the graph.
"""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import QUANT_ADD

_NUMBERS = [name for name in QUANT_ADD.inputs if "_" in name]
_SIZES = "\n".join(f"    size_{name} = Size ({name})" for name in _NUMBERS)
_NODES = f"""
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
"""


def quant_add() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_ADD`. Shapes that differ are broadcast."""
    return local_function(QUANT_ADD, _NODES)
