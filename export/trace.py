"""A torch module -> a float ONNX graph on standard ops, with shapes and names that stay the same.

Tensors that torch names by chance are renamed by what they are (op type and running number in topological
order), so ranges recorded for one build of a graph fit the next; `fingerprint` says whether they do. Which module
a node is part of, its metadata keep under `MODULE`: a transposed weight has no name that would tell.
"""

import ast
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Collection

import onnx
import torch
from onnxscript import ir

from calmclip.export import light
from calmclip.export.nets import Tower
from calmclip.models.errors import ExportError

OPSET = 20  # the first with Gelu as one op
MODULE = "module"  # key of a node's metadata: the path of its torch module, "blocks.3.mlp.down"
_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter says so: modules from outermost to innermost, the op

_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool, "uint8": torch.uint8}
_EXAMPLE = {"B": 2, "T": 7}  # any sizes but 0 and 1, which the tracer would bake in


def to_onnx(tower: Tower) -> onnx.ModelProto:
    """Trace ``tower`` with torch's exporter. String dimensions of its specs stay dynamic, equal names equal.

    Raises `ExportError` when the graph's inputs or outputs are not those the tower promises.
    """
    dims = {d: torch.export.Dim(d, min=1) for spec in tower.inputs.values() for d in spec.shape if isinstance(d, str)}
    # The exporter says which optional packages it does without; none of ours needs one.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's deprecations are its own business
        program = torch.onnx.export(
            tower.module.eval(),
            example(tower),
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
    found = [o.name for o in model.graph.output]
    if found != list(tower.outputs):
        raise ExportError(f"the traced graph has the outputs {found}; the net promises {list(tower.outputs)}")
    light.check(model)
    return model


def example(tower: Tower) -> tuple[torch.Tensor, ...]:
    """Inputs that run: pixels around zero, ids that every vocabulary has, a mask of ones."""
    generator = torch.Generator().manual_seed(0)

    def one(spec) -> torch.Tensor:
        shape = [_EXAMPLE[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.dtype == "float32":
            return torch.randn(shape, generator=generator)
        return torch.ones(shape, dtype=_DTYPES[spec.dtype])

    return tuple(one(spec) for spec in tower.inputs.values())


def fingerprint(model: onnx.ModelProto) -> str:
    """Equal for graphs of equal structure: op types, how they are wired, and the shapes of their constants."""
    shapes = {i.name: list(i.dims) for i in model.graph.initializer}
    lines = [
        f"{node.op_type} {list(node.input)} {list(node.output)} {[shapes[i] for i in node.input if i in shapes]}"
        for node in model.graph.node
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _forget(graph: ir.Graph) -> None:
    """Empty the exporter's own graph: its caches keep that, and with it a copy of all weights."""
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        value.const_value = None
    for node in graph:
        node.attributes.clear()
    graph.initializers.clear()
    graph.remove([*graph])


def module_of(node: onnx.NodeProto) -> str:
    """The torch module that the node is part of; "" where it is not known, and for what the tower does itself."""
    return next((one.value for one in node.metadata_props if one.key == MODULE), "")


def _strip(model: onnx.ModelProto, modules: Collection[str]) -> None:
    """Drop what a reader of the graph has no use for, stack traces and file names of this machine among it; of all that
    is said of a node its module stays."""
    found = {node.output[0]: _module(node) for node in model.graph.node}
    for thing in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del thing.metadata_props[:]
        thing.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for node in model.graph.node:
        if (module := found[node.output[0]]) in modules:
            node.metadata_props.add(key=MODULE, value=module)
    model.producer_name, model.producer_version = "calmclip", ""
    model.graph.name = "graph"


def _module(node: onnx.NodeProto) -> str:
    told = next((one.value for one in node.metadata_props if one.key == _SCOPES), "['']")
    *modules, _ = ["", *ast.literal_eval(told)]
    return str(modules[-1])


def _rename(model: onnx.ModelProto, keep: set[str]) -> None:
    graph = model.graph
    fixed = {v.name for v in (*graph.input, *graph.output)}
    weights = {i.name for i in graph.initializer}
    names: dict[str, str] = {name: name for name in fixed | (weights & keep)}
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
            raise ExportError(f"the traced graph has control flow ({node.op_type}); export without branches")
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for place in reversed(range(len(graph.initializer))):  # not anew: protobuf keeps what a message once held
        if graph.initializer[place].name not in names:
            del graph.initializer[place]
    for thing in (*graph.initializer, *graph.value_info):
        thing.name = names.get(thing.name, thing.name)
