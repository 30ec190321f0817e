"""A product of rows in steps of their own, its bias, its activation or gate, and a residual sum ->
`ai.calmclip.QuantRowsLinear`.

    MatMulInteger(x, w) -> Cast -> Mul by x_scale -> Mul by w_scale [-> Add(bias)]
        [-> activation, or Split in halves a and b, f(a) * b] [-> Add(residual)]

x_scale has one number for each row of x. The op is `calmclip.models.ops.spec.QUANT_ROWS_LINEAR`. Source: Shazeer 2020
(arXiv 2002.05202), section 2, for the gate.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.values import (
    columns,
    constant_array,
    fixed_shape,
    insert,
    new_constant,
    other_input,
    present,
    shape,
    sole_consumer,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.export.rewrites.quant_linear import MAX_INPUTS, activation, row
from calmclip.models.ops.spec import ACTIVATIONS, QUANT_ROWS_LINEAR, Activation


def match(node: ir.Node) -> Match | str | None:
    if node.domain or node.op_type != "MatMulInteger" or len(inputs := present(node.inputs)) != 3:
        return None
    x, weight, zero = inputs
    cast = sole_consumer(node.outputs[0], "Cast")
    by_row = None if cast is None else sole_consumer(cast.outputs[0], "Mul")
    scaling = None if by_row is None else sole_consumer(by_row.outputs[0], "Mul")
    if cast is None or by_row is None or scaling is None:
        return None
    sizes, flat = fixed_shape(weight), shape(x)
    x_scale, weight_scale = other_input(by_row, cast.outputs[0]), other_input(scaling, by_row.outputs[0])
    if sizes is None or len(sizes) != 2 or weight.producer() is not None:
        return "its weight is no constant matrix"
    if {x.dtype, weight.dtype} != {ir.DataType.UINT8, ir.DataType.INT8} or x.dtype != ir.DataType.UINT8:
        return "it is no product of uint8 and int8"
    if sizes[0] > MAX_INPUTS:
        return f"it sums {sizes[0]} products; the op takes at most {MAX_INPUTS}"
    if flat is None or shape(x_scale) != (*flat[:-1], 1) or shape(weight_scale) not in ((sizes[1],), ()):
        return "its scales are not one for each row of x and one for each column of the weight"
    around = constant_array(zero)
    if around is None or around.size != 1:
        return "the zero point of x is not one constant"
    end, bias = scaling.outputs[0], np.zeros(sizes[1], np.float32)
    while (add := sole_consumer(end, "Add")) is not None and (summand := row(add, end, sizes[1])) is not None:
        end, bias = add.outputs[0], (bias + summand).astype(np.float32)
    gate = _gate(end)
    kind, end = gate or activation(end)
    residual = None
    if (add := sole_consumer(end, "Add")) is not None:
        other = other_input(add, end)
        if None is not shape(other) == shape(end):
            residual, end = other, add.outputs[0]
    last = end.producer()
    assert last is not None

    def insert_op(y: ir.Value) -> None:
        biases = new_constant(last, f"{y.name}_bias", bias)
        point = new_constant(last, "rows_around", around.reshape(()))
        summand = residual or new_constant(last, "no_residual", np.zeros(1, np.float32))
        insert(
            last, QUANT_ROWS_LINEAR, [x, x_scale, point, weight, weight_scale, biases, summand], y,
            activation=ACTIVATIONS.index(kind), gated=int(gate is not None),
        )  # fmt: skip

    return Match((end,), insert_op)


def _gate(z: ir.Value) -> tuple[Activation, ir.Value] | None:
    """The activation f and the value f(a) * b, where a and b are the halves of ``z``; None if nothing gates."""
    split = sole_consumer(z, "Split")
    if split is None or len(split.outputs) != 2 or z.shape is None:
        return None
    left, right = split.outputs
    if split.attributes.get_int("axis", 0) not in (-1, len(z.shape) - 1) or columns(left) != columns(right):
        return None
    kind, end = _silu(left) or activation(left)
    product = sole_consumer(end, "Mul")
    if product is None or other_input(product, end) is not right or sole_consumer(right) is not product:
        return None
    return kind, product.outputs[0]


def _silu(z: ir.Value) -> tuple[Activation, ir.Value] | None:
    """z sigmoid(z), if nothing else reads ``z``."""
    users = [use.node for use in z.uses()]
    sigmoid = next((node for node in users if not node.domain and node.op_type == "Sigmoid"), None)
    if sigmoid is None or len(users) != 2 or z.is_graph_output():
        return None
    product = sole_consumer(sigmoid.outputs[0], "Mul")
    return ("silu", product.outputs[0]) if product is not None and z in product.inputs else None


REWRITES.register("quant_rows_linear")(Rewrite(QUANT_ROWS_LINEAR, at_each_node(match), replaces=4))
