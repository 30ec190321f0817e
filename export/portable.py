"""Graphs of standard operators alone, for engines that know neither our operators nor local functions.

The opset of a portable graph is the oldest that means the same. ONNX keeps an operator's name for all its versions, so
the checker decides: it knows each version's inputs, attributes and types.
"""

from collections.abc import Iterator

import onnx
from onnx import inliner

from calmclip.export import light
from calmclip.models.errors import ExportError

STANDARD = ("", "ai.onnx")  # two names of one domain
OLDEST = 13  # quantized weights have a scale per channel, and Softmax its present meaning, from this opset on


def portable(model: onnx.ModelProto, what: str) -> onnx.ModelProto:
    """-> the graph ``what`` with local functions inlined, in the oldest opset and file version that hold it.

    Raises `ExportError` if it has operators of another domain.
    """
    bare = light.lighten(model)
    if model.functions:
        bare = inliner.inline_local_functions(bare)
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes(bare.graph) if node.domain not in STANDARD})
    if foreign:
        raise ExportError(
            f"{what}: it has {', '.join(foreign)}; a portable bundle has operators of the domain ai.onnx alone. Choose "
            "another quantizer or adapter, or export without --portable"
        )
    newest = next(opset.version for opset in bare.opset_import if opset.domain in STANDARD)
    for version in range(OLDEST, newest + 1):
        del bare.opset_import[:]
        bare.opset_import.append(onnx.helper.make_opsetid("", version))
        bare.ir_version = onnx.helper.find_min_ir_version_for(bare.opset_import)
        if version == newest or _valid(bare):
            break
    return light.fill(bare, model)


def is_portable(model: onnx.ModelProto) -> bool:
    """Whether a plain ONNX engine can run the model: standard operators, and no local function."""
    return not model.functions and all(opset.domain in STANDARD for opset in model.opset_import)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, also those of subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def _valid(model: onnx.ModelProto) -> bool:
    """Whether every node fits its operator in the model's opset: inputs, outputs, attributes and types."""
    try:
        light.check(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True
