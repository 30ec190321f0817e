"""A convolution of 8 bits that looks at one place alone -> `ai.calmclip.QuantPointwise`, with channels last.

    DequantizeLinear(x) -> Conv 1 x 1 -> QuantizeLinear

becomes Transpose, the operator, and Transpose back. Transposes that undo each other ONNX Runtime takes out, and it
moves one past standard operators to where it meets another.

The op is `models.ops.spec.QUANT_POINTWISE`. Source: Lin et al. 2013 (arXiv 1312.4400), section 3.1: a 1 x 1 convolution
is a linear layer of every place.
"""

import numpy as np
from onnxscript import ir

from export.functions import BODIES
from export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _patterns
from export.rewrites._eight import FIRST, LAST, Eight, constant, insert, like, put, read, shape, sweep, turned, written
from export.rewrites.quant_depthwise import unwritten
from export.rewrites.quant_linear import MOST, bias_of
from models.ops.spec import QUANT_POINTWISE


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        if node.graph is None or node.domain or node.op_type != "Conv":
            continue
        x, weight = read(node.inputs[0], ir.DataType.UINT8, axis=1), read(node.inputs[1], ir.DataType.INT8, weight=True)
        if x is None or weight is None or not _of_one_place(weight):
            continue
        after = written(node.outputs[0], axis=1)
        why = _unfit(node, x, weight) or unwritten(after)
        if why or after is None:
            missed[str(node.name)] = why
        else:
            _put(node, x, weight, after)
            fired += 1
    return Outcome(fired, missed)


def _of_one_place(weight: Eight) -> bool:
    sizes = shape(weight.value)
    return sizes is not None and len(sizes) == 4 and sizes[2:] == (1, 1) and all(isinstance(d, int) for d in sizes)


def _unfit(conv: ir.Node, x: Eight, weight: Eight) -> str:
    if conv.attributes.get_int("group", 1) != 1:
        return "its channels are in groups"
    if set(conv.attributes.get_ints("strides", [1, 1])) != {1} or any(conv.attributes.get_ints("pads", [0] * 4)):
        return "it does not answer each place of what it reads, and no other"
    if len(x.scale.shape or ()):
        return "what it reads has a scale for each channel"
    zeros = _patterns.array(weight.zero)
    if zeros is None or zeros.any():
        return "its weights are not around 0, or that cannot be seen"
    if len(weight.scale.shape or ()) and weight.nodes[0].attributes.get_int("axis", 1) % 4:
        return "its weights have a scale for each input; the op takes one for each output"
    if (inputs := shape(weight.value)[1]) > MOST:  # type: ignore[index, operator]
        return f"it adds up {inputs} products; the op at most {MOST}"
    if len(conv.inputs) > 2 and conv.inputs[2] is not None and bias_of(conv.inputs[2]) is None:
        return "its bias is no constant"
    return ""


def _put(conv: ir.Node, x: Eight, weight: Eight, after: Eight) -> None:
    last, name = after.nodes[-1], after.value.name
    outputs, inputs = (int(size) for size in (shape(weight.value) or ())[:2])
    given = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = np.zeros(outputs, np.float32) if given is None else bias_of(given)
    assert bias is not None  # `_unfit` saw it

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
    held = constant(last, f"{conv.outputs[0].name}_bias_float", np.broadcast_to(bias.reshape(-1), outputs).copy())
    inputs_ = [places, x.scale, x.zero, columns, weight.scale, held, after.scale, after.zero]
    insert(last, QUANT_POINTWISE.name, inputs_, {}, [answer])
    y = like(after.value, ir.DataType.UINT8)
    put(after.value, y)
    insert(last, "Transpose", [answer], {"perm": FIRST}, [y], domain="")
    sweep(last.graph, [last])  # type: ignore[arg-type]


REWRITES.register("quant_pointwise")(
    Rewrite(QUANT_POINTWISE, lambda params: BODIES[QUANT_POINTWISE.name](), rewrite, replaces=6)
)
