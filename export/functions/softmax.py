"""`Softmax`, plain or clipped, as a local function of standard ops.

Clip replaces -inf by the lowest float32, so a fully masked row is uniform. It keeps NaN and +inf, and the standard
Softmax makes such rows NaN. The condition of the If is an attribute: ONNX Runtime folds it when it loads the graph, and
only Clip and Softmax remain of a plain softmax.
"""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import SOFTMAX

OPSET = 18

_NODES = """
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
        then_branch = as_it_is () => (float[] kept) {
            kept = Identity (p)
        },
        else_branch = clipped () => (float[] cut) {
            wide = Mul (p, span)
            moved = Add (wide, low)
            cut = Clip (moved, nil, one)
        }
    >
"""


def softmax() -> onnx.FunctionProto:
    """The body of `models.ops.spec.SOFTMAX`. It also computes what the op refuses (gamma > 0, zeta < 1)."""
    return local_function(SOFTMAX, _NODES, OPSET)
