"""A function of one variable between two tensors of 8 bits -> `ai.calmclip.QuantLookup`, whose table holds its answers.

    DequantizeLinear -> nodes of `POINTWISE`, their other inputs one number each -> QuantizeLinear

What lies between may part and meet again, as in x sigmoid(x), but begins at one DequantizeLinear and is read by nobody
else. The table is made by those very nodes: ONNX Runtime runs them on all 256 bytes.

Between two convolutions of 8 bits, which run with channels last, the bytes are looked up in that order. ONNX Runtime
puts Transposes around such a convolution, or a rule has put them, and it takes out pairs that undo each other, but
moves none past an operator that it does not know.

The op is `models.ops.spec.QUANT_LOOKUP`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.1, for what bytes
mean; a function of a byte has no more than 256 values.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from calmclip.export import light
from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _patterns
from calmclip.export.rewrites._eight import FIRST, LAST, constant, insert, like, maker, put, shape, sweep, turned, turns
from calmclip.models.flow import Array
from calmclip.models.ops.spec import QUANT_LOOKUP

POINTWISE = {
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max",
    "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub",
    "Tanh", "ThresholdedRelu",
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """``nodes`` in order, the first a DequantizeLinear, the last a QuantizeLinear."""

    nodes: tuple[ir.Node, ...]

    @property
    def x(self) -> ir.Value:
        return self.nodes[0].inputs[0]  # type: ignore[return-value]

    @property
    def y(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


def chain(last: ir.Node) -> Chain | None:
    """What ``last``, a QuantizeLinear, ends: None where it is not of one variable, or nothing lies between."""
    found: dict[ir.Node, None] = {}  # in order: a node comes behind those it reads
    starts: set[ir.Node] = set()

    def follow(value: ir.Value | None) -> bool:
        node = None if value is None else value.producer()
        if value is None or node in found or _patterns.constant(value) is not None:
            return True
        if (start := maker(value, "DequantizeLinear")) is not None:
            starts.add(start)
            return len(starts) == 1
        if node is None or node.domain or node.op_type not in POINTWISE or not all(map(follow, node.inputs)):
            return False
        found[node] = None
        return True

    if not follow(last.inputs[0]) or not found or not starts:
        return None
    whole = Chain((*starts, *found, last))
    return whole if _patterns.constant(whole.x) is None else None  # else ONNX Runtime does it when it loads the graph


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        if node.graph is None or node.domain or node.op_type != "QuantizeLinear":
            continue
        if (found := chain(node)) is None:
            continue
        if why := _unfit(found):
            missed[str(found.nodes[-2].name)] = why
        else:
            _put(found, _table(model, found.nodes))
            fired += 1
    return Outcome(fired, missed)


def _unfit(found: Chain) -> str:
    first, *between, last = found.nodes
    kinds = {value.dtype for value in (found.x, found.y)} | {_zero_type(node) for node in (first, last)}
    if kinds - {None} != {ir.DataType.UINT8}:
        return "what it reads or what is made of it is no uint8"
    for node in (first, last):
        held = [_patterns.array(value) for value in node.inputs[1:] if value is not None]
        if any(one is None for one in held):
            return "a scale or a zero point is no constant"
        if any(one.size != 1 for one in held):  # type: ignore[union-attr]
            return "it has a scale for each column"
    rank = 0 if found.x.shape is None else len(found.x.shape)
    for value in _others(between):
        held = _patterns.array(value)
        if held is None or held.size != 1 or held.ndim > rank:
            return "it reads a constant that is not one number"
    inside = {*between, last}
    for value in (node.outputs[0] for node in between):
        if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
            return "a value between its nodes is used elsewhere too"
    return ""


def _zero_type(node: ir.Node) -> ir.DataType | None:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return None if zero is None else zero.dtype


def _others(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """The constants that ``nodes`` read."""
    return [v for node in nodes for v in node.inputs if v is not None and _patterns.constant(v) is not None]


def _table(model: ir.Model, nodes: tuple[ir.Node, ...]) -> Array:
    """What ``nodes`` make of each byte: uint8 [256]."""
    names = {nodes[0].inputs[0]: "x", nodes[-1].outputs[0]: "y"}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                names.setdefault(value, f"v{len(names)}")
    protos = [ir.to_proto(node) for node in nodes]
    for node, proto in zip(nodes, protos, strict=True):
        proto.input[:] = ["" if value is None else names[value] for value in node.inputs]
        proto.output[:] = [names[value] for value in node.outputs]
    held = {names[value]: _patterns.array(value) for value in _others(nodes)}
    ends = [[helper.make_tensor_value_info(name, TensorProto.UINT8, None)] for name in "xy"]
    constants = [numpy_helper.from_array(array, name) for name, array in held.items()]  # type: ignore[arg-type]
    graph = helper.make_graph(protos, "table", *ends, constants)
    opsets = [helper.make_opsetid("", model.opset_imports[""])]
    alone = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    (table,) = light.Session(alone, threads=1).run(None, {"x": np.arange(256, dtype=np.uint8)})
    return np.asarray(table).reshape(-1)


def _put(found: Chain, table: Array) -> None:
    last, old = found.nodes[-1], found.y
    y, held = like(old, ir.DataType.UINT8), constant(last, f"{old.name}_table", table)
    around = _channels_last(found)
    put(old, y)
    if around:
        x = turned(last, found.x, f"{found.x.name}_last", LAST)
        answer = like(x, name=f"{y.name}_last")
        insert(last, QUANT_LOOKUP.name, [x, held], {}, [answer])
        insert(last, "Transpose", [answer], {"perm": FIRST}, [y], domain="")
    else:
        insert(last, QUANT_LOOKUP.name, [found.x, held], {}, [y])
    sweep(last.graph, [last])  # type: ignore[arg-type]


def _channels_last(found: Chain) -> bool:
    """Whether what makes its bytes and one of their readers have, or will have, channels last."""
    sizes, before = shape(found.x), maker(found.x, "QuantizeLinear")
    if sizes is None or len(sizes) != 4:
        return False
    if not (turns(found.x.producer(), FIRST) or (before is not None and _in_bytes(maker(before.inputs[0], "Conv")))):
        return False
    readers = [use.node for use in found.y.uses()]
    backs = [node.outputs[0] for node in readers if not node.domain and node.op_type == "DequantizeLinear"]
    return any(turns(node, LAST) for node in readers) or any(_in_bytes(use.node) for v in backs for use in v.uses())


def _in_bytes(node: ir.Node | None) -> bool:
    """Whether it is a convolution of 8 bits."""
    if node is None or node.domain or node.op_type != "Conv":
        return False
    return all(maker(value, "DequantizeLinear") is not None for value in node.inputs[:2])


REWRITES.register("quant_lookup")(
    Rewrite(QUANT_LOOKUP, lambda params: BODIES[QUANT_LOOKUP.name](**QUANT_LOOKUP.attributes), rewrite, replaces=3)
)
