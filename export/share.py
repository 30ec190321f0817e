"""How much of a graph's arithmetic runs in INT8: the multiply-accumulates of every Conv, Gemm and MatMul, for one
nominal input. Products of two activations (attention) count; the bodies of functions, lookups and sums do not. Where
data decide how many rows a product has (experts that tokens are routed to), all they may be count.

MatMul [.., M, K] x [.., K, N]: (..) M N K. Gemm the same. Conv: numbers written x inputs of a group x kernel.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from calmclip.models.errors import ExportError

_WHOLE = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "DynamicQuantizeMatMul")
_KINDS = ("Conv", "Gemm", "MatMul", *_WHOLE)
_SHAPING = (
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Gather", "Identity", "Max", "Min", "Mod", "Mul",
    "Range", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze",
)  # fmt: skip
_SMALL = 1 << 10  # numbers; shapes are made of constants as small as this, and weights are larger
_EIGHT = (TensorProto.INT8, TensorProto.UINT8)


@dataclass(frozen=True)
class Product:
    """One node: ``macs`` multiply-accumulates for the nominal input, in INT8 or not."""

    name: str
    macs: int
    int8: bool


@dataclass(frozen=True)
class Share:
    macs: int
    int8: int

    @property
    def part(self) -> float:
        """Of the multiply-accumulates, from 0 to 1; 0 where there are none."""
        return self.int8 / self.macs if self.macs else 0.0


def share(products: Iterable[Product]) -> Share:
    found = list(products)
    return Share(sum(p.macs for p in found), sum(p.macs for p in found if p.int8))


def count(model: onnx.ModelProto, dims: Mapping[str, int]) -> list[Product]:
    """The products of ``model`` in topological order; ``dims``: dynamic dimension -> its nominal size, else 1.

    A product runs in INT8 where both factors come out of a DequantizeLinear of 8 bits, and where its op is an integer
    one. What reads its result is one QuantizeLinear or, but for convolutions, none: else the runtime computes in float.
    Raises `ExportError` naming a product whose shape cannot be inferred.
    """
    shapes, small = _shapes(model, dims), {i.name: i.data_type for i in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    for value in model.graph.output:
        readers.setdefault(value.name, []).append("output")

    def eight(name: str) -> bool:
        node = made.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return False
        source = made.get(node.input[0])
        kind = small.get(node.input[0])
        if source is not None and source.op_type == "QuantizeLinear":
            kind = small.get(source.input[2], TensorProto.UINT8) if len(source.input) > 2 else TensorProto.UINT8
        return kind in _EIGHT

    found = []
    for node in model.graph.node:
        if node.op_type not in _KINDS:
            continue
        after = readers.get(node.output[0], [])
        fused = after == ["QuantizeLinear"] or (node.op_type != "Conv" and "QuantizeLinear" not in after)
        whole = node.op_type in _WHOLE or (fused and eight(node.input[0]) and eight(node.input[1]))
        found.append(Product(node.name or node.output[0], _macs(node, shapes), whole))
    return found


def _macs(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> int:
    second = 3 if node.op_type.startswith("QLinear") else 1
    try:
        left, right, out = (shapes[name] for name in (node.input[0], node.input[second], node.output[0]))
    except KeyError as error:
        raise ExportError(
            f"the shape of {error} cannot be inferred, so the multiply-accumulates of the node {node.name!r} cannot be "
            "counted; give the graph value_info, or nominal sizes of its dimensions"
        ) from None
    inner = left[-1]
    if "Conv" in node.op_type:
        inner = _size(right[1:])
    elif node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        inner = left[0]
    return _size(out) * inner


def _size(shape: Iterable[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _shapes(model: onnx.ModelProto, dims: Mapping[str, int]) -> dict[str, list[int]]:
    """Tensor -> shape. Inferred on a copy without weights, where large constants are inputs that only have a shape."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param or not dim.HasField("dim_value"):
                dim.dim_value = dims.get(dim.dim_param, 1)
    for constant in model.graph.initializer:
        if _size(constant.dims) <= _SMALL:
            graph.initializer.append(constant)
        else:
            graph.input.append(helper.make_tensor_value_info(constant.name, constant.data_type, list(constant.dims)))
    graph.output.extend(helper.make_empty_tensor_value_info(value.name) for value in model.graph.output)
    while True:
        shapes = _inferred(light)
        if not _fold(light, shapes):
            return shapes


def _inferred(light: onnx.ModelProto) -> dict[str, list[int]]:
    graph = shape_inference.infer_shapes(light, data_prop=True).graph
    shapes = {constant.name: list(constant.dims) for constant in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sides = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(side.HasField("dim_value") for side in sides):
            shapes[value.name] = [side.dim_value for side in sides]
    return shapes


def _fold(light: onnx.ModelProto, shapes: Mapping[str, list[int]]) -> bool:
    """Work out what inference does not follow, small tensors of shapes and constants; -> whether there were any."""
    known = {constant.name: numpy_helper.to_array(constant) for constant in light.graph.initializer}
    left = []
    for node in light.graph.node:
        value = None
        if node.op_type == "Shape" and node.input[0] in shapes:
            ends = {one.name: one.i for one in node.attribute}
            value = np.array(shapes[node.input[0]], np.int64)[ends.get("start") : ends.get("end")]
        elif node.op_type in _SHAPING and all(name in known or not name for name in node.input):
            body = helper.make_graph([node], "one", [], [helper.make_empty_tensor_value_info(node.output[0])])
            alone = helper.make_model(body, opset_imports=light.opset_import)
            value = ReferenceEvaluator(alone).run(None, {name: known[name] for name in node.input if name})[0]
        elif node.op_type == "NonZero" and node.input[0] in shapes:  # what only data tell: the most it may be
            shape = shapes[node.input[0]]
            most = [len(shape), _size(shape)]
            light.graph.input.append(helper.make_tensor_value_info(node.output[0], TensorProto.INT64, most))
            continue
        if value is None or value.size > _SMALL:
            left.append(node)
            continue
        known[node.output[0]] = value
        light.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    changed = len(left) < len(light.graph.node)
    del light.graph.node[:]
    light.graph.node.extend(left)
    return changed
