"""A convolution of 8 bits that looks at one place alone -> `ai.calmclip.QuantPointwise`, with channels last.

    DequantizeLinear(x) -> Conv 1 x 1 -> QuantizeLinear

becomes Transpose, the operator, and Transpose back. Transposes that undo each other ONNX Runtime takes out, and it
moves one past standard operators to where it meets another.

The op is `models.ops.spec.QUANT_POINTWISE`. Source: Lin et al. 2013 (arXiv 1312.4400), section 3.1: a 1 x 1 convolution
is a linear layer of every place.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _convolutions
from calmclip.export.rewrites._eight import FIRST, LAST, Eight, constant, insert, like, put, shape, sweep, turned
from calmclip.export.rewrites.quant_linear import MOST
from calmclip.models.ops.spec import QUANT_POINTWISE


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    return _convolutions.rewrite(model, _unfit, _put)


def _unfit(conv: ir.Node, weight: Eight) -> str | None:
    sizes = shape(weight.value)
    if sizes is None or len(sizes) != 4 or sizes[2:] != (1, 1) or not all(isinstance(d, int) for d in sizes):
        return None
    if conv.attributes.get_int("group", 1) != 1:
        return "its channels are in groups"
    if set(conv.attributes.get_ints("strides", [1, 1])) != {1} or any(conv.attributes.get_ints("pads", [0] * 4)):
        return "it does not answer each place of what it reads, and no other"
    return f"it adds up {sizes[1]} products; the op at most {MOST}" if sizes[1] > MOST else ""  # type: ignore[operator]


def _put(conv: ir.Node, x: Eight, weight: Eight, after: Eight) -> None:
    last, name = after.nodes[-1], after.value.name
    outputs, inputs = (int(size) for size in (shape(weight.value) or ())[:2])

    def weights(stem: str, op: str, value: ir.Value, *sizes: int, **attributes: object) -> ir.Value:
        """Of a constant: ONNX Runtime does it when it loads the graph."""
        shaped = [constant(last, f"{stem}_sizes", np.array(sizes))] if op == "Reshape" else []
        made = ir.Value(name=stem, shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.INT8))
        insert(last, op, [value, *shaped], attributes, [made], domain="")
        return made

    flat = weights(f"{weight.value.name}_flat", "Reshape", weight.value, outputs, inputs)
    columns = weights(f"{weight.value.name}_turned", "Transpose", flat, inputs, outputs, perm=(1, 0))
    places = turned(last, x.value, f"{name}_places", LAST)
    answer = ir.Value(
        name=f"{name}_last",
        shape=ir.Shape([*(places.shape or ())[:3], outputs]) if places.shape is not None else None,
        type=ir.TensorType(ir.DataType.UINT8),
    )
    held = constant(last, f"{conv.outputs[0].name}_bias_float", _convolutions.bias(conv, outputs))
    inputs_ = [places, x.scale, x.zero, columns, weight.scale, held, after.scale, after.zero]
    insert(last, QUANT_POINTWISE.name, inputs_, {}, [answer])
    y = like(after.value, ir.DataType.UINT8)
    put(after.value, y)
    insert(last, "Transpose", [answer], {"perm": FIRST}, [y], domain="")
    sweep(last.graph, [last])  # type: ignore[arg-type]


REWRITES.register("quant_pointwise")(
    Rewrite(QUANT_POINTWISE, lambda params: BODIES[QUANT_POINTWISE.name](), rewrite, replaces=6)
)
