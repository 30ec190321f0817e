"""`QuantMaxPool` as a local function: a MaxPool with channels first, between Transpose nodes."""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import QUANT_MAX_POOL

_NODES = """
    first = Transpose <perm = [0, 3, 1, 2]> (x)
    best = MaxPool <kernel_shape: ints = @window, strides: ints = @strides, pads: ints = @pads> (first)
    y = Transpose <perm = [0, 2, 3, 1]> (best)
"""


def quant_max_pool() -> onnx.FunctionProto:
    """The body of `spec.QUANT_MAX_POOL`. ONNX Runtime refuses pads as large as the window."""
    return local_function(QUANT_MAX_POOL, _NODES)
