"""`QuantRows` as a local function of standard ops."""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import QUANT_ROWS

_NODES = """
    last = Constant <value = int64[1] {-1}> ()
    asked = Constant <value_int: int = @normalize> ()
    epsilon = Constant <value_float: float = @epsilon> ()
    yes = Constant <value_int = 1> ()
    is_normalized = Equal (asked, yes)
    unit = If (is_normalized) <
        then_branch = rms () => (float[] normed) {
            squares = Mul (x, x)
            mean = ReduceMean <keepdims = 1> (squares, last)
            padded = Add (mean, epsilon)
            root = Sqrt (padded)
            normed = Div (x, root)
        },
        else_branch = plain () => (float[] same) {
            same = Identity (x)
        }
    >
    z = Mul (unit, weight)
    size = Abs (z)
    most = ReduceMax <keepdims = 1> (size, last)
    steps = Constant <value_float = 127.0> ()
    share = Div (most, steps)
    least = Constant <value_float = 1e-30> ()
    scale = Max (share, least)
    number = Div (z, scale)
    whole = Round (number)
    middle = Constant <value_float = 128.0> ()
    moved = Add (whole, middle)
    y = Cast <to = 2> (moved)
"""


def quant_rows() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_ROWS`."""
    return local_function(QUANT_ROWS, _NODES)
