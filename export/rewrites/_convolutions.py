"""What the rules of quantized convolutions share: which there are, and what none of them takes."""

from collections.abc import Callable

import numpy as np
from onnxscript import ir

from calmclip.export.rewrites import Outcome, _patterns
from calmclip.export.rewrites._eight import Eight, read, written
from calmclip.export.rewrites.quant_linear import bias_of
from calmclip.models.flow import Array

Unfit = Callable[[ir.Node, Eight], str | None]  # Conv, weight -> why it does not fit; None where it is another rule's
Put = Callable[[ir.Node, Eight, Eight, Eight], None]  # Conv, x, weight and what is answered


def rewrite(model: ir.Model, unfit: Unfit, put: Put) -> Outcome:
    """``put`` for every quantized convolution that ``unfit`` and the rest here say nothing against."""
    fired, missed = 0, {}
    for node in list(model.graph):
        if node.graph is None or node.domain or node.op_type != "Conv":
            continue
        x, weight = read(node.inputs[0], ir.DataType.UINT8, axis=1), read(node.inputs[1], ir.DataType.INT8, weight=True)
        if x is None or weight is None or (why := unfit(node, weight)) is None:
            continue
        after = written(node.outputs[0], axis=1)
        if (why := why or _unfit(node, x, weight, after)) or after is None:
            missed[str(node.name)] = why
        else:
            put(node, x, weight, after)
            fired += 1
    return Outcome(fired, missed)


def _unfit(conv: ir.Node, x: Eight, weight: Eight, after: Eight | None) -> str:
    if len(x.scale.shape or ()):
        return "what it reads has a scale for each channel"
    zeros = _patterns.array(weight.zero)
    if zeros is None or zeros.any():
        return "its weights are not around 0, or that cannot be seen"
    if len(weight.scale.shape or ()) and weight.nodes[0].attributes.get_int("axis", 1) % 4:
        return "its weights have a scale for each input; the op takes one for each output"
    if len(conv.inputs) > 2 and conv.inputs[2] is not None and bias_of(conv.inputs[2]) is None:
        return "its bias is no constant"
    if after is None:
        return "what it answers is not quantized, or not for it alone"
    return "what it answers has a scale for each channel" if len(after.scale.shape or ()) else ""


def bias(conv: ir.Node, outputs: int) -> Array:
    """float32 [outputs], 0 where it has none."""
    given = conv.inputs[2] if len(conv.inputs) > 2 else None
    held = np.zeros(outputs, np.float32) if given is None else bias_of(given)
    assert held is not None  # `_unfit` saw it
    return np.broadcast_to(held.reshape(-1), outputs).copy()
