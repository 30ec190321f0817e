"""Rows in steps of their own, perhaps behind a root-mean-square norm -> `ai.calmclip.QuantRows`.

    [x -> x * rsqrt(mean of x^2 + eps) * weight ->] [Mul by a positive number for each column ->] the nodes of
    `quantizers.rows` between a tensor and its uint8 rows

A norm that other nodes read too stays. The numbers of `quantizers.smooth` go into the weight. The op is
`calmclip.models.ops.spec.QUANT_ROWS`. Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
"""

from collections.abc import Collection

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.rows import norm, rows_of
from calmclip.export.matching.values import columns, constant_array, insert, new_constant, producer
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.flow import Array
from calmclip.models.ops.spec import QUANT_ROWS


def match(node: ir.Node) -> Match | str | None:
    if node.domain or node.op_type != "Cast" or (rows := rows_of(node.outputs[0])) is None:
        return None
    if rows.real.dtype != ir.DataType.FLOAT:
        return "its numbers are no float32"
    real, gain = rows.real, None
    if _is_read_by(rows.nodes, real) and (divided := _gain(real)) is not None:
        real, gain = divided
    readers = rows.nodes if gain is None else (rows.real.producer(),)
    between = norm(real) if _is_read_by(readers, real) else None
    weight = None if between is None else constant_array(between.weight)
    if between is not None and gain is not None and weight is None:
        between = None

    def insert_op(y: ir.Value, scale: ir.Value) -> None:
        if between is None:
            factor = np.ones(1, np.float32) if gain is None else gain
            inputs = [real, new_constant(node, "no_weight" if gain is None else f"{y.name}_gain", factor)]
            insert(node, QUANT_ROWS, inputs, y, scale, normalize=0, epsilon=0.0)
            return
        weights = between.weight
        if gain is not None and weight is not None:
            weights = new_constant(node, f"{y.name}_weight", (weight * gain).astype(np.float32))
        insert(node, QUANT_ROWS, [between.x, weights], y, scale, normalize=1, epsilon=between.epsilon)

    return Match((rows.value, rows.scale), insert_op)


def _is_read_by(nodes: Collection[ir.Node | None], value: ir.Value) -> bool:
    """Whether nothing else reads ``value``."""
    return not value.is_graph_output() and all(use.node in nodes for use in value.uses())


def _gain(value: ir.Value) -> tuple[ir.Value, Array] | None:
    """If ``value`` is x times a positive number for each column (`quantizers.smooth`): x and these numbers."""
    node = producer(value, "Mul")
    for place in (0, 1) if node is not None else ():
        assert node is not None
        x, gain = node.inputs[place], constant_array(node.inputs[1 - place])
        if x is not None and gain is not None and gain.shape == (columns(x),) and (gain > 0).all():
            return None if norm(value) is not None else (x, gain)
    return None


REWRITES.register("quant_rows")(Rewrite(QUANT_ROWS, at_each_node(match), replaces=8))
