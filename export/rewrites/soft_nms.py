"""A detector's graph that ends in candidates -> a graph that ends in `ai.calmclip.SoftNMS`.

Source: Bodla et al. 2017 (arXiv 1704.04503), section 3; the op is `calmclip.models.ops.spec.SOFT_NMS`.

The outputs candidate_boxes float32 [N, 4], candidate_scores float32 [N] and candidate_classes int64 [N] give way to
kept_boxes [K, 4], scores [K] (decayed), raw_scores [K] and classes [K], best first; the graph's other outputs stay. The
op's settings become inputs of shape [1]. If the graph takes a setting already, the op shares it.
"""

from onnxscript import ir

from calmclip.export.matching import Outcome
from calmclip.export.matching.values import new_node, new_value
from calmclip.export.rewrites import DTYPES, REWRITES, NoParams, Rewrite, mismatch, tensor_names
from calmclip.models.bundle.manifest import Tensor
from calmclip.models.ops.spec import DOMAIN, SOFT_NMS, VERSION

CANDIDATES = {
    "candidate_boxes": Tensor(dtype="float32", shape=("N", 4)),
    "candidate_scores": Tensor(dtype="float32", shape=("N",)),
    "candidate_classes": Tensor(dtype="int64", shape=("N",)),
}
SETTINGS = {name: tensor for name, tensor in SOFT_NMS.inputs.items() if tensor.shape == (1,)}
ANSWERS = {
    "kept_boxes": Tensor(dtype="float32", shape=("K", 4)),
    "scores": Tensor(dtype="float32", shape=("K",)),
    "raw_scores": Tensor(dtype="float32", shape=("K",)),
    "classes": Tensor(dtype="int64", shape=("K",)),
}
_NAMES = {"kept_scores": "scores", "kept_classes": "classes"}  # the op's outputs that are outputs of the graph


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    graph = model.graph
    if why := _unfit(graph):
        return Outcome(0, {"the graph": why})
    outputs = {value.name: value for value in graph.outputs}
    boxes, scores, classes = (outputs.pop(name) for name in CANDIDATES)
    inputs = {value.name: value for value in graph.inputs}
    graph.inputs.extend(_value(name, tensor) for name, tensor in SETTINGS.items() if name not in inputs)
    inputs = {value.name: value for value in graph.inputs}
    indices, *others = (_value(_NAMES.get(name, name), tensor) for name, tensor in SOFT_NMS.outputs.items())
    answers = {name: _value(name, tensor) for name, tensor in ANSWERS.items()}
    answers |= {str(value.name): value for value in others if value.name in answers}
    settings = (inputs[name] for name in SETTINGS)
    graph.extend(
        [
            new_node(SOFT_NMS, [boxes, scores, classes, *settings], indices, *others),
            new_node("Gather", [boxes, indices], answers["kept_boxes"]),
            new_node("Gather", [scores, indices], answers["raw_scores"]),
        ]
    )
    graph.outputs[:] = [*answers.values(), *outputs.values()]
    graph.opset_imports.setdefault(DOMAIN, VERSION)
    return Outcome(1, {})


def _unfit(graph: ir.Graph) -> str:
    outputs, inputs = ({value.name: value for value in values} for values in (graph.outputs, graph.inputs))
    if absent := [name for name in CANDIDATES if name not in outputs]:
        return f"it has no output {', '.join(absent)}; a detector's graph ends in {', '.join(CANDIDATES)}"
    for values, expected in ((outputs, CANDIDATES), (inputs, SETTINGS)):
        for name, tensor in expected.items():
            if name in values and (why := mismatch(values[name], tensor)):
                return why
    new = ({*ANSWERS, *SOFT_NMS.outputs} - _NAMES.keys()) | (SETTINGS.keys() - inputs.keys())
    if clash := sorted(new & (inputs.keys() | tensor_names(graph))):
        return f"it has a tensor {clash[0]!r} already, and a setting or an output of the op needs that name"
    return ""


def _value(name: str, tensor: Tensor) -> ir.Value:
    return new_value(name, DTYPES[tensor.dtype], tensor.shape)


REWRITES.register("soft_nms")(Rewrite(SOFT_NMS, rewrite, replaces=0, attaches=True))
