"""Walk and edit ONNX graphs: `Draft`, the products of a graph (Conv, Gemm, MatMul), and `tap` for inner tensors."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calmclip.export import light
from calmclip.models.flow import Array
from calmclip.models.ops.library import Library

MODULE = "module"  # key of a node's metadata: the path of its torch module, "blocks.3.mlp.down"
PRODUCTS = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Clip", "Elu", "Gelu", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh")


class Draft:
    """A graph under edit: its nodes and constants, without a copy of the weights that stay the same."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = constants(model)
        self.outputs = {value.name for value in model.graph.output}

    def array(self, name: str) -> Array:
        return numpy_helper.to_array(self.constants[name])

    def add(self, name: str, array: Array | np.generic) -> str:
        """Add or replace the constant ``name``; -> ``name``."""
        self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def finish(self) -> onnx.ModelProto:
        """-> a model of the current nodes and the constants that they read."""
        old, new = self.model, onnx.ModelProto(opset_import=self.model.opset_import, functions=self.model.functions)
        new.ir_version, new.producer_name = old.ir_version, old.producer_name
        new.producer_version = old.producer_version
        new.graph.name = old.graph.name
        new.graph.node.extend(self.nodes)
        new.graph.input.extend(old.graph.input)
        new.graph.output.extend(old.graph.output)
        computed = producers(self.nodes)
        new.graph.value_info.extend(value for value in old.graph.value_info if value.name in computed)
        read = {name for node in self.nodes for name in node.input} | self.outputs
        new.graph.initializer.extend(tensor for name, tensor in self.constants.items() if name in read)
        return new


def constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def producers(nodes: Iterable[onnx.NodeProto]) -> dict[str, onnx.NodeProto]:
    """Tensor -> the node that computes it."""
    return {name: node for node in nodes for name in node.output}


def readers(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    """Tensor -> the nodes that read it, one entry per read."""
    by_tensor: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            by_tensor.setdefault(name, []).append(node)
    return by_tensor


def products(model: onnx.ModelProto | Draft, keep: Collection[str] = ()) -> list[onnx.NodeProto]:
    """The nodes that are quantized: an activation times a constant, in topological order, except those in ``keep``.

    Three kinds are left out: products that read probabilities, because at a scale of 1/255 most probabilities round to
    0 (see `packing.pack`); a Gemm with transA, alpha or beta; and a MatMul with a stack of matrices. No net here has
    the last two.
    """
    nodes, fixed = _parts(model)
    floats = fixed.keys() | probabilities(nodes)
    return [
        node
        for node in nodes
        if node.op_type in PRODUCTS
        and node.input[0] not in floats
        and node.input[1] in fixed
        and node.name not in keep
        and (node.op_type == "Conv" or len(fixed[node.input[1]].dims) == 2)
        and (node.op_type != "Gemm" or _is_plain(node))
    ]


def matrices(model: onnx.ModelProto | Draft, keep: Collection[str] = ()) -> list[onnx.NodeProto]:
    """The `products` that are no convolutions."""
    return [node for node in products(model, keep) if node.op_type != "Conv"]


def activation_products(model: onnx.ModelProto | Draft) -> list[onnx.NodeProto]:
    """The products of two activations (attention), in topological order."""
    nodes, fixed = _parts(model)
    return [node for node in nodes if node.op_type == "MatMul" and not fixed.keys() & {*node.input}]


def depthwise(model: onnx.ModelProto | Draft, keep: Collection[str] = ()) -> list[onnx.NodeProto]:
    """The convolutions that mix no channels: each output channel reads one of several input channels."""
    _, fixed = _parts(model)
    convolutions = (node for node in products(model, keep) if node.op_type == "Conv")
    return [node for node in convolutions if attribute(node, "group", 1) > 1 and fixed[node.input[1]].dims[1] == 1]


def probabilities(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """The outputs of the Softmax nodes."""
    return {node.output[0] for node in nodes if node.op_type == "Softmax"}


def node_of(kind: str, inputs: Sequence[str], output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], f"{kind}.{output}", None, None, None, **attributes)


def attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    return next((item.i for item in node.attribute if item.name == name), default)


def output_axis(node: onnx.NodeProto) -> int:
    """The axis of a product's weight that holds its outputs."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB") else 1


def cut(model: onnx.ModelProto, outputs: Collection[str]) -> onnx.ModelProto:
    """The part of ``model`` that computes some of its ``outputs``; its weights are those of ``model``."""
    draft, needed = Draft(model), set(outputs)
    kept = []
    for node in reversed(draft.nodes):
        if needed & {*node.output}:
            kept.append(node)
            needed |= {*node.input}
    draft.nodes, draft.outputs = kept[::-1], {*outputs}
    part = draft.finish()
    for values, names in ((part.graph.output, {*outputs}), (part.graph.input, needed)):
        wanted = [value for value in values if value.name in names]
        del values[:]
        values.extend(wanted)
    return part


def tap(
    model: onnx.ModelProto, names: Sequence[str], *, library: Library | None = None
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """-> a function from feeds to the tensors ``names``: inputs, outputs or tensors inside the graph. ``library``: as
    in `light.Session`."""
    outputs, inputs = ({value.name for value in side} for side in (model.graph.output, model.graph.input))
    computed = [name for name in names if name not in inputs]
    count = len(model.graph.output)
    try:  # the model is changed in place for a moment: a copy of a large graph would copy its weights
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in computed if name not in outputs
        )
        session = light.Session(model, library=library)
    finally:
        del model.graph.output[count:]

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        answers = session.run(computed, dict(feed)) if computed else []  # an empty list would mean all outputs
        tensors = {**feed, **dict(zip(computed, answers, strict=True))}
        return {name: tensors[name] for name in names}

    return run


def _is_plain(node: onnx.NodeProto) -> bool:
    """Whether a Gemm is x W + b."""
    return not attribute(node, "transA") and all(
        item.f == 1.0 for item in node.attribute if item.name in ("alpha", "beta")
    )


def _parts(model: onnx.ModelProto | Draft) -> tuple[Sequence[onnx.NodeProto], Mapping[str, TensorProto]]:
    return (model.nodes, model.constants) if isinstance(model, Draft) else (model.graph.node, constants(model))


def fingerprint(model: onnx.ModelProto) -> str:
    """Equal for graphs of equal structure: op types, connections, and the shapes of constants."""
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    lines = [
        f"{node.op_type} {list(node.input)} {list(node.output)} {[shapes[i] for i in node.input if i in shapes]}"
        for node in model.graph.node
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def module_of(node: onnx.NodeProto) -> str:
    """The path of the node's torch module; "" if it is unknown or the tower itself."""
    return metadata(node, MODULE)


def metadata(node: onnx.NodeProto, key: str) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == key), "")
