"""A depthwise convolution of 8 bits -> `ai.calmclip.QuantDepthwise`, with channels last.

    DequantizeLinear(x) -> Conv, a group for each channel -> QuantizeLinear

becomes Transpose, the operator, and Transpose back, of which ONNX Runtime takes out those that undo each other. x and
what is answered have one scale each: of the body of a node with one for each channel ONNX Runtime makes a convolution
of its own that it then refuses (1.32).

The op is `models.ops.spec.QUANT_DEPTHWISE`. Source: Howard et al. 2017 (arXiv 1704.04861), section 3.1; Jacob et al.
2017 (arXiv 1712.05877), section 2.4, fused layers.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _convolutions
from calmclip.export.rewrites._eight import FIRST, LAST, Eight, constant, insert, like, put, shape, sweep, turned
from calmclip.models.ops.spec import QUANT_DEPTHWISE


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    return _convolutions.rewrite(model, _unfit, _put)


def _unfit(conv: ir.Node, weight: Eight) -> str | None:
    if conv.attributes.get_int("group", 1) == 1:
        return None
    sizes = shape(weight.value)
    if sizes is None or len(sizes) != 4 or not all(isinstance(size, int) for size in sizes):
        return "its window has not two sides, or they are not known"
    if sizes[:2] != (conv.attributes.get_int("group", 1), 1):
        return "its groups are more than a channel each, or answer more"
    if set(conv.attributes.get_ints("dilations", [1, 1])) != {1}:
        return "its window has gaps"
    if conv.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", ""):
        return "what it is padded with hangs on what it reads"
    return ""


def _put(conv: ir.Node, x: Eight, weight: Eight, after: Eight) -> None:
    last, name = after.nodes[-1], after.value.name
    channels, _, height, width = (int(size) for size in shape(weight.value) or ())

    # of a constant: ONNX Runtime does it when it loads the graph
    flat, window = (
        ir.Value(name=f"{weight.value.name}_{what}", shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.INT8))
        for what, sizes in (("flat", [channels, height, width]), ("turned", [height, width, channels]))
    )
    sizes = constant(last, f"{weight.value.name}_sizes", np.array([channels, height, width]))
    insert(last, "Reshape", [weight.value, sizes], {}, [flat], domain="")
    insert(last, "Transpose", [flat], {"perm": (1, 2, 0)}, [window], domain="")
    places = turned(last, x.value, f"{name}_places", LAST)
    answer = ir.Value(
        name=f"{name}_last",
        shape=None if after.value.shape is None else ir.Shape([after.value.shape[axis] for axis in LAST]),
        type=ir.TensorType(ir.DataType.UINT8),
    )
    held = constant(last, f"{conv.outputs[0].name}_bias_float", _convolutions.bias(conv, channels))
    attributes = {
        "strides": tuple(conv.attributes.get_ints("strides", [1, 1])),
        "pads": tuple(conv.attributes.get_ints("pads", [0] * 4)),
        "group": channels,
    }
    inputs = [places, x.scale, x.zero, window, weight.scale, held, after.scale, after.zero]
    insert(last, QUANT_DEPTHWISE.name, inputs, attributes, [answer])
    y = like(after.value, ir.DataType.UINT8)
    put(after.value, y)
    insert(last, "Transpose", [answer], {"perm": FIRST}, [y], domain="")
    sweep(last.graph, [last])  # type: ignore[arg-type]


REWRITES.register("quant_depthwise")(
    Rewrite(
        QUANT_DEPTHWISE, lambda params: BODIES[QUANT_DEPTHWISE.name](**QUANT_DEPTHWISE.attributes), rewrite, replaces=5
    )
)
