"""The Softmax of quantized attention, normalized by the row maximum: probabilities that 8 bits can hold."""

from collections.abc import Collection
from copy import deepcopy

import numpy as np
import onnx

from calmclip.export.graph import Draft, attribute, node_of, readers
from calmclip.export.qdq import BACK


def normalize_by_row_max(draft: Draft, attention: Collection[str]) -> dict[str, tuple[float, float]]:
    """Replace softmax(x) v by (e v) / sum(e) with e = exp(x - max(x)), max and sum over a row; -> the range of each e,
    (0, 1).

    At a scale of 1/255 a row of many small probabilities rounds to 0, and other scales lose those close to 1. The
    largest e of every row is 1. The sum is of the rounded e, so the weights still sum to 1.

    This applies to a product of ``attention`` (node names) that is the sole reader of its Softmax and goes straight to
    a Transpose and a Reshape. A clipped softmax stays as it is, because its probabilities are compared with 0 and 1.
    """
    by_tensor = readers(draft.nodes)

    def leads_through(name: str, *kinds: str) -> bool:
        for kind in kinds:
            after = by_tensor.get(name, [])
            if [node.op_type for node in after] != [kind]:
                return False
            name = after[0].output[0]
        return True

    softmaxes = {node.output[0]: node for node in draft.nodes if node.op_type == "Softmax"}
    mixers = {
        node.input[0]: node
        for node in draft.nodes
        if node.name in attention
        and node.input[0] in softmaxes.keys() - draft.outputs
        and attribute(softmaxes[node.input[0]], "axis", -1) == -1
        and leads_through(node.input[0], "MatMul")
        and leads_through(node.output[0], "Transpose", "Reshape")
    }
    ranges: dict[str, tuple[float, float]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in draft.nodes:
        if node.output[0] in mixers:
            name, x = node.output[0], node.input[0]
            last = draft.add("last_axis", np.array([-1]))
            nodes += [
                node_of("ReduceMax", [x, last], f"{name}_greatest"),
                node_of("Sub", [x, f"{name}_greatest"], f"{name}_below"),
                node_of("Exp", [f"{name}_below"], f"{name}_relative"),
            ]
            ranges[f"{name}_relative"] = (0.0, 1.0)
        elif node.input and node.input[0] in mixers and mixers[node.input[0]] == node:
            mixing, name, out = deepcopy(node), f"{node.input[0]}_relative", node.output[0]
            mixing.input[0], mixing.output[0] = name, f"{out}_whole"
            nodes += [
                mixing,
                node_of("ReduceSum", [f"{name}{BACK}", last], f"{name}_sum"),
                node_of("Div", [f"{out}_whole", f"{name}_sum"], out),
            ]
        else:
            nodes.append(node)
    draft.nodes = nodes
    return ranges
