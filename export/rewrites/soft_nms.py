"""A detector's graph that ends in candidates -> one that ends in `ai.calmclip.SoftNMS`.

Source: Bodla et al. 2017 (arXiv 1704.04503), section 3; the op is `calmclip.models.ops.spec.SOFT_NMS`.

Takes the outputs candidate_boxes float32 [N, 4], candidate_scores float32 [N] and candidate_classes int64 [N] away;
answers kept_boxes [K, 4], scores [K] (decayed), raw_scores [K] and classes [K], best first, and what else the graph
answered. The op's settings become inputs of shape [1]; one the graph takes already, it shares with the op.
"""

from onnxscript import ir

from calmclip.export.functions.soft_nms import soft_nms
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, inner
from calmclip.models.bundle.manifest import Tensor, fits
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
_NAMES = {"kept_scores": "scores", "kept_classes": "classes"}  # the op's outputs that are answers themselves


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    if why := _unfit(model.graph):
        return Outcome(0, {"the graph": why})
    graph = model.graph
    made = {value.name: value for value in graph.outputs}
    boxes, scores, classes = (made[name] for name in CANDIDATES)
    taken = {value.name: value for value in graph.inputs}
    for name, tensor in SETTINGS.items():
        if name not in taken:
            taken[name] = _value(name, tensor)
            graph.inputs.append(taken[name])
    outputs = [_value(_NAMES.get(name, name), tensor) for name, tensor in SOFT_NMS.outputs.items()]
    inputs = [boxes, scores, classes, *(taken[name] for name in SETTINGS)]
    answers = {name: _value(name, tensor) for name, tensor in ANSWERS.items()}
    answers |= {str(value.name): value for value in outputs if value.name in answers}
    kept = outputs[0]
    graph.extend(
        [
            ir.Node(
                DOMAIN, SOFT_NMS.name, inputs, outputs=outputs, version=VERSION, name=f"{SOFT_NMS.name}.{kept.name}"
            ),
            ir.Node("", "Gather", [boxes, kept], outputs=[answers["kept_boxes"]], name="Gather.kept_boxes"),
            ir.Node("", "Gather", [scores, kept], outputs=[answers["raw_scores"]], name="Gather.raw_scores"),
        ]
    )
    others = [value for value in graph.outputs if value.name not in CANDIDATES]
    graph.outputs[:] = [*answers.values(), *others]
    graph.opset_imports.setdefault(DOMAIN, VERSION)
    return Outcome(1, {})


def _unfit(graph: ir.Graph) -> str:
    made = {value.name: value for value in graph.outputs}
    if absent := [name for name in CANDIDATES if name not in made]:
        return f"it has no output {', '.join(absent)}; a detector's graph ends in {', '.join(CANDIDATES)}"
    for name, value in [*made.items(), *((value.name, value) for value in graph.inputs)]:
        expected = CANDIDATES.get(str(name)) or SETTINGS.get(str(name))
        if expected and not _is(value, expected):
            return f"{name} is {value.dtype} {value.shape}; expected {expected.dtype} {list(expected.shape)}"
    taken = {value.name for value in graph.inputs}
    new = ({*ANSWERS, *SOFT_NMS.outputs} - _NAMES.keys()) | (SETTINGS.keys() - taken)
    if clash := sorted(new & (taken | inner(graph))):
        return f"it has a tensor {clash[0]!r} already, which is what a setting or an answer of the op is called"
    return ""


def _is(value: ir.Value, expected: Tensor) -> bool:
    if value.dtype is None or value.shape is None or value.dtype != _DTYPES[expected.dtype]:
        return False
    return fits(tuple(d if isinstance(d, int) else str(d) for d in value.shape), expected.shape)


_DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "uint8": ir.DataType.UINT8}


def _value(name: str, tensor: Tensor) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(_DTYPES[tensor.dtype]))


REWRITES.register("soft_nms")(Rewrite(SOFT_NMS, lambda params: soft_nms(), rewrite, replaces=0, attaches=True))
