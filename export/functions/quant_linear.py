"""`QuantLinear` and `QuantLinearToFloat` as local functions of standard ops.

MatMul stands between DequantizeLinear nodes, as ONNX Runtime's own fusion wants it. The Ifs ask about the attribute
only: ONNX Runtime folds them when it loads the graph, and one activation is left, or none.
"""

import onnx
from onnx import parser

from calmclip.models.ops.spec import ACTIVATIONS, DOMAIN, QUANT_LINEAR, QUANT_LINEAR_TO_FLOAT, Activation, Op

OPSET = 20  # the first with Gelu

_ACTIVATE: dict[Activation, str] = {  # of s
    "relu": "relu = Relu (s)",
    "gelu": "gelu = Gelu (s)",
    "gelu_tanh": 'gelu_tanh = Gelu <approximate = "tanh"> (s)',
    "quick_gelu": """
            slope = Constant <value_float = 1.702> ()
            steep = Mul (s, slope)
            gate = Sigmoid (steep)
            quick_gelu = Mul (s, gate)""",
}


def quant_linear() -> onnx.FunctionProto:
    """The body of `models.ops.spec.QUANT_LINEAR`. It cannot raise: what the op refuses (a scale of 0) it computes."""
    return _function(QUANT_LINEAR, "y = QuantizeLinear <axis = -1> (f, y_scale, y_zero)")


def quant_linear_to_float() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_LINEAR_TO_FLOAT`."""
    return _function(QUANT_LINEAR_TO_FLOAT, "y = Add (f, residual)")


def _function(op: Op, last: str) -> onnx.FunctionProto:
    text, found = "", "s"
    for name, activate in _ACTIVATE.items():
        text += f"""
    code_{name} = Constant <value_int = {ACTIVATIONS.index(name)}> ()
    is_{name} = Equal (asked, code_{name})
    {name}_or_not = If (is_{name}) <
        then_branch = with_{name} () => (float[] {name}) {{
            {activate}
        }},
        else_branch = without_{name} () => (float[] not_{name}) {{
            not_{name} = Identity ({found})
        }}
    >"""
        found = f"{name}_or_not"
    return parser.parse_function(f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{op.name} <activation: int = {op.attributes["activation"]}> ({", ".join(op.inputs)}) => ({", ".join(op.outputs)})
{{
    a = DequantizeLinear (x, x_scale, x_zero)
    b = DequantizeLinear <axis = 1> (weight, weight_scale)
    product = MatMul (a, b)
    s = Add (product, bias)
    asked = Constant <value_int: int = @activation> ()
{text}
    f = Identity ({found})
    {last}
}}
""")
