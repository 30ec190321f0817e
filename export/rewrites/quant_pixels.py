"""Pixels in 8 bits that an operator reads with channels last -> `ai.calmclip.QuantPatches` of 1 x 1.

    QuantizeLinear(pixels) -> Transpose to channels last

becomes the operator, which writes bytes with channels last, Reshape to a picture, and a Transpose back, which ONNX
Runtime removes together with the one that follows. Its own Transpose of three channels takes as long as a convolution.

The op is `models.ops.spec.QUANT_PATCHES`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.1.
"""

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.values import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    insert,
    is_transpose,
    new_constant,
    new_value,
    present,
    shape,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.ops.spec import QUANT_PATCHES


def match(node: ir.Node) -> Match | str | None:
    inputs = present(node.inputs)
    if node.domain or node.op_type != "QuantizeLinear" or len(inputs) != 3 or not inputs[0].is_graph_input():
        return None
    pixels, scale, zero = inputs
    sizes = shape(pixels) or ()
    if len(sizes) != 4 or not any(is_transpose(use.node, CHANNELS_LAST) for use in node.outputs[0].uses()):
        return None
    batch, channels, high, wide = sizes
    if not isinstance(high, int) or not isinstance(wide, int):
        return "the size of its pictures is unknown"
    if scale.shape is None or scale.shape.rank() or zero.dtype != ir.DataType.UINT8:
        return "its pixels are no uint8, or have a scale for each channel"

    def insert_op(y: ir.Value) -> None:
        flat = new_value(f"{y.name}_flat", ir.DataType.UINT8, [batch, high * wide, channels])
        insert(node, QUANT_PATCHES, [pixels, scale, zero], flat, **(QUANT_PATCHES.attributes | {"patch": (1, 1)}))
        to = new_constant(node, f"{y.name}_sizes", np.array([0, high, wide, channels]))
        places = new_value(f"{y.name}_places", ir.DataType.UINT8, [batch, high, wide, channels])
        insert(node, "Reshape", [flat, to], places)
        insert(node, "Transpose", [places], y, perm=CHANNELS_FIRST)

    return Match((node.outputs[0],), insert_op)


REWRITES.register("quant_pixels")(Rewrite(QUANT_PATCHES, at_each_node(match), replaces=2))
