"""Where a graph gets bounds, and the graph with them.

Source: ProAct (code `hamidmousavi0/reliable-relu-toolbox`): one bound for each layer, one for each neuron in the last
activation layer.

A layer here is a product with constant weights, a normalization or a table, with the bias and the activation behind it.
A transformer's linear layers feed a residual stream, where a huge number stays until the end; so a layer without
activation has a bound too. An 8-bit tensor has none, because QuantizeLinear and the epilogues of our operators saturate
at 0 and 255, the ends of the calibrated range; neither has a tensor that only a QuantizeLinear reads.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto
from onnx.numpy_helper import to_array

from calmclip.export import light
from calmclip.export.graph import ACTIVATIONS, Draft, attribute, constants, node_of, producers, readers
from calmclip.export.resilience.forms import FORMS, HIGH, LOW, Bound, Names, guard

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # layers if one operand is constant and the other is not
_LAYERS = ("LayerNormalization", "QuantLayerNorm", "QuantLinearToFloat")
_CHANNELS_FIRST = ("Conv", "ConvTranspose")
_ELEMENTWISE = ("Add", "Cast", "Div", "Mul", "Sub")  # behind a layer, with constants: bias, scale, dequantization
_SATURATES = "QuantizeLinear"
# float first: the only type of a product's weights that gains, since int8 weights use all of their range
_STORED = (TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32)
_UNBOUNDED = ".unbounded"


@dataclass(frozen=True)
class Site:
    """The float tensor at the end of a layer. ``axis``: of its channels; ``active``: it is behind an activation."""

    tensor: str
    axis: int
    active: bool


def bounded(model: onnx.ModelProto) -> bool:
    """Whether `insert` or `stored` made the graph."""
    return any(tensor.name.endswith((LOW, HIGH)) for tensor in model.graph.initializer)


def sites(model: onnx.ModelProto) -> list[Site]:
    """The layers' ends in topological order."""
    chain = _Chain(model)
    ends: dict[str, Site] = {}
    for node in model.graph.node:
        if node.op_type in _LAYERS or chain.weighted(node) or chain.looks_up(node):
            for output in node.output:
                if site := chain.end(output, node):
                    ends.setdefault(site.tensor, site)
    order = {name: place for place, node in enumerate(model.graph.node) for name in node.output}
    return sorted(ends.values(), key=lambda site: order[site.tensor])


def by_neuron(model: onnx.ModelProto, places: Sequence[Site]) -> Site | None:
    """The site with a bound for each neuron: the last one behind an activation, which is in the last feed-forward
    network of a transformer. The activations of an INT8 graph are bytes, so there it is the last site."""
    bytewise = any(node.op_type == _SATURATES or node.op_type.startswith("Quant") for node in model.graph.node)
    active = [site for site in places if site.active and not bytewise]
    return next(iter([*reversed(active), *reversed(places)]), None)


def clips(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """The tensors that a Clip with constant limits makes -> these limits."""
    fixed = constants(model)
    return {
        node.output[0]: (float(to_array(fixed[node.input[1]])), float(to_array(fixed[node.input[2]])))
        for node in model.graph.node
        if node.op_type == "Clip" and len(node.input) == 3 and fixed.keys() >= {*node.input[1:]}
    }


def insert(
    model: onnx.ModelProto, bounds: Mapping[str, Bound], forms: Mapping[str, str], *, guarded: Collection[str] = ()
) -> onnx.ModelProto:
    """-> the graph with ``bounds``, by tensor. Inputs and outputs keep their names. ``forms``: by tensor, of `FORMS`;
    ``guarded``: the tensors in which NaN becomes 0 before the bound.

    A Clip with constant limits that makes the tensor takes the bounds in place, so it costs nothing.
    """
    draft = _draft(model)
    makers = producers(draft.nodes)
    added: dict[str, list[onnx.NodeProto]] = {}
    for tensor, bound in bounds.items():
        maker, form = makers[tensor], forms[tensor]
        names = Names(tensor + _UNBOUNDED, tensor, tensor + LOW, tensor + HIGH)
        draft.add(names.low, bound.low.astype(np.float32))
        draft.add(names.high, bound.high.astype(np.float32))
        if form == "clamp" and tensor not in guarded and _takes(maker, bound, draft):
            del maker.input[1:]
            maker.input.extend([names.low, names.high])
            continue
        maker.output[[*maker.output].index(tensor)] = names.source
        before: list[onnx.NodeProto] = []
        if tensor in guarded and form != "zero":
            before = guard(draft, names.source, names.inner("number"))
            names = Names(names.inner("number"), *(getattr(names, part) for part in ("target", "low", "high")))
        made = [*before, *FORMS[form](draft, names, bound)]
        for node in made:
            node.name = f"bound.{node.name}"  # the graph may have a node of that operator before this tensor
        added[maker.output[0]] = [*added.get(maker.output[0], ()), *made]
    draft.nodes = [each for node in draft.nodes for each in (node, *added.get(node.output[0], ()))]
    return draft.finish()


def stored(
    model: onnx.ModelProto, *, matrices: bool = True, among: Collection[str] | None = None
) -> tuple[onnx.ModelProto, int]:
    """-> the graph with every float constant, zero point and integer bias between the least and the greatest number of
    its tensor, and the count of these tensors. NaN becomes the middle. ``matrices``: also the weights of products.
    ``among``: the constants that count (default: all).

    The nodes read constants alone, so ONNX Runtime computes them when it loads the graph; no run pays for them. They
    bound what a flipped bit of the file does; a bit that flips in memory after that is for `insert`.
    """
    draft = _draft(model)
    read = {name for node in draft.nodes for name in node.input}
    read = {name for name in read if not name.endswith((LOW, HIGH)) and (among is None or name in among)}
    renamed, nodes = {}, []
    for name, tensor in [*draft.constants.items()]:
        kinds = _STORED if len(tensor.dims) < 2 else _STORED[:matrices]
        if name not in read or tensor.data_type not in kinds or not np.prod(tensor.dims):
            continue
        values, source = draft.array(name), name
        low, high = draft.add(name + LOW, values.min()), draft.add(name + HIGH, values.max())
        if tensor.data_type == TensorProto.FLOAT:
            source = f"{name}.number"
            middle = draft.add(f"{name}.middle", (values.min() + values.max()) / np.float32(2))
            nodes.append(node_of("IsNaN", [name], f"{name}.is_nan"))
            nodes.append(node_of("Where", [f"{name}.is_nan", middle, name], source))
        renamed[name] = f"{name}.bounded"
        nodes.append(node_of("Clip", [source, low, high], renamed[name]))
    for node in draft.nodes:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    draft.nodes = [*nodes, *draft.nodes]
    return draft.finish(), len(renamed)


def _draft(model: onnx.ModelProto) -> Draft:
    """With nodes of its own, which may change."""
    draft = Draft(model)
    for place, node in enumerate(draft.nodes):
        draft.nodes[place] = onnx.NodeProto()
        draft.nodes[place].CopyFrom(node)
    return draft


def _takes(maker: onnx.NodeProto, bound: Bound, draft: Draft) -> bool:
    limits = [*maker.input[1:]]
    return maker.op_type == "Clip" and bound.low.ndim == 0 and len(limits) == 2 and draft.constants.keys() >= {*limits}


class _Chain:
    """``fixed``: tensors that depend on constants alone; ``looked_up``: rows of constant tables."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.readers = readers(model.graph.node)
        self.outputs = {value.name for value in model.graph.output}
        self.fixed = {tensor.name for tensor in model.graph.initializer} | {""}
        self.looked_up: set[str] = set()
        for node in model.graph.node:
            if self.fixed >= {*node.input}:
                self.fixed |= {*node.output}
            elif self.looks_up(node) or (node.op_type in _ELEMENTWISE and self.fixed | self.looked_up >= {*node.input}):
                self.looked_up |= {*node.output}
        values = [*model.graph.output, *light.shapes(model)]
        self.floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}

    def weighted(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _WEIGHTED and len(self.fixed & {*node.input[:2]}) == 1

    def looks_up(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Gather" and node.input[0] in self.fixed and node.input[1] not in self.fixed

    def end(self, tensor: str, layer: onnx.NodeProto) -> Site | None:
        """The site of a layer's output; None if nothing reads it, if it is not float, or if it saturates."""
        active = layer.op_type == "QuantLinearToFloat" and attribute(layer, "activation") > 0
        while node := self._next(tensor):
            active |= node.op_type not in _ELEMENTWISE or self._gated(tensor) is not None
            tensor = node.output[0]
        reading = [node.op_type for node in self.readers.get(tensor, ())]
        used = tensor in self.outputs or any(kind != _SATURATES for kind in reading)
        if not (used and tensor in self.floats):
            return None
        return Site(tensor, 1 if layer.op_type in _CHANNELS_FIRST else -1, active)

    def _next(self, tensor: str) -> onnx.NodeProto | None:
        """The node that continues the layer: it alone reads ``tensor``, and otherwise constants or rows of tables."""
        if tensor in self.outputs:
            return None
        if gate := self._gated(tensor):
            return gate
        reading = {id(node): node for node in self.readers.get(tensor, ())}
        if len(reading) != 1:
            return None
        (node,) = reading.values()
        known = self.fixed | self.looked_up | {tensor}
        continues = node.op_type in ACTIVATIONS or (node.op_type in _ELEMENTWISE and known >= {*node.input})
        return node if continues else None

    def _gated(self, tensor: str) -> onnx.NodeProto | None:
        """x sigmoid(k x): the Mul; k may be 1."""
        reading = self.readers.get(tensor, [])
        if len(reading) != 2:
            return None
        scaled = [node.output[0] for node in reading if node.op_type == "Mul" and self.fixed & {*node.input}]
        gates = {
            node.output[0]
            for name in (tensor, *scaled)
            for node in self.readers.get(name, ())
            if node.op_type == "Sigmoid"
        }
        return next((node for node in reading if node.op_type == "Mul" and gates & {*node.input}), None)
