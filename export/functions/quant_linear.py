"""`QuantLinear`, `QuantLinearToFloat` and `QuantRowsLinear` as local functions of standard ops.

MatMul reads DequantizeLinear nodes, as ONNX Runtime's own fusion requires; rows in steps of their own go through
MatMulInteger. The conditions of the Ifs depend on an
attribute alone: ONNX Runtime folds them when it loads the graph, and at most one activation remains.
"""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import ACTIVATIONS, QUANT_LINEAR, QUANT_LINEAR_TO_FLOAT, QUANT_ROWS_LINEAR, Activation, Op

_ACTIVATE: dict[Activation, str] = {  # of s
    "relu": "relu = Relu (s)",
    "gelu": "gelu = Gelu (s)",
    "gelu_tanh": 'gelu_tanh = Gelu <approximate = "tanh"> (s)',
    "quick_gelu": """
            slope = Constant <value_float = 1.702> ()
            steep = Mul (s, slope)
            gate = Sigmoid (steep)
            quick_gelu = Mul (s, gate)""",
    "silu": """
            silu_gate = Sigmoid (s)
            silu = Mul (s, silu_gate)""",
}
_SUM = """
    a = DequantizeLinear (x, x_scale, x_zero)
    b = DequantizeLinear <axis = 1> (weight, weight_scale)
    product = MatMul (a, b)
    s = Add (product, bias)
"""
_GATED_SUM = """
    product = MatMulInteger (x, weight, x_zero)
    whole = Cast <to = 1> (product)
    by_row = Mul (whole, x_scale)
    scaled = Mul (by_row, weight_scale)
    everything = Add (scaled, bias)
    half_columns = Constant <value_int: int = @gated> ()
    yes = Constant <value_int = 1> ()
    is_gated = Equal (half_columns, yes)
    s, other = If (is_gated) <
        then_branch = halves () => (float[] left, float[] right) {
            left, right = Split <axis = -1, num_outputs = 2> (everything)
        },
        else_branch = all_columns () => (float[] all_left, float[] single) {
            all_left = Identity (everything)
            single = Constant <value_float = 1.0> ()
        }
    >
"""


def quant_linear() -> onnx.FunctionProto:
    """The body of `models.ops.spec.QUANT_LINEAR`."""
    return _function(QUANT_LINEAR, _SUM, "y = QuantizeLinear <axis = -1> (f, y_scale, y_zero)")


def quant_linear_to_float() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_LINEAR_TO_FLOAT`."""
    return _function(QUANT_LINEAR_TO_FLOAT, _SUM, "y = Add (f, residual)")


def quant_rows_linear() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_ROWS_LINEAR`."""
    return _function(QUANT_ROWS_LINEAR, _GATED_SUM, "gated_f = Mul (f, other) y = Add (gated_f, residual)")


def _function(op: Op, first: str, last: str) -> onnx.FunctionProto:
    activations, result = "", "s"
    for name, nodes in _ACTIVATE.items():
        activations += f"""
    code_{name} = Constant <value_int = {ACTIVATIONS.index(name)}> ()
    is_{name} = Equal (asked, code_{name})
    {name}_or_not = If (is_{name}) <
        then_branch = with_{name} () => (float[] {name}) {{
            {nodes}
        }},
        else_branch = without_{name} () => (float[] not_{name}) {{
            not_{name} = Identity ({result})
        }}
    >"""
        result = f"{name}_or_not"
    return local_function(
        op,
        f"""
    {first}
    asked = Constant <value_int: int = @activation> ()
{activations}
    f = Identity ({result})
    {last}
""",
    )
