"""`Softmax`, plain or clipped, as a local function of standard ops.

Clip lifts -inf to the lowest float32, so that a row of nothing but masks is uniform; it keeps NaN and, with a highest
of +inf, keeps that too. The standard Softmax then gives rows with either as NaN. The If asks about attributes only:
ONNX Runtime folds it when it loads the graph, and a plain softmax is left with Clip and Softmax.
"""

import onnx
from onnx import parser

from calmclip.models.ops.spec import DOMAIN, SOFTMAX

OPSET = 18

_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{SOFTMAX.name} <
    axis: int = {SOFTMAX.attributes["axis"]},
    gamma: float = {SOFTMAX.attributes["gamma"]},
    zeta: float = {SOFTMAX.attributes["zeta"]}
> ({", ".join(SOFTMAX.inputs)}) => ({", ".join(SOFTMAX.outputs)})
{{
    lowest = Constant <value_float = -3.4028234663852886e38> ()
    highest = Constant <value_float = inf> ()
    seen = Clip (x, lowest, highest)
    p = Softmax <axis: int = @axis> (seen)

    low = Constant <value_float: float = @gamma> ()
    high = Constant <value_float: float = @zeta> ()
    nil = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    span = Sub (high, low)
    plain = Equal (span, one)
    y = If (plain) <
        then_branch = as_it_is () => (float[] kept) {{
            kept = Identity (p)
        }},
        else_branch = clipped () => (float[] cut) {{
            wide = Mul (p, span)
            moved = Add (wide, low)
            cut = Clip (moved, nil, one)
        }}
    >
}}
"""


def softmax() -> onnx.FunctionProto:
    """The body of `models.ops.spec.SOFTMAX`. It cannot raise: what the op refuses (gamma > 0, zeta < 1) it computes."""
    return parser.parse_function(_TEXT)
