"""LayerNormalization whose result is quantized -> `ai.calmclip.QuantLayerNorm`, with the sum that it normalizes.

    [Add of two values of one shape ->] LayerNormalization over the last axis
    [-> Mul by a positive number for each column] -> QuantizeLinear

Other consumers of the sum, or of the norm in float, read the op's other outputs. A sum that ends a product in 8 bits
is a part of that product: `quant_linear_to_float` goes first.

The op is `calmclip.models.ops.spec.QUANT_LAYER_NORM`. Source: Ba et al. 2016 (arXiv 1607.06450), section 3.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.quantized import QuantizedTensor, quantized_uses
from calmclip.export.matching.values import insert, new_constant, optional_input, present, producer, shape
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.ops.spec import QUANT_LAYER_NORM


def match(node: ir.Node) -> Match | str | None:
    if node.domain or node.op_type != "LayerNormalization" or not (uses := quantized_uses(node.outputs[0])):
        return None
    result = uses[0]
    if why := _unfit(node, result):
        return why
    before, (x, weight, bias), residual = node, present(node.inputs[:3]), None
    floats = [(node.outputs[0], result.nodes[0])]  # results in float, with the consumer that the op replaces
    add = producer(x, "Add")
    if add is not None and None is not shape(add.inputs[0]) == shape(add.inputs[1]) == shape(x):
        floats.append((x, node))
        before, (x, residual) = add, present(add.inputs)
    read = [value if _is_read(value, gone) else None for value, gone in floats] + [None]

    def insert_op(y: ir.Value, *new_floats: ir.Value) -> None:
        summand, remaining = residual or new_constant(node, "no_residual", np.zeros(1, np.float32)), iter(new_floats)
        outputs = [ir.Value(name="") if value is None else next(remaining) for value in read[:2]]
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        inputs = [x, summand, weight, bias, result.scale, result.zero]
        insert(before, QUANT_LAYER_NORM, inputs, y, *outputs, epsilon=epsilon)

    return Match((result.value, *present(read)), insert_op)


def _is_read(value: ir.Value, gone: ir.Node) -> bool:
    """Whether a node other than ``gone`` reads ``value``, or it is an output of the graph."""
    return value.is_graph_output() or any(use.node is not gone for use in value.uses())


def _unfit(node: ir.Node, result: QuantizedTensor) -> str:
    sizes, parameters = shape(node.inputs[0]), present(node.inputs[1:3])
    if optional_input(node, 2) is None:
        return "it has no bias"
    if sizes is None or node.attributes.get_int("axis", -1) not in (-1, len(sizes) - 1):
        return "it is not over the last axis alone, or the rank of its input is unknown"
    if any(shape(value) != sizes[-1:] for value in parameters):
        return "its weight or bias does not have a number for each column"
    if any(value.producer() is not None for value in (*parameters, result.scale, result.zero)):
        return "its weight, its bias or its steps are computed by nodes, which may read its result"
    if any(value.uses() for value in node.outputs[1:]):
        return "its mean or its deviation is read"
    return ""


REWRITES.register("quant_layer_norm")(Rewrite(QUANT_LAYER_NORM, at_each_node(match), replaces=2))
