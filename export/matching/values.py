"""Nodes and values of a graph in onnxscript's IR: find, insert, replace and remove them."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from onnxscript import ir

from calmclip.models.flow import Array
from calmclip.models.ops.spec import DOMAIN, VERSION, Op

CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # `perm` of a Transpose
Side: TypeAlias = int | str | ir.SymbolicDim
T = TypeVar("T")


def producer(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """The node that produces ``value``, if it is of one of ``op_types``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == domain and node.op_type in op_types else None


def sole_consumer(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The standard node (of one of ``op_types``) that reads ``value``, if nothing else does and it is no output."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.domain or value.is_graph_output():
        return None
    return uses[0].node if not op_types or uses[0].node.op_type in op_types else None


def present(values: Iterable[T | None]) -> list[T]:
    """``values`` without None, such as optional inputs that are left out."""
    return [value for value in values if value is not None]


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a node of two inputs that is not ``value``; None if both are."""
    return next((other for other in node.inputs if other is not value), None)


def shape(value: ir.Value | None) -> tuple[int | str, ...] | None:
    """None if the rank is unknown, or a dimension has neither size nor name."""
    if value is None or value.shape is None:
        return None
    sides: list[int | str] = present(side if isinstance(side, int) else side.value for side in value.shape)
    return tuple(sides) if len(sides) == len(value.shape) else None


def fixed_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """None if any dimension is unknown or known only at run time."""
    sizes = shape(value) or ()
    fixed = tuple(side for side in sizes if isinstance(side, int))
    return fixed if fixed and len(fixed) == len(sizes) else None


def columns(value: ir.Value) -> int | None:
    """The size of the last dimension, if it is known."""
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What an initializer or a Constant node holds; None for anything else, such as the default of an input."""
    return None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)


def constant_array(value: ir.Value | None) -> Array | None:
    """The numbers of a constant; None if ``value`` is no constant, or a large one, which a light graph does not hold
    (`export.light.SMALL`)."""
    tensor = constant_tensor(value)
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else np.asarray(tensor.numpy())


def same_value(value: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether both are one value, or constants of the same numbers."""
    numbers, others = constant_array(value), constant_array(other)
    return value is other or (numbers is not None and others is not None and np.array_equal(numbers, others))


def new_value(name: str, dtype: ir.DataType, sizes: Iterable[Side] | None) -> ir.Value:
    return ir.Value(name=name, shape=None if sizes is None else ir.Shape(sizes), type=ir.TensorType(dtype))


def new_value_like(value: ir.Value, name: str | None = None) -> ir.Value:
    """A new value with the type and shape of ``value``, and its name unless ``name`` is another."""
    return ir.Value(name=name or value.name, shape=value.shape, type=value.type)


def new_constant(near: ir.Node, name: str, array: Array) -> ir.Value:
    """An initializer of the graph of ``near``: the one of this name if it holds the same numbers, else a new one."""
    graph, free, number = graph_of(near), name, 1
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}
    while free in graph.initializers or free in ends:
        numbers = None if free in ends else constant_array(graph.initializers[free])
        if numbers is not None and np.array_equal(numbers, array):
            return graph.initializers[free]
        free, number = f"{name}_{number}", number + 1
    value = new_value(free, ir.DataType.from_numpy(array.dtype), array.shape)
    value.const_value = ir.tensor(array, name=free)
    graph.register_initializer(value)
    return value


def new_node(op: Op | str, inputs: Sequence[ir.Value | None], /, *outputs: ir.Value, **attributes: Any) -> ir.Node:
    """A node of a standard op (its type) or of one of ours."""
    domain, op_type, version = (DOMAIN, op.name, VERSION) if isinstance(op, Op) else ("", op, None)
    settings = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    name = f"{op_type}.{outputs[0].name}"
    return ir.Node(domain, op_type, inputs, settings, outputs=outputs, version=version, name=name)


def insert(
    before: ir.Node, op: Op | str, inputs: Sequence[ir.Value | None], /, *outputs: ir.Value, **attributes: Any
) -> ir.Value:
    """Insert a new node before another. -> its first output."""
    graph = graph_of(before)
    graph.insert_before(before, new_node(op, inputs, *outputs, **attributes))
    if isinstance(op, Op):
        graph.opset_imports.setdefault(DOMAIN, VERSION)
    return outputs[0]


def graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)  # functions are never rewritten
    return node.graph


def transposed(value: ir.Value, name: str, perm: tuple[int, ...]) -> ir.Value:
    """A new value for the output of a Transpose of ``value``."""
    output = new_value_like(value, name)
    output.shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in perm])
    return output


def transpose(before: ir.Node, value: ir.Value, name: str, perm: tuple[int, ...]) -> ir.Value:
    """Insert a Transpose of ``value``."""
    return insert(before, "Transpose", [value], transposed(value, name, perm), perm=perm)


def insert_channels_last(before: ir.Node, op: Op, inputs: Sequence[ir.Value], y: ir.Value, **attributes: Any) -> None:
    """Insert an op of ours that returns ``y`` with channels last, and the Transpose back to channels first."""
    last = insert(before, op, inputs, transposed(y, f"{y.name}_last", CHANNELS_LAST), **attributes)
    insert(before, "Transpose", [last], y, perm=CHANNELS_FIRST)


def is_transpose(node: ir.Node | None, perm: tuple[int, ...]) -> bool:
    """Whether ``node`` is a Transpose with this ``perm``."""
    if node is None or node.domain or node.op_type != "Transpose":
        return False
    return tuple(node.attributes.get_ints("perm", [])) == perm


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """The consumers of ``old`` read ``new``, which has its name."""
    if old.name == new.name:
        old.name = f"{old.name}_before"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def remove_dead(nodes: Iterable[ir.Node | None]) -> None:
    """Remove those of ``nodes`` whose outputs no node reads, then their producers under the same condition."""
    pending = present(nodes)
    while pending:
        node = pending.pop()
        if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        producers = [value.producer() for value in present(node.inputs)]
        graph_of(node).remove(node, safe=True)
        pending += present(producers)
