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
from models.errors import ExportError
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


def products(model: onnx.ModelProto, keep: Sequence[str] = ()) -> list[onnx.NodeProto]:
    """The nodes that are quantized: an activation times a constant, in topological order, without those in ``keep``.

    Not those that read probabilities: all but a few of these would round to 0 at 1/255 (see `pack`).
    """
    fixed = constants(model)
    floats = fixed.keys() | _probabilities(model)
    return [
        n
        for n in model.graph.node
        if n.op_type in PRODUCTS and n.input[0] not in floats and n.input[1] in fixed and n.name not in keep
    ]


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


def watch(
    model: onnx.ModelProto, feeds: Feeds, names: Sequence[str], see: Callable[[str, Array], T]
) -> dict[str, list[T]]:
    """Run the float graph over ``feeds``; -> per tensor what ``see(tensor, values)`` made of it, feed by feed."""
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
        computed = session.run(inside, dict(feed)) if inside else []  # no names would mean all outputs
        found = {**feed, **dict(zip(inside, computed, strict=True))}
        for name in names:
            if found[name].size:  # an expert of a mixture may get no token
                seen[name].append(see(name, found[name]))
    if unseen := [name for name in names if not seen[name]]:
        raise ExportError(
            f"no calibration input gives {unseen[0]} a value, and {len(unseen)} tensors in all, so they have no range; "
            "give more pictures or texts, or, where experts are routed, export with --experts dense"
        )
    return seen


def write(model: onnx.ModelProto, ranges: Ranges, *, keep: Sequence[str], reduce_range: bool) -> onnx.ModelProto:
    """-> a copy with QDQ pairs around its products. ``ranges`` holds one (min, max) for each `watched` tensor."""
    copy = onnx.ModelProto()
    copy.CopyFrom(shape_inference.infer_shapes(model))
    limits = {
        name: TensorData(lowest=np.float32(min(low, 0.0)), highest=np.float32(max(high, 0.0)))
        for name, (low, high) in ranges.items()
        if np.ndim(low) == 0
    }
    nodes = products(copy, keep)
    if not nodes:  # the library takes an empty list for "all of them"
        return copy
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
    quantizer.model.topological_sort()  # it appends its nodes anywhere; the standard wants an order
    return quantizer.model.model


def pack(model: onnx.ModelProto) -> onnx.ModelProto:
    """-> a copy that stores in int8 what is computed in float all the same: one scale a row or column.

    Big embedding tables (Gather), which are read a few rows at a time, and matrices that mix their rows by
    probabilities (MatMul behind Softmax). The runtime casts such a matrix once, when it loads the graph.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    fixed, mixers = constants(copy), _probabilities(copy)
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        out = node.output[0]
        if node.op_type == "Gather" and node.input[0] in fixed and np.prod(fixed[node.input[0]].dims) >= _TABLE:
            table, scale = _pack(copy, fixed[node.input[0]], axis=1)
            nodes += [
                _node("Gather", [table, node.input[1]], f"{out}_int8"),
                _node("Gather", [scale, node.input[1]], f"{out}_scale"),
                _node("Cast", [f"{out}_int8"], f"{out}_whole", to=TensorProto.FLOAT),
                _node("Mul", [f"{out}_whole", f"{out}_scale"], out),
            ]
        elif node.op_type == "MatMul" and node.input[0] in mixers and node.input[1] in fixed:
            table, scale = _pack(copy, fixed[node.input[1]], axis=0)
            nodes += [
                _node("Cast", [table], f"{table}_whole", to=TensorProto.FLOAT),
                _node("MatMul", [node.input[0], f"{table}_whole"], f"{out}_whole"),
                _node("Mul", [f"{out}_whole", scale], out),
            ]
        else:
            nodes.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [initializer for initializer in copy.graph.initializer if initializer.name in used]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


def _pack(model: onnx.ModelProto, matrix: TensorProto, axis: int) -> tuple[str, str]:
    """Adds int8 and scales to the model; -> their names. One scale for all along ``axis``."""
    values = numpy_helper.to_array(matrix)
    scale = np.maximum(np.abs(values).max(axis=axis, keepdims=True) / 127, 1e-12).astype(np.float32)
    table, gain = f"{matrix.name}_int8", f"{matrix.name}_scale"
    for name, array in ((table, np.rint(values / scale).astype(np.int8)), (gain, scale)):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return table, gain


def _probabilities(model: onnx.ModelProto) -> set[str]:
    return {node.output[0] for node in model.graph.node if node.op_type == "Softmax"}


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], f"{kind}.{output}", **attributes)
