"""`Softmax` as a local function: the standard op, stretched to [gamma, zeta] and cut to [0, 1]."""

import onnx
from onnx import parser

from models.ops.spec import DOMAIN, SOFTMAX

OPSET = 18

_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{SOFTMAX.name} <axis: int = -1, gamma: float = 0.0, zeta: float = 1.0> (x) => (y)
{{
    low = Constant <value_float: float = @gamma> ()
    high = Constant <value_float: float = @zeta> ()
    nil = Constant <value_float = 0.0> ()
    unit = Constant <value_float = 1.0> ()
    chances = Softmax <axis: int = @axis> (x)
    reach = Sub (high, low)
    wide = Mul (chances, reach)
    moved = Add (wide, low)
    y = Clip (moved, nil, unit)
}}
"""


def softmax() -> onnx.FunctionProto:
    return parser.parse_function(_TEXT)
