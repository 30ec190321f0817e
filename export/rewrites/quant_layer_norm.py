"""LayerNormalization whose answer is read in 8 bits -> `ai.calmclip.QuantLayerNorm`, with the sum that it reads.

    [Add of two values of one shape ->] LayerNormalization over the last axis
    [-> Mul by a positive number for each column] -> QuantizeLinear

Who reads the sum, or the norm in float, reads the op's other outputs. Sums that end a product of 8 bits are that
product's (`quant_linear_to_float`), which goes first.

The op is `calmclip.models.ops.spec.QUANT_LAYER_NORM`. Source: Ba et al. 2016 (arXiv 1607.06450), section 3.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite
from calmclip.export.rewrites._eight import Eight, among, constant, insert, like, maker, put, shape, sweep, whole
from calmclip.models.ops.spec import QUANT_LAYER_NORM


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        if node.graph is None or node.domain or node.op_type != "LayerNormalization":
            continue
        eights = among(node.outputs[0])
        if not eights:
            continue
        if why := _unfit(node, eights[0]):
            missed[str(node.name)] = why
        else:
            _put(node, eights[0])
            fired += 1
    return Outcome(fired, missed)


def _unfit(node: ir.Node, after: Eight) -> str:
    sizes = shape(node.inputs[0])
    rank = None if sizes is None else len(sizes)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return "it has no bias"
    if rank is None or node.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return "it is not over the last axis alone, or its input's rank is unknown"
    if any(shape(value) != sizes[-1:] for value in node.inputs[1:3]):  # type: ignore[index]
        return "its weight or its bias has not a number for each column"
    if any(value.producer() is not None for value in (*whole(node.inputs[1:3]), after.scale, after.zero)):
        return "its weight, its bias or its steps are made by nodes, which may read what it answers"
    if len(node.outputs) > 1 and any(value.uses() for value in node.outputs[1:]):
        return "its mean or its deviation is read"
    return ""


def _put(node: ir.Node, after: Eight) -> None:
    before, total, (x, weight, bias) = node, None, whole(node.inputs[:3])
    add = maker(x, "Add")
    if add is not None and None is not shape(add.inputs[0]) == shape(add.inputs[1]) == shape(x):
        before, total, (x, residual) = add, x, whole(add.inputs)
    else:
        residual = constant(node, "no_residual", np.zeros(1, np.float32))
    normed, y = node.outputs[0], like(after.value)
    floats = {normed: after.nodes[0]} | ({total: node} if total is not None else {})  # and who of its readers goes
    outputs = [y, ir.Value(name=""), ir.Value(name="")]
    for place, (value, gone) in enumerate(floats.items(), 1):
        if value.is_graph_output() or any(use.node is not gone for use in value.uses()):
            outputs[place] = like(value)
    put(after.value, y)
    for value, new in zip(floats, outputs[1:], strict=False):
        if new.name:
            put(value, new)
    given = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
    insert(before, QUANT_LAYER_NORM.name, [x, residual, weight, bias, after.scale, after.zero], given, outputs)
    sweep(before.graph, [before, node, after.nodes[-1]])  # type: ignore[arg-type]


REWRITES.register("quant_layer_norm")(
    Rewrite(
        QUANT_LAYER_NORM,
        lambda params: BODIES[QUANT_LAYER_NORM.name](**QUANT_LAYER_NORM.attributes),
        rewrite,
        replaces=2,
    )
)
