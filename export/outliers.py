"""Where outliers are in a float graph, as Bondarenko et al. 2023 (arXiv 2306.12929), section 3, measure them.

Of one sequence's tensor [T, d], all its numbers together: the infinity norm max|x|, and the kurtosis
mean((x - mean)^4) / (std^4 + 1e-6) with the unbiased std, 3 for a Gaussian; both averaged over sequences.

Looked at is what the paper looks at, found by how the graph is wired (`tensors`). Export feeds one row at a time, so
there is no padding whose tokens would have to be left out.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx

from calmclip.export.quantizers import _qdq
from calmclip.export.trace import module_of
from calmclip.models.errors import ExportError
from calmclip.models.flow import Array, Arrays

_SAME = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # the same numbers, elsewhere
_ON_THE_WAY = (*_SAME, "Div", "Mul", "ScatterElements", "ScatterND")  # from a layer to where its answer is added
_JOINS = ("Add", "Concat")
_WORST = 5


def tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor -> what a person calls it, in order of depth:

    blocks.3.mlp.down         what a layer answers that is added to what went around it: feed-forward networks,
                              attention's out-projection, residual branches of convolutions
    blocks.3.mlp.down (sum)   that sum: the stream between blocks
    blocks.3.norm2            what a LayerNorm answers that reads such a sum, or:
    norm_pre (input)          what a LayerNorm reads that was put together otherwise: embeddings and their positions,
                              a class token and patches
    patch                     what the convolution answers that reads the pixels

    A layer is called like its torch module, else like its node.
    """
    graph = _Graph(model)
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[0] in graph.inputs:
            found.setdefault(node.output[0], _called(node))
        elif node.op_type == "Add" and all(name in graph.data for name in node.input):
            layers = {out: layer for name in node.input for out, layer in graph.layers(name).items()}
            found |= {out: _called(layer) for out, layer in layers.items()}
            if layers:
                found[node.output[0]] = f"{_called(layers[max(layers, key=graph.places.__getitem__)])} (sum)"
        elif node.op_type == "LayerNormalization":
            source = graph.source(node.input[0])
            joined = graph.op(source) in _JOINS and not graph.layers(source)
            if joined:
                found.setdefault(source, f"{_called(node)} (input)")
            if joined or source in found:  # else it is a head's behind an activation, or of q and k
                found[node.output[0]] = _called(node)
    often = Counter(found.values())  # a module may be called more than once
    names = sorted(found, key=graph.places.__getitem__)
    return {name: found[name] if often[found[name]] == 1 else f"{found[name]} at {name}" for name in names}


def measure(model: onnx.ModelProto, feeds: Iterable[Arrays]) -> dict[str, Any]:
    """For the report: ``tensors``, name -> [infinity norm, kurtosis] in order of depth; the largest and the mean of
    each over the tensors; ``worst``: those of the highest kurtosis, of equals (to two digits) the first on the way, for
    an outlier lives on in what comes after.

    ``feeds``: one row each, of which only one is in memory. A tensor that got no tokens (an expert's) is left out for
    that row; empty where the graph has no such tensors. Raises `ExportError` naming a tensor that holds NaN or
    infinity.
    """
    named = tensors(model)
    seen: dict[str, list[tuple[float, float]]] = {}
    inputs = 0
    if named:
        run = _qdq.tap(model, [*named])
        for feed in feeds:
            inputs += 1
            for name, values in run(feed).items():
                if not np.isfinite(values).all():
                    raise ExportError(
                        f"{named[name]} holds NaN or infinity in the float graph; look at the checkpoint's weights, or "
                        "at the pictures or texts of the calibration"
                    )
                if values.size:
                    seen.setdefault(name, []).append((float(np.abs(values).max()), kurtosis(values)))
    if not seen:
        return {}
    found = {named[name]: np.mean(seen[name], axis=0) for name in named if name in seen}
    norms, peaks = np.array([*found.values()]).T
    worst = sorted(found, key=lambda name: -float(f"{found[name][1]:.2g}"))[:_WORST]
    return {
        "max_inf_norm": _short(norms.max()),
        "avg_inf_norm": _short(norms.mean()),
        "max_kurtosis": _short(peaks.max()),
        "avg_kurtosis": _short(peaks.mean()),
        "inputs": inputs,
        "worst": worst,
        "tensors": {name: [_short(value) for value in pair] for name, pair in found.items()},
    }


def kurtosis(values: Array) -> float:
    """Of all numbers of ``values``; 0 where they are all the same."""
    flat = values.reshape(-1).astype(np.float64)
    if flat.size < 2:
        return 0.0
    apart = flat - flat.mean()
    square = np.square(apart, out=apart)
    variance = square.sum() / (flat.size - 1)
    return float(np.mean(np.square(square)) / (variance**2 + 1e-6))


class _Graph:
    """``data``: tensors that depend on what is fed, and not on its shape alone (as masks and positions do)."""

    def __init__(self, model: onnx.ModelProto) -> None:
        nodes = model.graph.node
        self.inputs = {value.name for value in model.graph.input}
        self.made = {name: node for node in nodes for name in node.output}
        self.places = {name: place for place, node in enumerate(nodes) for name in node.output}
        self.fixed = {one.name for one in model.graph.initializer}
        self.data = set(self.inputs)
        for node in nodes:
            if node.op_type != "Shape" and self.data & {*node.input}:
                self.data |= {*node.output}

    def op(self, name: str) -> str:
        """Which makes the tensor; "" for an input or a constant."""
        return self.made[name].op_type if name in self.made else ""

    def source(self, name: str) -> str:
        """The tensor that holds the same numbers and came first."""
        while (node := self.made.get(name)) and node.op_type in _SAME:
            name = node.input[0]
        return name

    def layers(self, name: str) -> dict[str, onnx.NodeProto]:
        """The layers (products by constant weights) whose answers ``name`` is, scaled, gated or scattered at most:
        each one's answer, its bias in it -> its node."""
        node = self.made.get(name)
        if node is None or name not in self.data:
            return {}
        if self._is_layer(node):
            return {name: node}
        if node.op_type == "Add":
            read = [one for one in node.input if one in self.data]
            below = self.made.get(read[0])
            if len(read) > 1:
                return {}
            return {name: below} if below and self._is_layer(below) else self.layers(read[0])
        if node.op_type in _ON_THE_WAY:
            return {out: layer for one in node.input for out, layer in self.layers(one).items()}
        return {}

    def _is_layer(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _qdq.PRODUCTS and node.input[1] in self.fixed


def _called(node: onnx.NodeProto) -> str:
    return module_of(node) or node.name


def _short(value: float) -> float:
    return float(f"{value:.6g}")
