"""A function of one 8-bit tensor with an 8-bit result -> `ai.calmclip.QuantLookup`, a table of its 256 values.

    DequantizeLinear -> nodes of `POINTWISE`, their other inputs one number each -> QuantizeLinear

The nodes between may fork and join, as in x sigmoid(x), but they start at one DequantizeLinear, and nothing else reads
their results. ONNX Runtime runs those very nodes on all 256 bytes to make the table.

Between two convolutions in 8 bits, which run with channels last, the table is applied in that layout. ONNX Runtime puts
Transposes around such a convolution, or a rule has done so. It removes Transposes that undo each other, but moves none
past an operator that it does not know.

The op is `models.ops.spec.QUANT_LOOKUP`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.1, for the meaning of
quantized values; a function of a byte has no more than 256 values.
"""

from collections.abc import Iterable

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from calmclip.export import light
from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.values import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    constant_array,
    constant_tensor,
    graph_of,
    insert,
    insert_channels_last,
    is_transpose,
    new_constant,
    optional_input,
    present,
    producer,
    shape,
    transpose,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.flow import Array
from calmclip.models.ops.spec import QUANT_LOOKUP

POINTWISE = {
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max",
    "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub",
    "Tanh", "ThresholdedRelu",
}  # fmt: skip
_IR_VERSION = 10  # of the model that computes a table


def match(last: ir.Node) -> Match | str | None:
    nodes = _chain(last)
    if nodes is None:
        return None
    x, y = nodes[0].inputs[0], last.outputs[0]
    # a function of a constant is left to ONNX Runtime, which folds it when it loads the graph
    if x is None or constant_tensor(x) is not None:
        return None
    if why := _unfit(nodes, x):
        return why

    def insert_op(new: ir.Value) -> None:
        table = new_constant(last, f"{new.name}_table", _table(nodes))
        if _between_convolutions(x, y):
            by_channel = transpose(last, x, f"{x.name}_last", CHANNELS_LAST)
            insert_channels_last(last, QUANT_LOOKUP, [by_channel, table], new)
        else:
            insert(last, QUANT_LOOKUP, [x, table], new)

    return Match((y,), insert_op)


def _chain(last: ir.Node) -> list[ir.Node] | None:
    """The nodes from a DequantizeLinear to ``last``, a QuantizeLinear, in order; None if ``last`` ends no function of
    one tensor, or there is no node between."""
    between: list[ir.Node] = []
    starts: set[ir.Node] = set()

    def follow(value: ir.Value | None) -> bool:
        node = None if value is None else value.producer()
        if value is None or node in between or constant_tensor(value) is not None:
            return True
        if (start := producer(value, "DequantizeLinear")) is not None:
            starts.add(start)
            return len(starts) == 1
        if node is None or node.domain or node.op_type not in POINTWISE or not all(map(follow, node.inputs)):
            return False
        between.append(node)  # after the nodes that it reads
        return True

    if last.domain or last.op_type != "QuantizeLinear" or not follow(last.inputs[0]) or not between or not starts:
        return None
    return [*starts, *between, last]


def _unfit(nodes: list[ir.Node], x: ir.Value) -> str:
    first, *between, last = nodes
    values = (x, last.outputs[0], optional_input(first, 2), optional_input(last, 2))
    if {value.dtype for value in present(values)} - {None} != {ir.DataType.UINT8}:
        return "its input or its result is no uint8"
    steps = [constant_array(value) for node in (first, last) for value in present(node.inputs[1:])]
    if any(array is None for array in steps):
        return "a scale or a zero point is no constant"
    if any(array.size != 1 for array in present(steps)):
        return "it has a scale for each column"
    for value in _constants(between):
        array = constant_array(value)
        if array is None or array.size != 1 or array.ndim > len(x.shape or ()):
            return "it reads a constant that is not one number"
    for value in (node.outputs[0] for node in between):
        if value.is_graph_output() or any(use.node not in nodes[1:] for use in value.uses()):
            return "a value between its nodes is used elsewhere too"
    return ""


def _constants(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """The constants that ``nodes`` read."""
    return [value for node in nodes for value in present(node.inputs) if constant_tensor(value) is not None]


def _table(nodes: list[ir.Node]) -> Array:
    """The results of ``nodes`` for each byte: uint8 [256]."""
    names = {nodes[0].inputs[0]: "x", nodes[-1].outputs[0]: "y"}
    for node in nodes:
        for value in present((*node.inputs, *node.outputs)):
            names.setdefault(value, f"v{len(names)}")
    protos = [ir.to_proto(node) for node in nodes]
    for node, proto in zip(nodes, protos, strict=True):
        proto.input[:] = ["" if value is None else names[value] for value in node.inputs]
        proto.output[:] = [names[value] for value in node.outputs]
    x, y = ([helper.make_tensor_value_info(name, TensorProto.UINT8, None)] for name in "xy")
    arrays = {names[value]: constant_array(value) for value in _constants(nodes)}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None]
    opsets = [helper.make_opsetid("", graph_of(nodes[0]).opset_imports[""])]
    graph = helper.make_graph(protos, "table", x, y, constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    (table,) = light.Session(model, threads=1).run(None, {"x": np.arange(256, dtype=np.uint8)})
    return np.asarray(table).reshape(-1)


def _between_convolutions(x: ir.Value, y: ir.Value) -> bool:
    """Whether the node before ``x`` and a consumer of ``y`` have, or will have, channels last."""
    quantize = producer(x, "QuantizeLinear")
    before = None if quantize is None else producer(quantize.inputs[0], "Conv")
    if len(shape(x) or ()) != 4 or not (is_transpose(x.producer(), CHANNELS_FIRST) or _is_quantized(before)):
        return False
    consumers = [use.node for use in y.uses()]
    floats = [node.outputs[0] for node in consumers if not node.domain and node.op_type == "DequantizeLinear"]
    return any(is_transpose(node, CHANNELS_LAST) for node in consumers) or any(
        _is_quantized(use.node) for value in floats for use in value.uses()
    )


def _is_quantized(node: ir.Node | None) -> bool:
    """Whether it is a convolution in 8 bits."""
    if node is None or node.domain or node.op_type != "Conv":
        return False
    return all(producer(value, "DequantizeLinear") is not None for value in node.inputs[:2])


REWRITES.register("quant_lookup")(Rewrite(QUANT_LOOKUP, at_each_node(match), replaces=3))
