"""The Softmax of quantized attention, normalized by the row maximum: probabilities that 8 bits can hold."""

from collections.abc import Collection
from copy import deepcopy

import numpy as np
import onnx

from calmclip.export.graph import Draft, node_of
from calmclip.export.qdq import BACK


def normalize_by_row_max(draft: Draft, mixers: Collection[str]) -> dict[str, tuple[float, float]]:
    """Replace softmax(x) v by (e v) / sum(e) with e = exp(x - max(x)), max and sum over a row; -> the range of each e,
    (0, 1). ``mixers``: names of the products softmax(x) v, of those that are
    `matching.attention.fused`.

    At a scale of 1/255 a row of many small probabilities rounds to 0, and other scales lose those close to 1. The
    largest e of every row is 1. The sum is of the rounded e, so the weights still sum to 1.
    """
    mixed = {node.input[0] for node in draft.nodes if node.name in mixers}
    ranges: dict[str, tuple[float, float]] = {}
    nodes: list[onnx.NodeProto] = []
    last = draft.add("last_axis", np.array([-1]))
    for node in draft.nodes:
        if node.output[0] in mixed:
            name, x = node.output[0], node.input[0]
            nodes += [
                node_of("ReduceMax", [x, last], f"{name}_greatest"),
                node_of("Sub", [x, f"{name}_greatest"], f"{name}_below"),
                node_of("Exp", [f"{name}_below"], f"{name}_relative"),
            ]
            ranges[f"{name}_relative"] = (0.0, 1.0)
        elif node.name in mixers:
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
