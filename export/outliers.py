"""Outliers in a float graph, measured as in Bondarenko et al. 2023 (arXiv 2306.12929), section 3.

Over all numbers of one sequence's tensor [T, d]: the infinity norm max|x|, and the kurtosis
mean((x - mean)^4) / (std^4 + 1e-6) with the unbiased std, 3 for a Gaussian; both averaged over sequences.

`tensors` finds the paper's tensors by the structure of the graph. Export feeds one row at a time, so there are no
padding tokens to leave out.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx

from calmclip.export.graph import PRODUCTS, constants, module_of, producers, tap
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array, Arrays

_SAME = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # the same numbers in other places
_ON_THE_WAY = (*_SAME, "Div", "Mul", "ScatterElements", "ScatterND")  # between a layer and the sum that reads it
_JOINS = ("Add", "Concat")
_WORST = 5


def tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor -> a readable name, in order of depth:

    blocks.3.mlp.down         the output of a layer that is added to a residual: feed-forward networks, attention's
                              out-projection, residual branches of convolutions
    blocks.3.mlp.down (sum)   that sum: the residual stream between blocks
    blocks.3.norm2            the output of a LayerNorm that reads such a sum
    norm_pre (input)          the input of a LayerNorm that is another sum or a concatenation: embeddings and their
                              positions, a class token and patches
    patch                     the output of the convolution that reads the pixels

    A layer has the name of its torch module, or of its node.
    """
    graph = _Graph(model)
    named: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[0] in graph.inputs:
            named.setdefault(node.output[0], _label(node))
        elif node.op_type == "Add" and all(name in graph.data for name in node.input):
            layers = {out: layer for name in node.input for out, layer in graph.layers(name).items()}
            named |= {out: _label(layer) for out, layer in layers.items()}
            if layers:
                named[node.output[0]] = f"{_label(layers[max(layers, key=graph.places.__getitem__)])} (sum)"
        elif node.op_type == "LayerNormalization":
            source = graph.source(node.input[0])
            joined = source in graph.joins and not graph.layers(source)
            if joined:
                named.setdefault(source, f"{_label(node)} (input)")
            if joined or source in named:  # else it belongs to a head behind an activation, or to q and k
                named[node.output[0]] = _label(node)
    uses = Counter(named.values())  # a module may be called more than once
    order = sorted(named, key=graph.places.__getitem__)
    return {name: named[name] if uses[named[name]] == 1 else f"{named[name]} at {name}" for name in order}


def measure(model: onnx.ModelProto, feeds: Iterable[Arrays]) -> dict[str, Any]:
    """For the report: ``tensors``, name -> [infinity norm, kurtosis] in order of depth; the largest and the mean of
    each over the tensors; ``worst``: the tensors of the highest kurtosis to two digits, of equals the first in the
    graph, because an outlier lives on in later tensors.

    ``feeds``: one row each; only one row is in memory. For a tensor without tokens (an expert's) the row is left out.
    Empty if the graph has no such tensors. Raises `ExportError` naming a tensor that holds NaN or infinity.
    """
    named = tensors(model)
    figures: dict[str, list[tuple[float, float]]] = {}
    inputs = 0
    if named:
        run = tap(model, [*named])
        for feed in feeds:
            inputs += 1
            for name, values in run(feed).items():
                if not np.isfinite(values).all():
                    raise ExportError(
                        f"{named[name]} holds NaN or infinity in the float graph; look at the checkpoint's weights, or "
                        "at the pictures or texts of the calibration"
                    )
                if values.size:
                    figures.setdefault(name, []).append((float(np.abs(values).max()), kurtosis(values)))
    if not figures:
        return {}
    means = {named[name]: np.mean(figures[name], axis=0) for name in named if name in figures}
    norms, peaks = np.array([*means.values()]).T
    worst = sorted(means, key=lambda name: -float(f"{means[name][1]:.2g}"))[:_WORST]
    return {
        "max_inf_norm": _short(norms.max()),
        "avg_inf_norm": _short(norms.mean()),
        "max_kurtosis": _short(peaks.max()),
        "avg_kurtosis": _short(peaks.mean()),
        "inputs": inputs,
        "worst": worst,
        "tensors": {name: [_short(value) for value in pair] for name, pair in means.items()},
    }


def kurtosis(values: Array) -> float:
    """Of all numbers of ``values``; 0 if they are all equal."""
    flat = values.reshape(-1).astype(np.float64)
    if flat.size < 2:
        return 0.0
    apart = flat - flat.mean()
    square = np.square(apart, out=apart)
    variance = square.sum() / (flat.size - 1)
    return float(np.mean(np.square(square)) / (variance**2 + 1e-6))


class _Graph:
    """``data``: tensors that depend on the inputs' values, not only on their shapes (as masks and positions do)."""

    def __init__(self, model: onnx.ModelProto) -> None:
        nodes = model.graph.node
        self.inputs = {value.name for value in model.graph.input}
        self.producer, self.constants = producers(nodes), constants(model)
        self.places = {name: place for place, node in enumerate(nodes) for name in node.output}
        self.joins = {node.output[0] for node in nodes if node.op_type in _JOINS}
        self.data = set(self.inputs)
        for node in nodes:
            if node.op_type != "Shape" and self.data & {*node.input}:
                self.data |= {*node.output}

    def source(self, name: str) -> str:
        """The first tensor that holds the same numbers."""
        while (node := self.producer.get(name)) and node.op_type in _SAME:
            name = node.input[0]
        return name

    def layers(self, name: str) -> dict[str, onnx.NodeProto]:
        """The layers (products with constant weights) whose outputs make up ``name``, at most scaled, gated or
        scattered: the output of each, with its bias -> its node."""
        node = self.producer.get(name)
        if node is None or name not in self.data:
            return {}
        if self._is_layer(node):
            return {name: node}
        if node.op_type == "Add":
            read = [source for source in node.input if source in self.data]
            below = self.producer.get(read[0])
            if len(read) > 1:
                return {}
            return {name: below} if below and self._is_layer(below) else self.layers(read[0])
        if node.op_type in _ON_THE_WAY:
            return {out: layer for source in node.input for out, layer in self.layers(source).items()}
        return {}

    def _is_layer(self, node: onnx.NodeProto) -> bool:
        return node.op_type in PRODUCTS and node.input[1] in self.constants


def _label(node: onnx.NodeProto) -> str:
    return module_of(node) or node.name


def _short(value: float) -> float:
    return float(f"{value:.6g}")
