"""INT8 coverage: the part of a graph's multiply-accumulates that runs in INT8, for one nominal input.

Every Conv, Gemm and MatMul counts, products of two activations (attention) included; bodies of functions, lookups and
sums do not. If the data decide how many rows a product has (experts that tokens are routed to), the largest possible
number counts.

MatMul [.., M, K] x [.., K, N]: (..) M N K. Gemm the same. Conv: number of outputs x input channels of a group x kernel.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from calmclip.export.graph import attribute, producers, readers
from calmclip.export.light import lighten
from calmclip.models.errors import ExportError

_INTEGER = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "DynamicQuantizeMatMul")
_KINDS = ("Conv", "Gemm", "MatMul", *_INTEGER)
_SHAPING = (
    "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Gather", "Identity", "Max", "Min", "Mod", "Mul",
    "Range", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze",
)  # fmt: skip
_SMALL = 1 << 12  # bytes; constants that shapes are computed from are smaller, and weights are larger
_INT8 = (TensorProto.INT8, TensorProto.UINT8)


@dataclass(frozen=True)
class Product:
    """One node: ``macs`` multiply-accumulates for the nominal input, and whether they are in INT8."""

    name: str
    macs: int
    int8: bool


@dataclass(frozen=True)
class Coverage:
    """Multiply-accumulates: all, and those in INT8."""

    macs: int
    int8: int

    @property
    def part(self) -> float:
        """The INT8 coverage, from 0 to 1; 0 for a graph without products."""
        return self.int8 / self.macs if self.macs else 0.0


def coverage(products: Iterable[Product]) -> Coverage:
    listed = list(products)
    return Coverage(sum(product.macs for product in listed), sum(product.macs for product in listed if product.int8))


def count(model: onnx.ModelProto, dims: Mapping[str, int]) -> list[Product]:
    """The products of ``model`` in topological order; ``dims``: dynamic dimension -> its nominal size, else 1.

    A product runs in INT8 if its op is an integer op, or if both factors come from a DequantizeLinear of 8 bits and its
    sole reader is a QuantizeLinear. A matrix product may also have other readers, if none is a QuantizeLinear. In all
    other cases the runtime computes in float. Raises `ExportError` naming a product whose shape cannot be inferred.
    """
    shapes, dtypes = _shapes(model, dims), {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    producer, by_tensor = producers(model.graph.node), readers(model.graph.node)
    outputs = {value.name for value in model.graph.output}

    def is_int8(name: str) -> bool:
        node = producer.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return False
        source = producer.get(node.input[0])
        dtype = dtypes.get(node.input[0])
        if source is not None and source.op_type == "QuantizeLinear":
            dtype = dtypes.get(source.input[2], TensorProto.UINT8) if len(source.input) > 2 else TensorProto.UINT8
        return dtype in _INT8

    listed = []
    for node in model.graph.node:
        if node.op_type not in _KINDS:
            continue
        after = [reader.op_type for reader in by_tensor.get(node.output[0], [])]
        after += ["output"] if node.output[0] in outputs else []
        fused = after == ["QuantizeLinear"] or (node.op_type != "Conv" and "QuantizeLinear" not in after)
        int8 = node.op_type in _INTEGER or (fused and is_int8(node.input[0]) and is_int8(node.input[1]))
        listed.append(Product(node.name or node.output[0], _macs(node, shapes), int8))
    return listed


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
        inner = prod(right[1:])
    elif node.op_type == "Gemm" and attribute(node, "transA"):
        inner = left[0]
    return prod(out) * inner


def _shapes(model: onnx.ModelProto, dims: Mapping[str, int]) -> dict[str, list[int]]:
    """Tensor -> shape, inferred on a copy without weights: large constants only have a shape."""
    light = lighten(model, _SMALL)
    graph = light.graph
    del graph.value_info[:], graph.output[:]
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param or not dim.HasField("dim_value"):
                dim.dim_value = dims.get(dim.dim_param, 1)
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
    """Compute the small tensors of shapes and constants that inference does not follow; -> whether there were any."""
    small = (tensor for tensor in light.graph.initializer if tensor.data_location != TensorProto.EXTERNAL)
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in small}
    nodes = []
    for node in light.graph.node:
        value = None
        if node.op_type == "Shape" and node.input[0] in shapes:
            ends = {item.name: item.i for item in node.attribute}
            value = np.array(shapes[node.input[0]], np.int64)[ends.get("start") : ends.get("end")]
        elif node.op_type in _SHAPING and all(name in known or not name for name in node.input):
            body = helper.make_graph([node], "node", [], [helper.make_empty_tensor_value_info(node.output[0])])
            evaluator = ReferenceEvaluator(helper.make_model(body, opset_imports=light.opset_import))
            (value,) = list(evaluator.run(None, {name: known[name] for name in node.input if name}))
        elif node.op_type == "NonZero" and node.input[0] in shapes:  # depends on the data: the largest possible shape
            shape = shapes[node.input[0]]
            largest = [len(shape), prod(shape)]
            light.graph.input.append(helper.make_tensor_value_info(node.output[0], TensorProto.INT64, largest))
            continue
        if value is None or value.nbytes >= _SMALL:
            nodes.append(node)
            continue
        known[node.output[0]] = value
        light.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    changed = len(nodes) < len(light.graph.node)
    del light.graph.node[:]
    light.graph.node.extend(nodes)
    return changed
