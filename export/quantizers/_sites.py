"""Which tensors of a float graph `paper` puts into 8 bits, read off the graph's structure: no net is known by name.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), section 5 and appendix C, and the authors' code. In the order of a
transformer:

    tables      constants with rows of their own that are added to activations, looked up (Gather), cut or whole
    sums        of tables and activations, class token included; of two activations (both residual sums)
    norms       what LayerNormalization answers
    linear      what a product with constants answers, behind its bias and its activation. Behind a Split each part,
                and the weights are as many tensors: q, k and v are one product in our graphs and three in the paper
    attention   q k^T before the mask; probabilities; their mixture of v
    inputs      whatever else such a product reads: a picture, a mixture behind its gate

In float stay the head, gates, biases, and what is added to q k^T. The head is every product that no residual sum
follows: the last product of a language model and what lies between it and the last block, a classifier, the projection
of an embedding. Where there is no residual sum it is the products that no other one follows.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

from calmclip.export.quantizers import _qdq

MOVES = (
    "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
ACTIVATIONS = ("Clip", "Elu", "Gelu", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh")
_GATING = ("Add", "Gemm", "MatMul", "Mul", "Relu", "Reshape", "Sigmoid", "Squeeze", "Transpose", "Unsqueeze")
_MASKING = ("Add", "Mul", "Where")  # between q k^T and its Softmax
_STRETCHING = ("Add", "Clip", "Mul", "Sub", "Where")  # between a Softmax and what is made of it
_COUNTING = ("Shape", "Size")  # tell of a tensor nothing that it holds
_STEPS = 4  # from a Softmax to where it is looked for

Place = tuple[str, int]  # a node's name, and which of its inputs


@dataclass(frozen=True)
class Sites:
    """Tensors: ``observed``, in the range they are seen to have, and ``chances``, between 0 and 1.

    Products: ``weights``, node -> outputs of each tensor that its constant holds; ``pairs``, of two activations;
    ``moved``, what one reads -> the tensor of the above whose numbers these are, moved. ``tables``: which nodes read
    one, and where.
    """

    observed: dict[str, None] = field(default_factory=dict)
    chances: dict[str, None] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pairs: dict[str, None] = field(default_factory=dict)
    moved: dict[Place, str] = field(default_factory=dict)
    tables: dict[Place, None] = field(default_factory=dict)


def sites(model: onnx.ModelProto, keep: Collection[str] = (), head: bool = False) -> Sites:
    """``keep``: names of nodes that stay in float beside the gates and, without ``head``, the head, whose answers
    are in float in any case."""
    graph, found = _Graph(model), Sites()
    products = [*_qdq.products(model), *_qdq.pairs(model)]
    body, out_of_it = graph.body(products), {*keep, *graph.gates()}
    beyond = graph.after(node.output[0] for node in products if node.name not in body)
    chosen = {node.name for node in products if head or node.name in body} - out_of_it

    def add(name: str) -> None:
        if name not in beyond:
            found.observed[name] = None

    for node in graph.nodes:
        out = node.output[0]
        if node.name in chosen and graph.is_pair(node):
            found.pairs[node.name] = None
            found.chances.update(dict.fromkeys(name for name in node.input if graph.chance(name)))
            add(out)
        elif node.name in chosen:
            parts = graph.parts(graph.answer(out), graph.outputs(node))
            found.weights[node.name] = tuple(parts.values())
            for name in parts:
                add(name)
        elif node.op_type == "LayerNormalization" and node.input[0] in graph.live:
            add(out)
        elif node.op_type == "Add" and out not in beyond and (graph.residual(node) or graph.tables(node)):
            found.tables.update(dict.fromkeys(graph.tables(node)))
            add(graph.whole(out))
    for node in graph.nodes:
        read = 2 if node.name in found.pairs else 1 if node.name in found.weights else 0
        for place, name in enumerate(node.input[:read]):
            source = graph.source(name, {*found.observed, *found.chances})
            if source is None:
                found.observed[name] = None
            elif source != name:
                found.moved[node.name, place] = source
    return found


class _Graph:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes, self.fixed = model.graph.node, _qdq.constants(model)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
        self.last = {name: rank - 1 for name, rank in ranks.items()}

    @cached_property
    def made(self) -> set[str]:
        """What comes of a product."""
        return self.after(node.output[0] for node in self.nodes if node.op_type in _qdq.PRODUCTS)

    @cached_property
    def live(self) -> set[str]:
        """Activations: what comes of a product or a looked-up table."""
        looked_up = (node.output[0] for node in self.nodes if node.op_type == "Gather" and self.table(node.input[0]))
        return self.made | self.after(looked_up)

    def after(self, names: Iterable[str]) -> set[str]:
        """``names`` and all that is computed of them."""
        found = set(names)
        for node in self.nodes:
            if node.op_type not in _COUNTING and found & {*node.input}:
                found |= {*node.output}
        return found

    def body(self, products: Collection[onnx.NodeProto]) -> set[str]:
        """The names of ``products`` that are not the head."""
        sums = [node for node in self.nodes if self.residual(node)]
        needed = {name for node in sums or products for name in node.input}
        for node in reversed(self.nodes):
            if needed & {*node.output}:
                needed |= {*node.input}
        return {node.name for node in products if node.output[0] in needed}

    def gates(self) -> set[str]:
        """The products that decide how much of its mixture a head answers."""
        found: set[str] = set()
        for node in self.nodes:
            if self.is_pair(node) and self.chance(node.input[0]):
                out = node.output[0]
                open_ = [n for one in self.readers.get(out, []) if one.op_type == "Mul" for n in one.input if n != out]
                while open_:
                    one = self.maker.get(open_.pop())
                    if one is not None and one.op_type in _GATING and self.live.isdisjoint(one.input[1:]):
                        found.add(one.name)
                        open_.append(one.input[0])
        return found

    def is_pair(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "MatMul" and not self.fixed.keys() & {*node.input}

    def chance(self, name: str) -> bool:
        """Whether ``name`` is what a Softmax answers, clipped or not."""
        return self._reaches(name, _STRETCHING, up=True)

    def masks(self, node: onnx.NodeProto) -> bool:
        """Whether what ``node`` answers goes to a Softmax."""
        return self._reaches(node.output[0], _MASKING, up=False)

    def _reaches(self, name: str, through: Collection[str], *, up: bool, steps: int = _STEPS) -> bool:
        nodes = [self.maker[name]] if up and name in self.maker else [] if up else self.readers.get(name, [])
        return any(
            node.op_type == "Softmax"
            or (
                steps > 0
                and node.op_type in through
                and any(
                    self._reaches(one, through, up=up, steps=steps - 1) for one in (node.input if up else node.output)
                )
            )
            for node in nodes
        )

    def residual(self, node: onnx.NodeProto) -> bool:
        return (
            node.op_type == "Add"
            and {*node.input} <= self.live
            and not self.made.isdisjoint(node.input)
            and not self.masks(node)
        )

    def tables(self, node: onnx.NodeProto) -> list[Place]:
        """Where the tables are read that the Add ``node`` adds to activations or to each other."""
        if self.masks(node):
            return []
        found = []
        for place, read in enumerate(node.input):
            name, reader, where = read, node, place
            while name in self.maker and self.maker[name].op_type in MOVES:
                reader, where = self.maker[name], 0
                name = reader.input[0]
            if self.table(name) and not self.live.isdisjoint(node.input):
                found.append((reader.name, where))
        return found

    def table(self, name: str) -> bool:
        """Whether ``name`` is a constant with rows of its own."""
        tensor = self.fixed.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
            return False
        return int(np.prod(tensor.dims[:-1])) > 1

    def whole(self, name: str) -> str:
        """The sum of which ``name`` is a part: a class token comes with its own position."""
        after = self.readers.get(name, [])
        return after[0].output[0] if [node.op_type for node in after] == ["Concat"] else name

    def answer(self, name: str) -> str:
        """A product's answer ``name`` behind its bias and its activation."""
        after = self.readers.get(name, [])
        if [node.op_type for node in after] == ["Add"] and self.biased(after[0]):
            name = after[0].output[0]
            after = self.readers.get(name, [])
        if len(after) == 1 and after[0].op_type in ACTIVATIONS and after[0].input[0] == name:
            return after[0].output[0]
        return next((node.output[0] for node in after if self.swish(node, name)), name)

    def biased(self, node: onnx.NodeProto) -> bool:
        return any(name in self.fixed and not self.table(name) for name in node.input)

    def swish(self, node: onnx.NodeProto, name: str) -> bool:
        """Whether ``node`` is x sigmoid(x) or x sigmoid(a x) of x = ``name``."""
        gate = next((self.maker.get(one) for one in node.input if one != name), None)
        if node.op_type != "Mul" or gate is None or gate.op_type != "Sigmoid":
            return False
        scaled = self.maker.get(gate.input[0])
        return gate.input[0] == name or (scaled is not None and scaled.op_type == "Mul" and name in scaled.input)

    def parts(self, name: str, outputs: int) -> dict[str, int]:
        """Of an answer that is split at once: part -> its outputs; of one that is not, itself."""
        after = self.readers.get(name, [])
        if [node.op_type for node in after] == ["Split"] and self.last.get(name) == _qdq.attribute(after[0], "axis"):
            (node,) = after
            if len(node.input) < 2:
                return dict.fromkeys(node.output, outputs // len(node.output))
            if node.input[1] in self.fixed:
                sizes = numpy_helper.to_array(self.fixed[node.input[1]]).tolist()
                return dict(zip(node.output, sizes, strict=True))
        return {name: outputs}

    def outputs(self, node: onnx.NodeProto) -> int:
        return int(self.fixed[node.input[1]].dims[_qdq.output_axis(node)])

    def source(self, name: str, known: Collection[str]) -> str | None:
        """The one of ``known`` whose numbers ``name`` holds, moved or not."""
        while name not in known:
            node = self.maker.get(name)
            if node is None or node.op_type not in MOVES:
                return None
            name = node.input[0]
        return name
