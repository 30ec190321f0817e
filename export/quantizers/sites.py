"""The tensors of a float graph that `paper` quantizes, found by the graph's structure and by no net's name.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5 and appendix C, and the authors' code. In the order of a
transformer:

    tables      constants with several rows that are added to activations, by Gather, as a slice, or directly
    sums        of tables and activations, class token included; of two activations (both residual sums)
    norms       the output of LayerNormalization
    linear      the output of a product with constants, after its bias and its activation. After a Split, each part;
                its weights are then as many tensors: q, k and v are one product in these graphs and three in the paper
    qkv         such an output that attention reads
    scores, probabilities, mixtures  of attention: q k^T before the mask; its Softmax; the mixture of v
    inputs      every other input of such a product: a picture, a mixture behind its gate

The head, gates, biases and what is added to q k^T stay in float. The head is every product that no residual sum
follows: the last product of a language model and everything between it and the last block, a classifier, the projection
of an embedding. In a graph without residual sums, the head is the products that no other product follows.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper

from calmclip.export.graph import (
    ACTIVATIONS,
    PRODUCTS,
    activation_products,
    attribute,
    constants,
    output_axis,
    producers,
    products,
    readers,
)  # fmt: skip

MOVES = (
    "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
_GATING = (
    "Add", "Div", "Gemm", "MatMul", "Mul", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Sigmoid", "Squeeze",
    "Transpose", "Unsqueeze",
)  # fmt: skip
_MASKING = ("Add", "Mul", "Where")  # between q k^T and its Softmax
_STRETCHING = ("Add", "Clip", "Mul", "Sub", "Where")  # between a Softmax and the probabilities that are read
_COUNTING = ("Shape", "Size")  # their outputs do not depend on a tensor's values
_STEPS = 4  # how many nodes away a Softmax is looked for

Place = tuple[str, int]  # a node's name, and the index of one of its inputs
Kind = Literal[
    "weights", "tables", "sums", "norms", "linear", "qkv", "scores", "probabilities", "mixtures", "inputs"
]  # of what is quantized


@dataclass(frozen=True)
class Sites:
    """Tensors with their kinds: ``observed``, whose ranges come from calibration, and ``probabilities``, whose range is
    0 to 1.

    Products: ``weights``, node -> outputs of each tensor that its constant holds; ``activation_products``; ``moved``,
    an input of a product -> the tensor of the above that holds the same numbers elsewhere. ``tables``: the nodes and
    inputs that read a table.
    """

    observed: dict[str, Kind] = field(default_factory=dict)
    probabilities: dict[str, Kind] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    activation_products: dict[str, None] = field(default_factory=dict)
    moved: dict[Place, str] = field(default_factory=dict)
    tables: dict[Place, None] = field(default_factory=dict)

    def without(self, kinds: Collection[Kind]) -> "Sites":
        """The same without tensors of these kinds, which then stay in float."""
        observed = {name: kind for name, kind in self.observed.items() if kind not in kinds}
        probabilities = {} if "probabilities" in kinds else self.probabilities
        return replace(
            self,
            observed=observed,
            probabilities=probabilities,
            weights={} if "weights" in kinds else self.weights,
            tables={} if "tables" in kinds else self.tables,
            moved={place: site for place, site in self.moved.items() if site in observed or site in probabilities},
        )


def find_sites(model: onnx.ModelProto, keep: Collection[str] = (), head: bool = False) -> Sites:
    """``keep``: names of nodes that stay in float. Gates also stay in float, and so does the head without ``head``; the
    head's outputs always do."""
    graph, sites = _Graph(model), Sites()
    candidates = [*products(model), *activation_products(model)]
    body, excluded = graph.body(candidates), {*keep, *graph.gates()}
    beyond = graph.after(node.output[0] for node in candidates if node.name not in body)
    chosen = {node.name for node in candidates if head or node.name in body} - excluded

    def add(name: str, kind: Kind) -> None:
        if name not in beyond:
            sites.observed[name] = kind

    for node in graph.nodes:
        out = node.output[0]
        if node.name in chosen and graph.is_activation_product(node):
            sites.activation_products[node.name] = None
            probabilities: dict[str, Kind] = {n: "probabilities" for n in node.input if graph.is_probability(n)}
            sites.probabilities.update(probabilities)
            add(out, "mixtures" if probabilities else "scores")
        elif node.name in chosen:
            outputs = graph.constants[node.input[1]].dims[output_axis(node)]
            parts = graph.parts(graph.product_output(out), outputs)
            sites.weights[node.name] = tuple(parts.values())
            for name in parts:
                add(name, "linear")
        elif node.op_type == "LayerNormalization" and node.input[0] in graph.activations:
            add(out, "norms")
        elif node.op_type == "Add" and out not in beyond and (graph.is_residual(node) or graph.tables(node)):
            sites.tables.update(dict.fromkeys(graph.tables(node)))
            add(graph.full_sum(out), "sums")
    for node in graph.nodes:
        inputs = 2 if node.name in sites.activation_products else 1 if node.name in sites.weights else 0
        for place, name in enumerate(node.input[:inputs]):
            source = graph.source(name, {*sites.observed, *sites.probabilities})
            if source is None:
                sites.observed[name] = "inputs"
                continue
            if source != name:
                sites.moved[node.name, place] = source
            if node.name in sites.activation_products and sites.observed.get(source) == "linear":
                sites.observed[source] = "qkv"
    return sites


class _Graph:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes, self.constants = model.graph.node, constants(model)
        self.producer, self.readers = producers(self.nodes), readers(self.nodes)
        ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
        self.last_axis = {name: rank - 1 for name, rank in ranks.items()}

    @cached_property
    def products(self) -> set[str]:
        """Tensors that depend on a product."""
        return self.after(node.output[0] for node in self.nodes if node.op_type in PRODUCTS)

    @cached_property
    def activations(self) -> set[str]:
        """Tensors that depend on a product or on a lookup in a table."""
        lookups = (node.output[0] for node in self.nodes if node.op_type == "Gather" and self.is_table(node.input[0]))
        return self.products | self.after(lookups)

    def after(self, names: Iterable[str]) -> set[str]:
        """``names`` and all tensors that depend on them."""
        reached = set(names)
        for node in self.nodes:
            if node.op_type not in _COUNTING and reached & {*node.input}:
                reached |= {*node.output}
        return reached

    def body(self, candidates: Collection[onnx.NodeProto]) -> set[str]:
        """The names of the products that are not the head."""
        sums = [node for node in self.nodes if self.is_residual(node)]
        needed = {name for node in sums or candidates for name in node.input}
        for node in reversed(self.nodes):
            if needed & {*node.output}:
                needed |= {*node.input}
        return {node.name for node in candidates if node.output[0] in needed}

    def gates(self) -> set[str]:
        """The products that compute how much of its mixture a head passes on."""
        gates: set[str] = set()
        for node in self.nodes:
            if self.is_activation_product(node) and self.is_probability(node.input[0]):
                out = node.output[0]
                multiplied = (reader for reader in self.readers.get(out, []) if reader.op_type == "Mul")
                names = [name for reader in multiplied for name in reader.input if name != out]
                while names:
                    gate = self.producer.get(names.pop())
                    if gate and gate.op_type in _GATING and self.activations.isdisjoint(gate.input[1:]):
                        gates.add(gate.name)
                        names.append(gate.input[0])
        return gates

    def is_activation_product(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "MatMul" and not self.constants.keys() & {*node.input}

    def is_probability(self, name: str) -> bool:
        """Whether ``name`` is the output of a Softmax, clipped or not."""
        return self._reaches(name, _STRETCHING, up=True)

    def leads_to_softmax(self, node: onnx.NodeProto) -> bool:
        """Whether the output of ``node`` goes to a Softmax."""
        return self._reaches(node.output[0], _MASKING, up=False)

    def _reaches(self, name: str, through: Collection[str], *, up: bool, steps: int = _STEPS) -> bool:
        nodes = [self.producer[name]] if up and name in self.producer else [] if up else self.readers.get(name, [])
        if any(node.op_type == "Softmax" for node in nodes):
            return True
        names = (other for node in nodes if node.op_type in through for other in (node.input if up else node.output))
        return steps > 0 and any(self._reaches(other, through, up=up, steps=steps - 1) for other in names)

    def is_residual(self, node: onnx.NodeProto) -> bool:
        is_sum = node.op_type == "Add" and {*node.input} <= self.activations
        return is_sum and not self.products.isdisjoint(node.input) and not self.leads_to_softmax(node)

    def tables(self, node: onnx.NodeProto) -> list[Place]:
        """The reads of the tables that the Add ``node`` adds to activations or to each other."""
        places: list[Place] = []
        if self.leads_to_softmax(node) or self.activations.isdisjoint(node.input):
            return places
        for index, read in enumerate(node.input):
            name, reader, place = read, node, index
            while name in self.producer and self.producer[name].op_type in MOVES:
                reader, place = self.producer[name], 0
                name = reader.input[0]
            if self.is_table(name):
                places.append((reader.name, place))
        return places

    def is_table(self, name: str) -> bool:
        """Whether ``name`` is a constant with several rows."""
        tensor = self.constants.get(name)
        return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and int(np.prod(tensor.dims[:-1])) > 1

    def full_sum(self, name: str) -> str:
        """The sum that ``name`` is a part of: a class token has its own position, and is concatenated."""
        after = self.readers.get(name, [])
        return after[0].output[0] if [node.op_type for node in after] == ["Concat"] else name

    def product_output(self, name: str) -> str:
        """The output ``name`` of a product, after its bias and its activation."""
        after = self.readers.get(name, [])
        if [node.op_type for node in after] == ["Add"] and any(
            constant in self.constants and not self.is_table(constant) for constant in after[0].input
        ):
            name = after[0].output[0]
            after = self.readers.get(name, [])
        if len(after) == 1 and after[0].op_type in ACTIVATIONS and after[0].input[0] == name:
            return str(after[0].output[0])
        return next((node.output[0] for node in after if self.is_swish(node, name)), name)

    def is_swish(self, node: onnx.NodeProto, name: str) -> bool:
        """Whether ``node`` is x sigmoid(x) or x sigmoid(a x) of x = ``name``."""
        gate = next((self.producer.get(other) for other in node.input if other != name), None)
        if node.op_type != "Mul" or gate is None or gate.op_type != "Sigmoid":
            return False
        scaled = self.producer.get(gate.input[0])
        return gate.input[0] == name or (scaled is not None and scaled.op_type == "Mul" and name in scaled.input)

    def parts(self, name: str, outputs: int) -> dict[str, int]:
        """Part -> its number of outputs, if a Split reads ``name``; else ``name`` itself."""
        after = self.readers.get(name, [])
        if [node.op_type for node in after] == ["Split"] and self.last_axis.get(name) == attribute(after[0], "axis"):
            (node,) = after
            if len(node.input) < 2:
                return dict.fromkeys(node.output, outputs // len(node.output))
            if node.input[1] in self.constants:
                sizes = numpy_helper.to_array(self.constants[node.input[1]]).tolist()
                return dict(zip(node.output, sizes, strict=True))
        return {name: outputs}

    def source(self, name: str, known: Collection[str]) -> str | None:
        """The tensor of ``known`` that holds the numbers of ``name``, moved or not; None if there is none."""
        while name not in known:
            node = self.producer.get(name)
            if node is None or node.op_type not in MOVES:
                return None
            name = node.input[0]
        return name
