"""`Softmax`, plain or clipped, as a local function of standard ops.

Clip replaces -inf by the lowest float32, so a fully masked row is uniform. It keeps NaN and +inf, and the standard
Softmax makes such rows NaN.

ONNX Runtime's Softmax adds a row in float32, and its error grows with the row: up to 1e-6 of a probability at 1024
columns, 9e-4 at a million. So the probabilities of a longer row are divided by their sum, which is added in float64.

ONNX Runtime folds a condition that it knows when it loads the graph: that of clipping always, that of the row's length
if the graph states all sizes of ``x``. A length that it does not know costs 2 microseconds a node.
"""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import SOFTMAX

OPSET = 18

SHORT = 1024  # columns of a row whose sum float32 holds to 1e-6; the docstring has the errors

_NODES = f"""
    lowest = Constant <value_float = -3.4028234663852886e38> ()
    highest = Constant <value_float = inf> ()
    seen = Clip (x, lowest, highest)
    axis = Constant <value_int: int = @axis> ()
    at = Constant <value_ints = [0]> ()
    axes = Unsqueeze (axis, at)
    sizes = Shape <start: int = @axis> (x)
    columns = Gather (sizes, at)
    short = Constant <value_ints = [{SHORT}]> ()
    long = Greater (columns, short)
    p = If (long) <
        then_branch = in_float64 () => (float[] divided) {{
            near = Softmax <axis: int = @axis> (seen)
            exact = Cast <to = 11> (near)
            total = ReduceSum <keepdims = 1> (exact, axes)
            divisor = Cast <to = 1> (total)
            divided = Div (near, divisor)
        }},
        else_branch = in_float32 () => (float[] direct) {{
            direct = Softmax <axis: int = @axis> (seen)
        }}
    >

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
"""


def softmax() -> onnx.FunctionProto:
    """The body of `models.ops.spec.SOFTMAX`. It also computes what the op refuses (gamma > 0, zeta < 1)."""
    return local_function(SOFTMAX, _NODES, OPSET)
