"""A product in 8 bits whose result is read in float -> `ai.calmclip.QuantLinearToFloat`, with the residual sum.

`quant_linear` goes first; this rule takes the products that it leaves. An Add of another value of the same shape (a
residual branch) becomes the op's last input.

The op is `calmclip.models.ops.spec.QUANT_LINEAR_TO_FLOAT`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.4.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.values import insert, new_constant, other_input, shape, sole_consumer
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.export.rewrites.quant_linear import Product, product
from calmclip.models.ops.spec import QUANT_LINEAR_TO_FLOAT


def match(node: ir.Node) -> Match | str | None:
    start = product(node)
    if not isinstance(start, Product):
        return start
    end, add = start.end, sole_consumer(start.end, "Add")
    residual = None if add is None else other_input(add, end)
    if add is not None and None is not shape(residual) == shape(end):
        end = add.outputs[0]
    else:
        residual = None
    last = end.producer()
    assert last is not None

    def insert_op(y: ir.Value) -> None:
        summand = residual or new_constant(last, "no_residual", np.zeros(1, np.float32))
        insert(last, QUANT_LINEAR_TO_FLOAT, [*start.inputs(last), summand], y, **start.attributes)

    return Match((end,), insert_op)


REWRITES.register("quant_linear_to_float")(Rewrite(QUANT_LINEAR_TO_FLOAT, at_each_node(match), replaces=4))
