"""What the rules of a quantized graph share: what QuantizeLinear and DequantizeLinear say, and who reads a value.

A quantized graph is one of standard ops, float between pairs of QuantizeLinear and DequantizeLinear; `_qdq` writes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnxscript import ir

from calmclip.export.rewrites import _patterns
from calmclip.models.flow import Array
from calmclip.models.ops.spec import DOMAIN, VERSION

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # channels last, and back


@dataclass(frozen=True)
class Eight:
    """A tensor in 8 bits: ``value`` = (``real`` / ``scale``) + ``zero``. ``nodes``: those between ``real`` and it."""

    real: ir.Value
    value: ir.Value
    scale: ir.Value
    zero: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def dtype(self) -> ir.DataType | None:
        return self.value.dtype or self.zero.dtype


def read(real: ir.Value | None, dtype: ir.DataType, weight: bool = False, axis: int = -1) -> Eight | None:
    """What ``real`` comes of, where that is 8 bits of ``dtype`` and one scale, or one for each place of ``axis``; of a
    ``weight`` along any axis."""
    node = maker(real, "DequantizeLinear")
    given = [] if node is None else whole(node.inputs)
    if node is None or real is None or len(given) != 3:
        return None
    value, scale, zero = given
    found = Eight(real, value, scale, zero, (node,))
    fits = _fits(real, scale) and (weight or _along(axis, node, value, scale))
    return found if (zero.dtype or value.dtype) == dtype and fits else None


def writer(eight: Eight) -> ir.Node | None:
    """The QuantizeLinear that writes ``eight`` in the steps that it is read in; in others it would be read as more."""
    node = maker(eight.value, "QuantizeLinear")
    steps = [] if node is None else whole(node.inputs[1:])
    return node if len(steps) == 2 and alike(steps[0], eight.scale) and alike(steps[1], eight.zero) else None


def alike(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether both are one value, or constants of the same numbers."""
    held = _patterns.array(one), _patterns.array(other)
    return one is other or (held[0] is not None and held[1] is not None and np.array_equal(*held))


def written(real: ir.Value, axis: int = -1) -> Eight | None:
    """The 8 bits that are all anybody reads of ``real``, in one scale or one for each place of ``axis``; divided column
    by column before that or not."""
    reader = only(real)
    return None if reader is None else _written(real, reader, axis)


def among(real: ir.Value) -> list[Eight]:
    """The same, of those of its readers that read it so."""
    return [found for use in real.uses() if (found := _written(real, use.node)) is not None]


def _written(real: ir.Value, reader: ir.Node | None, axis: int = -1) -> Eight | None:
    nodes: tuple[ir.Node, ...] = ()
    factor: Array | None = None
    if reader is not None and reader.op_type == "Mul":
        other = next((value for value in reader.inputs if value is not real), None)
        factor = _patterns.array(other)
        if factor is None or factor.ndim > 1 or factor.size not in (1, columns(real)) or not (factor > 0).all():
            return None
        nodes, reader = (reader,), only(reader.outputs[0])
    if reader is None or reader.domain or reader.op_type != "QuantizeLinear" or len(whole(reader.inputs)) != 3:
        return None
    value, (_, scale, zero) = reader.outputs[0], whole(reader.inputs)
    if zero.dtype != ir.DataType.UINT8 or not _fits(real, scale):
        return None
    if not _along(axis if factor is None else -1, reader, reader.inputs[0], scale):
        return None
    if factor is not None:
        steps, middle = _patterns.array(scale), _patterns.array(zero)
        if steps is None or middle is None:
            return None
        with np.errstate(over="ignore"):
            steps = (steps / factor).astype(np.float32)
        if not normal(steps):
            return None
        scale = constant(reader, f"{value.name}_steps", steps)
        zero = constant(reader, f"{value.name}_zeros", np.broadcast_to(middle, steps.shape).copy())
    return Eight(real, value, scale, zero, (*nodes, reader))


def _fits(real: ir.Value, scale: ir.Value) -> bool:
    """Whether the ops take it: float32, in steps that are positive and normal as far as they are seen."""
    steps = _patterns.array(scale)
    return {real.dtype, scale.dtype} <= {None, ir.DataType.FLOAT} and (steps is None or normal(steps))


def normal(steps: Array) -> bool:
    """Positive and no smaller than float32 holds in full, as the ops want their steps."""
    return bool((np.isfinite(steps) & (steps >= np.finfo(np.float32).tiny)).all())


def _along(axis: int, node: ir.Node, value: ir.Value | None, scale: ir.Value) -> bool:
    """One scale for all, or one for each place of ``axis``."""
    if scale.shape is None or len(scale.shape) == 0:
        return scale.shape is not None
    stated = node.attributes.get_int("axis", 1)
    rank = len(value.shape) if value is not None and value.shape is not None else 0
    return len(scale.shape) == 1 and (stated == axis or (rank > 0 and (stated - axis) % rank == 0))


def maker(value: ir.Value | None, *kinds: str, domain: str = "") -> ir.Node | None:
    """The node that makes ``value``, if it is of one of ``kinds``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == domain and node.op_type in kinds else None


def whole(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    """Those that are there."""
    return [value for value in values if value is not None]


def only(value: ir.Value) -> ir.Node | None:
    """Who reads ``value``, if it is read once, by a standard op, and is no output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not uses[0].node.domain and not value.is_graph_output() else None


def shape(value: ir.Value | None) -> tuple[int | str, ...] | None:
    """None where a dimension, or the rank, is unknown."""
    if value is None or value.shape is None:
        return None
    found = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return None if None in found else found  # type: ignore[return-value]


def columns(value: ir.Value) -> int | None:
    """Its last dimension, where that is known."""
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def constant(near: ir.Node, name: str, array: Array) -> ir.Value:
    """A new initializer of the graph that ``near`` lies in; where ``name`` is taken by the same numbers, that one."""
    graph = near.graph
    assert isinstance(graph, ir.Graph)
    free, number = name, 1
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}
    while free in graph.initializers or free in ends:
        held = None if free in ends else _patterns.array(graph.initializers[free])
        if held is not None and np.array_equal(held, array):
            return graph.initializers[free]
        free, number = f"{name}_{number}", number + 1
    made = ir.Value(
        name=free,
        const_value=ir.tensor(array, name=free),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    graph.register_initializer(made)
    return made


def insert(
    before: ir.Node,
    op: str,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, Any],
    outputs: Sequence[ir.Value],
    domain: str = DOMAIN,
) -> ir.Node:
    """A node before ``before`` that makes ``outputs``; they are new, and whoever it stands for is still to go."""
    settings = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    made = ir.Node(
        domain,
        op,
        inputs,
        settings,
        outputs=outputs,
        version=VERSION if domain else None,
        name=f"{op}.{outputs[0].name}",
    )
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(before, made)
    if domain:
        graph.opset_imports.setdefault(domain, VERSION)
    return made


def turned(before: ir.Node, value: ir.Value, name: str, perm: tuple[int, ...]) -> ir.Value:
    """``value``, of rank 4, with its axes in another order."""
    sizes = None if value.shape is None else ir.Shape([value.shape[axis] for axis in perm])
    made = ir.Value(name=name, shape=sizes, type=value.type)
    insert(before, "Transpose", [value], {"perm": perm}, [made], domain="")
    return made


def turns(node: ir.Node | None, perm: tuple[int, ...]) -> bool:
    """Whether it is the Transpose that does so."""
    if node is None or node.domain or node.op_type != "Transpose":
        return False
    return tuple(node.attributes.get_ints("perm", [])) == perm


def like(value: ir.Value, dtype: ir.DataType | None = None, name: str | None = None) -> ir.Value:
    """A new value that takes the place of ``value``: its name and shape, unless said otherwise."""
    return ir.Value(name=name or value.name, shape=value.shape, type=ir.TensorType(dtype) if dtype else value.type)


def put(old: ir.Value, new: ir.Value) -> None:
    """Whoever reads ``old`` reads ``new``, which has its name."""
    if old.name == new.name:
        old.name = f"{old.name}_before"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def sweep(graph: ir.Graph, seeds: Iterable[ir.Node]) -> None:
    """Remove ``seeds`` and what only they needed."""
    pending = list(seeds)
    while pending:
        node = pending.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        before = [value.producer() for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        pending += [one for one in before if one is not None]
