"""What the static quantizers share: watching a graph at work, and writing QuantizeLinear / DequantizeLinear pairs.

Products of an activation and a constant (Conv, Gemm, MatMul) read uint8 activations, one scale a tensor, and int8
weights, one scale an output channel: U8S8, because ONNX Runtime's S8S8 is 1.6 to 2.9 times slower. Convolutions
write uint8 too, which lets the runtime stay in integers from one to the next; matrix products write float, and so
does everything between them. Products of two activations (attention) stay in float: a few percent of the time, and
the part that loses most.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from export.quantizers import Feeds, Ranges
from models.flow import Array

PRODUCTS = ("Conv", "Gemm", "MatMul")
CUTS = ("Clip", "Relu")  # vanish into the uint8 range of the convolution before them
_OPTIONS = {
    "MatMulConstBOnly": True,
    "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
    "ActivationSymmetric": False,
    "WeightSymmetric": True,
}
_TABLE = 1 << 20  # numbers; smaller tables are not worth three more nodes
T = TypeVar("T")


def constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {initializer.name: initializer for initializer in model.graph.initializer}


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that are quantized: an activation times a constant, in topological order."""
    fixed = constants(model)
    return [n for n in model.graph.node if n.op_type in PRODUCTS and n.input[0] not in fixed and n.input[1] in fixed]


def watched(model: onnx.ModelProto) -> list[str]:
    """Every tensor that becomes uint8: what products read, what convolutions write, and what is left of a cut."""
    names: dict[str, None] = {}
    written = {name for node in products(model) if node.op_type == "Conv" for name in node.output}
    for node in products(model):
        names[node.input[0]] = None
    for node in model.graph.node:
        if written & {*node.output} or (node.op_type in CUTS and node.input[0] in written):
            names[node.output[0]] = None
    return list(names)


def watch(model: onnx.ModelProto, feeds: Feeds, names: Sequence[str], see: Callable[[Array], T]) -> dict[str, list[T]]:
    """Run the float graph over ``feeds``; -> per tensor what ``see`` made of it, feed by feed."""
    taps = onnx.ModelProto()
    taps.CopyFrom(model)
    outputs = {output.name for output in taps.graph.output}
    inputs = {value.name for value in taps.graph.input}
    taps.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in outputs | inputs
    )
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(taps.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    inside = [name for name in names if name not in inputs]
    seen: dict[str, list[T]] = {name: [] for name in names}
    for feed in feeds:
        found = {**feed, **dict(zip(inside, session.run(inside, dict(feed)), strict=True))}
        for name in names:
            seen[name].append(see(found[name]))
    return seen


def write(model: onnx.ModelProto, ranges: Ranges, *, reduce_range: bool) -> onnx.ModelProto:
    """-> a copy with QDQ pairs around its products. ``ranges`` holds one (min, max) for each `watched` tensor."""
    copy = onnx.ModelProto()
    copy.CopyFrom(shape_inference.infer_shapes(model))
    limits = {
        name: TensorData(lowest=np.float32(min(low, 0.0)), highest=np.float32(max(high, 0.0)))
        for name, (low, high) in ranges.items()
    }
    nodes = products(copy)
    written = {name for node in nodes if node.op_type == "Conv" for name in node.output}
    cuts = [node for node in copy.graph.node if node.op_type in CUTS and node.input[0] in written]
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
        nodes_to_quantize=[node.name for node in (*nodes, *cuts)],
        nodes_to_exclude=[],
        op_types_to_quantize=[*PRODUCTS, *CUTS],
        extra_options=dict(_OPTIONS),
    )
    quantizer.quantize_model()
    return quantizer.model.model


def pack_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """-> a copy whose big embedding tables are int8 with one scale a row: Gather, Gather, Cast, Mul."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    fixed = constants(copy)
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        table = fixed.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or np.prod(table.dims) < _TABLE or any(a.name == "axis" and a.i for a in node.attribute):
            nodes.append(node)
            continue
        rows = numpy_helper.to_array(table)
        scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, 1e-12).astype(np.float32)
        packed = np.rint(rows / scale).astype(np.int8)
        name, out = table.name, node.output[0]
        table.CopyFrom(numpy_helper.from_array(packed, f"{name}_int8"))
        copy.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", node.input[1]], [f"{out}_int8"], f"Gather.{out}_int8"),
            helper.make_node("Gather", [f"{name}_scale", node.input[1]], [f"{out}_scale"], f"Gather.{out}_scale"),
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_whole"], f"Cast.{out}_whole", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_whole", f"{out}_scale"], [out], f"Mul.{out}"),
        ]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy
