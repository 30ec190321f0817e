"""Weights that are stored in int8 and computed in float, with one scale per row or column."""

import numpy as np
import onnx
from onnx import TensorProto

from calmclip.export.graph import Draft, node_of, probabilities

_TABLE = 1 << 20  # numbers; a smaller table is not worth three more nodes
_PART = 4096  # rows


def pack(draft: Draft) -> None:
    """Store in int8: large embedding tables (Gather), of which a run reads few rows, and matrices whose rows are mixed
    by probabilities (MatMul after Softmax). ONNX Runtime casts such a matrix once, when it loads the graph."""
    mixers = probabilities(draft.nodes)
    nodes: list[onnx.NodeProto] = []
    for node in draft.nodes:
        out = node.output[0]
        if node.op_type == "Gather" and node.input[0] in draft.constants and _large(draft.constants[node.input[0]]):
            table, scale = _pack(draft, node.input[0], axis=1)
            nodes += [
                node_of("Gather", [table, node.input[1]], f"{out}_int8"),
                # not {out}_scale: `dynamic` uses that name where a product reads the rows
                node_of("Gather", [scale, node.input[1]], f"{out}_steps"),
                node_of("Cast", [f"{out}_int8"], f"{out}_whole", to=TensorProto.FLOAT),
                node_of("Mul", [f"{out}_whole", f"{out}_steps"], out),
            ]
        elif node.op_type == "MatMul" and node.input[0] in mixers and node.input[1] in draft.constants:
            table, scale = _pack(draft, node.input[1], axis=0)
            nodes += [
                node_of("Cast", [table], f"{table}_whole", to=TensorProto.FLOAT),
                node_of("MatMul", [node.input[0], f"{table}_whole"], f"{out}_whole"),
                node_of("Mul", [f"{out}_whole", scale], out),
            ]
        else:
            nodes.append(node)
    draft.nodes = nodes


def _large(tensor: TensorProto) -> bool:
    return tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and int(np.prod(tensor.dims)) >= _TABLE


def _pack(draft: Draft, name: str, axis: int) -> tuple[str, str]:
    """Add the constant in int8 and its scales, one for all numbers along ``axis``; -> both names. It works by parts,
    because a copy of a language model's table in float takes as much memory as a third of the model."""
    values = draft.array(name)
    most = np.maximum(values.max(axis=axis, keepdims=True), -values.min(axis=axis, keepdims=True))
    scale = np.maximum(most / 127, 1e-12).astype(np.float32)
    steps, integers = np.broadcast_to(scale, values.shape), np.empty(values.shape, np.int8)
    for start in range(0, len(values), _PART):
        part = slice(start, start + _PART)
        integers[part] = np.rint(values[part] / steps[part])
    return draft.add(f"{name}_int8", integers), draft.add(f"{name}_scale", scale)
