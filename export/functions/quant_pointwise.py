"""`QuantPointwise` as a local function of standard ops: a Conv of 1 x 1, channels first, between Transpose nodes."""

import onnx

from calmclip.export.functions.quant_depthwise import convolution
from calmclip.models.ops.spec import QUANT_POINTWISE

_KERNEL = """
    sides = Constant <value_ints = [2, 3]> ()
    rows = Transpose <perm = [1, 0]> (weight)
    kernel = Unsqueeze (rows, sides)
"""


def quant_pointwise() -> onnx.FunctionProto:
    """The body of `spec.QUANT_POINTWISE`."""
    return convolution(QUANT_POINTWISE, _KERNEL)
