"""`QuantDepthwise` as a local function of standard ops: a Conv with channels first, between Transpose nodes."""

import onnx
from onnx import TensorProto

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import QUANT_DEPTHWISE, Op

_KERNEL = """
    axis1 = Constant <value_ints = [1]> ()
    kernel_first = Transpose <perm = [2, 0, 1]> (weight)
    kernel = Unsqueeze (kernel_first, axis1)
"""


def quant_depthwise() -> onnx.FunctionProto:
    """The body of `spec.QUANT_DEPTHWISE`."""
    settings = "<group: int = @group, pads: ints = @pads, strides: ints = @strides>"
    return convolution(QUANT_DEPTHWISE, _KERNEL, settings)


def convolution(op: Op, kernel: str, settings: str = "") -> onnx.FunctionProto:
    """The body of an op that is a convolution with channels last. ``kernel``: nodes from its weight to the Conv's.

    The bias is int32 in the steps of the sums: only then does ONNX Runtime make its own convolution in 8 bits of this.
    It folds the nodes that convert a constant bias when it loads the graph.
    """
    return local_function(
        op,
        f"""
    {kernel}
    w = DequantizeLinear <axis = 0> (kernel, weight_scale)

    steps = Mul (x_scale, weight_scale)
    counted = Div (bias, steps)
    whole = Round (counted)
    least = Constant <value_float = -1073741824.0> ()
    most = Constant <value_float = 1073741824.0> ()
    held = Clip (whole, least, most)
    count = Cast <to = {TensorProto.INT32}> (held)
    b = DequantizeLinear <axis = 0> (count, steps)

    first = Transpose <perm = [0, 3, 1, 2]> (x)
    a = DequantizeLinear <axis = 1> (first, x_scale, x_zero)
    sum = Conv {settings} (a, w, b)
    bytes = QuantizeLinear <axis = 1> (sum, y_scale, y_zero)
    y = Transpose <perm = [0, 2, 3, 1]> (bytes)
""",
    )
