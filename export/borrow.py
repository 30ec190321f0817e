"""Graphs that store no weights of their own: a weight beside its transpose, and the INT8 weights of another graph.

`weights.save` stores equal bytes of several graphs once. A backward pass reads each matrix transposed, and an INT8
graph holds its weights in other bytes than a float graph. So both are computed from the stored ones, by nodes that read
constants alone. A runtime computes these once, when it opens the graph: the bundle stays small, the process does not.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from calmclip.export.graph import Draft, attribute, matrices, node_of, producers
from calmclip.models.flow import Array

_LEAST = 4096  # bytes; a smaller tensor is not shared


def untransposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without the matrices that are the transpose of one that an earlier node reads; all transposes of
    constant matrices are those of `_turned`."""
    draft = Draft(model)
    first: dict[bytes, str] = {}
    nodes: list[onnx.NodeProto] = []
    for name in [name for node in draft.nodes for name in dict.fromkeys(node.input)]:
        matrix = _matrix(draft, name)
        if matrix is None or name in first.values():
            continue
        if (other := first.get(_digest(matrix.T))) and other != name:
            nodes += _turned(other, name)
            del draft.constants[name]
        else:
            first.setdefault(_digest(matrix), name)
    for node in draft.nodes:
        turned = node.op_type == "Transpose" and _matrix(draft, node.input[0]) is not None
        nodes += _turned(node.input[0], node.output[0]) if turned else [node]
    draft.nodes = nodes
    return draft.finish()


def stored(model: onnx.ModelProto, floats: onnx.ModelProto, quantized: onnx.ModelProto) -> onnx.ModelProto:
    """``model``, a float graph, with the weights of ``quantized`` in place of those of ``floats``, the same graph in
    float. A weight w is int8 times steps; if outliers were moved into it (`quantizers.smooth`), its rows are divided by
    the factors of its input again. Weights that ``quantized`` keeps in float stay."""
    draft, lender = Draft(model), Draft(quantized)
    lent = _lent(Draft(floats), lender)
    prepared: list[onnx.NodeProto] = []
    nodes: list[onnx.NodeProto] = []
    for node in draft.nodes:
        matrix = _matrix(draft, node.input[0]) if node.op_type == "Gather" else None
        table = None if matrix is None else lent.get(_digest(matrix))
        if table and len(table.steps.shape) == 2:  # rows of a table of embeddings
            nodes += _gathered(draft, table, node)
        else:
            nodes.append(node)
    draft.nodes = nodes
    read = {name for node in nodes for name in node.input}
    for name in [name for name in draft.constants if name in read]:
        matrix = _matrix(draft, name)
        for turned in (False, True) if matrix is not None else ():
            assert matrix is not None
            weight = lent.get(_digest(matrix.T if turned else matrix))
            if weight and len(weight.steps.shape) == 1:
                prepared += _dequantized(draft, weight, name, turned)
                del draft.constants[name]
                break
    draft.nodes = [*prepared, *nodes]
    return draft.finish()


class _Stored:
    """A weight of the lender: int8 [R, C]; steps float32, [C] or [R] along ``axis`` for a product, [R, 1] for a table;
    gain [inputs]: factors of the input that the weight undoes."""

    def __init__(self, integers: Array, steps: Array, axis: int = 1, gain: Array | None = None) -> None:
        self.integers, self.steps, self.axis, self.gain = integers, steps, axis, gain


def _lent(floats: Draft, lender: Draft) -> dict[bytes, _Stored]:
    """Digest of a float weight -> its form in the lender."""
    made = producers(lender.nodes)
    by_name = {node.name: node for node in lender.nodes}
    lent: dict[bytes, _Stored] = {}
    for node in matrices(floats):
        other = by_name.get(node.name)
        back = made.get(other.input[1]) if other is not None else None
        if other is None or back is None or back.op_type != "DequantizeLinear":
            continue
        integers, steps = lender.array(back.input[0]), lender.array(back.input[1])
        gain = _gain(lender, made, other.input[0], node.input[0])
        lent[_digest(floats.array(node.input[1]))] = _Stored(integers, steps, attribute(back, "axis", 1), gain)
    for node in floats.nodes:
        table = f"{node.input[0]}_int8" if node.op_type == "Gather" else ""  # `packing.pack`
        if table in lender.constants:
            steps = lender.array(f"{node.input[0]}_scale")
            lent[_digest(floats.array(node.input[0]))] = _Stored(lender.array(table), steps)
    return lent


def _gain(lender: Draft, made: Mapping[str, onnx.NodeProto], name: str, source: str) -> Array | None:
    """The factors [inputs] of ``source`` on its way to the product that reads ``name``."""
    while name != source and (node := made.get(name)) is not None:
        if node.op_type == "Mul" and node.input[1] in lender.constants:
            return lender.array(node.input[1])
        name = node.input[0]
    return None


def _gathered(draft: Draft, table: _Stored, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    name, out = node.input[0], node.output[0]
    integers, steps = draft.add(f"{name}_int8", table.integers), draft.add(f"{name}_scale", table.steps)
    return [
        node_of("Gather", [integers, node.input[1]], f"{out}_int8"),
        node_of("Gather", [steps, node.input[1]], f"{out}_steps"),
        node_of("Cast", [f"{out}_int8"], f"{out}_whole", to=TensorProto.FLOAT),
        node_of("Mul", [f"{out}_whole", f"{out}_steps"], out),
    ]


def _dequantized(draft: Draft, weight: _Stored, name: str, turned: bool) -> list[onnx.NodeProto]:
    """The nodes that compute the float weight ``name``. Cast and Mul, not DequantizeLinear: the runtime computes them
    of constants once, and the other in every run."""
    column = weight.steps[:, None] if weight.axis == 0 else weight.steps
    integers = draft.add(f"{name}_int8", weight.integers)
    nodes = [node_of("Cast", [integers], f"{name}_whole", to=TensorProto.FLOAT)]
    factors = [("steps", column)]
    if weight.gain is not None:
        factors.append(("gain", weight.gain if weight.axis == 0 else weight.gain[:, None]))
    last = f"{name}_whole"
    for place, (kind, factor) in enumerate(factors):
        constant = draft.add(f"{name}_{kind}", factor.astype(np.float32))
        out = name if place == len(factors) - 1 and not turned else f"{name}_times_{kind}"
        nodes.append(node_of("Mul", [last, constant], out))
        last = out
    return [*nodes, *_turned(last, name)] if turned else nodes


def _turned(source: str, name: str) -> list[onnx.NodeProto]:
    """``name``: the transpose of ``source``, negated twice, which changes no bit. OpenVINO 2026.4 moves a transpose
    alone into the product, and then takes the packed weights of the matrix itself if it is square and another product
    reads it: a wrong answer. A negation makes it compute another constant."""
    return [
        node_of("Neg", [source], f"{name}_negated"),
        node_of("Transpose", [f"{name}_negated"], f"{name}_turned"),
        node_of("Neg", [f"{name}_turned"], name),
    ]


def _matrix(draft: Draft, name: str) -> Array | None:
    """The constant ``name`` if it is a float matrix that is worth sharing."""
    tensor = draft.constants.get(name)
    if tensor is None or len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT:
        return None
    return draft.array(name) if 4 * int(np.prod(tensor.dims)) >= _LEAST else None


def _digest(matrix: Array) -> bytes:
    return hashlib.sha256(repr(matrix.shape).encode() + np.ascontiguousarray(matrix).tobytes()).digest()
