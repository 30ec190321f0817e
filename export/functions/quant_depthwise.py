"""`QuantDepthwise` as a local function of standard ops: a Conv with channels first, between Transpose nodes."""

import onnx
from onnx import TensorProto, parser

from calmclip.models.ops.spec import DOMAIN, QUANT_DEPTHWISE, Op

OPSET = 20

_ATTRIBUTES = ", ".join(
    f"{name}: ints = {list(value)}" if isinstance(value, tuple) else f"{name}: int = {value}"
    for name, value in QUANT_DEPTHWISE.attributes.items()
)


def quant_depthwise() -> onnx.FunctionProto:
    """The body of `spec.QUANT_DEPTHWISE`. It cannot raise: what the op refuses, a scale of 0, it computes."""
    return convolution(
        QUANT_DEPTHWISE,
        """
    axis1 = Constant <value_ints = [1]> ()
    kernel_first = Transpose <perm = [2, 0, 1]> (weight)
    kernel = Unsqueeze (kernel_first, axis1)""",
        f"<{_ATTRIBUTES}>",
        "<group: int = @group, pads: ints = @pads, strides: ints = @strides>",
    )


def convolution(op: Op, kernel: str, declared: str = "", settings: str = "") -> onnx.FunctionProto:
    """The body of an op that is a convolution with channels last; ``kernel``: nodes that make one of its weight.

    The bias is int32 in the steps of the sums, as ONNX Runtime wants it before it makes its own convolution in 8 bits
    of this; of constants it is worked out when a graph is loaded.
    """
    return parser.parse_function(f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{op.name} {declared} ({", ".join(op.inputs)}) => ({", ".join(op.outputs)})
{{
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
}}
""")
