"""A torch module -> a float ONNX graph of standard ops, with stable shapes and names.

torch's tensor names vary between builds. They are replaced by op type and running number in topological order, so that
ranges recorded for one build fit the next; `graph.fingerprint` says whether they do. A node's metadata hold the path of
its torch module under `graph.MODULE`, because a transposed weight has no name that shows it.
"""

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Collection

import onnx
import torch
from onnxscript import ir

from calmclip.export import light
from calmclip.export.graph import MODULE, metadata
from calmclip.export.nets import Tower
from calmclip.export.towers.attribution import flattened
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.errors import ExportError

OPSET = 20  # the first with Gelu as one op
_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's key for it: modules from outermost to innermost, then the op

_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool, "uint8": torch.uint8}
# any sizes except 0 and 1, which the tracer would fix
_EXAMPLE = {"B": 2, "N": 3, "T": 7, "height": 12, "width": 14}
_LEAST = {"height": 2, "width": 2}  # a border that reflects a picture needs two rows


def to_onnx(tower: Tower) -> onnx.ModelProto:
    """Trace ``tower`` with torch's exporter. String dimensions of its specs stay dynamic, equal names equal.

    Raises `ExportError` if the graph's outputs are not those of the tower.
    """
    dims = {
        d: torch.export.Dim(d, min=_LEAST.get(d, 1))
        for spec in tower.inputs.values()
        for d in spec.shape
        if isinstance(d, str)
    }
    # the exporter logs optional packages that are missing; no tower needs one
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    inputs = example(tower)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            flattened(tower.module.eval(), inputs),
            inputs,
            input_names=list(tower.inputs),
            output_names=list(tower.outputs),
            dynamic_shapes=tuple(
                {axis: dims[d] for axis, d in enumerate(spec.shape) if isinstance(d, str)}
                for spec in tower.inputs.values()
            ),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the old exporter returns None
    model = program.model_proto
    _forget(program.model.graph)
    _strip(model, modules={name for name, _ in tower.module.named_modules() if name})
    _rename(model, keep={name for name, _ in tower.module.named_parameters()})
    if (outputs := [output.name for output in model.graph.output]) != list(tower.outputs):
        raise ExportError(f"the traced graph has the outputs {outputs}; the net promises {list(tower.outputs)}")
    light.check(model)
    return model


def example(tower: Tower) -> tuple[torch.Tensor, ...]:
    """Valid inputs: pixels around zero, ids that every vocabulary has, a mask of ones."""
    generator = torch.Generator().manual_seed(0)

    def tensor(spec: Tensor) -> torch.Tensor:
        shape = [_EXAMPLE[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.dtype == "float32":
            return torch.randn(shape, generator=generator)
        return torch.ones(shape, dtype=_DTYPES[spec.dtype])

    return tuple(tensor(spec) for spec in tower.inputs.values())


def _forget(graph: ir.Graph) -> None:
    """Empty the exporter's graph, because its caches keep it, with a copy of all weights."""
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        value.const_value = None
    for node in graph:
        node.attributes.clear()
    graph.initializers.clear()
    graph.remove([*graph])


def _strip(model: onnx.ModelProto, modules: Collection[str]) -> None:
    """Remove metadata, such as stack traces and file names of this machine; a node keeps its module."""
    scopes = {node.output[0]: ["", *ast.literal_eval(metadata(node, _SCOPES) or "['']")] for node in model.graph.node}
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for node in model.graph.node:
        if (module := scopes[node.output[0]][-2]) in modules:
            node.metadata_props.add(key=MODULE, value=module)
    model.producer_name, model.producer_version = "calmclip", ""
    model.graph.name = "graph"


def _rename(model: onnx.ModelProto, keep: set[str]) -> None:
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    ends = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {name: name for name in ends | (weights & keep)}
    counts: Counter[str] = Counter()

    def fresh(kind: str) -> str:
        counts[kind] += 1
        return f"{kind}_{counts[kind] - 1}"

    for node in graph.node:
        for name in node.input:
            if name in weights and name not in names:
                names[name] = fresh("const")
        for name in node.output:
            if name and name not in names:
                names[name] = fresh(node.op_type)
        node.name = f"{node.op_type}.{names.get(node.output[0], node.output[0])}"
    for node in graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(f"the traced graph has control flow ({node.op_type}); expected a module without branches")
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for place in reversed(range(len(graph.initializer))):  # in place: protobuf keeps the memory of a replaced message
        if graph.initializer[place].name not in names:
            del graph.initializer[place]
    for part in (*graph.initializer, *graph.value_info):
        part.name = names.get(part.name, part.name)
