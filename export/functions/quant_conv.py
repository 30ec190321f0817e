"""`QuantConv` as a local function of standard ops: a Conv with channels first, between Transpose nodes."""

import onnx

from calmclip.export.functions.quant_depthwise import convolution
from calmclip.models.ops.spec import QUANT_CONV

_KERNEL = "kernel = Transpose <perm = [3, 2, 0, 1]> (weight)"


def quant_conv() -> onnx.FunctionProto:
    """The body of `spec.QUANT_CONV`."""
    return convolution(QUANT_CONV, _KERNEL, "<pads: ints = @pads, strides: ints = @strides>")
