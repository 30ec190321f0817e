"""A product of 8 bits whose answer is read in float -> `ai.calmclip.QuantLinearToFloat`, and the residual sum with it.

As `quant_linear`, which goes first; what is left answers float. An Add of another value of the same shape, a residual
branch, becomes the op's last input.

The op is `calmclip.models.ops.spec.QUANT_LINEAR_TO_FLOAT`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.4.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite
from calmclip.export.rewrites._eight import constant, insert, like, only, put, shape, sweep
from calmclip.export.rewrites.quant_linear import Product, product
from calmclip.models.ops.spec import QUANT_LINEAR_TO_FLOAT


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        found = product(node) if node.graph is not None else None
        if isinstance(found, str):
            missed[str(node.name)] = found
        elif found is not None:
            _put(found)
            fired += 1
    return Outcome(fired, missed)


def _put(found: Product) -> None:
    before, residual, end = found.last, None, found.end
    add = only(end)
    if add is not None and add.op_type == "Add":
        (other,) = [value for value in add.inputs if value is not end] or [None]
        sizes = shape(other)
        if sizes is not None and sizes == shape(end):
            before, residual, end = add, other, add.outputs[0]
    if residual is None:
        residual = constant(before, "no_residual", np.zeros(1, np.float32))
    inputs, y = [*found.inputs(before), residual], like(end)
    put(end, y)
    insert(before, QUANT_LINEAR_TO_FLOAT.name, inputs, found.attributes, [y])
    sweep(before.graph, [before])  # type: ignore[arg-type]


REWRITES.register("quant_linear_to_float")(
    Rewrite(
        QUANT_LINEAR_TO_FLOAT,
        lambda params: BODIES[QUANT_LINEAR_TO_FLOAT.name](**QUANT_LINEAR_TO_FLOAT.attributes),
        rewrite,
        replaces=4,
    )
)
