"""Compare a graph in float and in INT8, product by product: the loss of each, and the reason for each one in float."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from calmclip.export import parity
from calmclip.export.coverage import count
from calmclip.export.graph import PRODUCTS, activation_products, constants, probabilities, products, tap
from calmclip.export.qdq import BACK, CUTS
from calmclip.models.flow import Arrays


def compare(
    model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Iterable[Arrays], dims: Mapping[str, int]
) -> dict[str, Any]:
    """``sqnr_db``: node -> 10 log10(sum float^2 / sum (float - INT8)^2) of its output over all feeds, for each product
    in INT8. The INT8 output includes the errors of the nodes before it.

    Two products are left out: an expert of a mixture, for a feed that routes no tokens or other tokens to it; and a
    convolution whose output has no tensor to compare, because its channels were equalized for depthwise readers.
    """
    int8 = {product.name for product in count(quantized, dims) if product.int8}
    computed = {name for node in quantized.graph.node for name in node.output if name}
    cuts = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type in CUTS}
    outputs = {}
    for node in model.graph.node:
        if node.name in int8:
            out = node.output[0]
            cut = cuts.get(out, "")
            options = ((cut, f"{cut}{BACK}"), (out, f"{out}{BACK}"), (out, out), (cut, cut))
            if pair := next((pair for pair in options if pair[1] in computed), None):
                outputs[node.name] = pair
    sides = [[*dict.fromkeys(pair[side] for pair in outputs.values())] for side in (0, 1)]
    squares: dict[str, list[float]] = {}
    for feed in feeds:  # sessions are opened for each feed: two tapped sessions of a large net do not fit in memory
        true, rounded = tap(model, sides[0])(feed), tap(quantized, sides[1])(feed)
        for name, (left, right) in outputs.items():
            if true[left].size and true[left].shape == rounded[right].shape:
                sums = squares.setdefault(name, [0.0, 0.0])
                sums[0] += float(np.square(true[left], dtype=np.float64).sum())
                sums[1] += float(np.square(true[left].astype(np.float64) - rounded[right]).sum())
    return {"sqnr_db": {name: parity.decibels(*squares[name]) for name in outputs if name in squares}}


def ranges(quantized: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Tensor -> the smallest and the largest number that its 8 bits hold, by the graph's scales and zero points."""
    fixed = constants(quantized)
    limits = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = (numpy_helper.to_array(fixed[name]) for name in node.input[1:3])
            grid = np.iinfo(zero.dtype)
            low, high = (float(scale) * (bound - int(zero)) for bound in (grid.min, grid.max))
            limits[node.input[0]] = float(f"{low:.6g}"), float(f"{high:.6g}")
    return limits


def in_float(
    model: onnx.ModelProto, quantized: onnx.ModelProto, dims: Mapping[str, int], keep: Iterable[str]
) -> dict[str, str]:
    """Node -> why its product stays in float; ``keep``: the nodes that the recipe or the net keeps in float."""
    int8 = {product.name for product in count(quantized, dims) if product.int8}
    mixers = probabilities(model.graph.node)
    possible = {node.name for node in products(model)}
    attention, keep = {node.name for node in activation_products(model)}, set(keep)
    reasons = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or node.name in int8:
            continue
        if node.name in keep:
            reasons[node.name] = "asked for"
        elif node.name in possible:
            reasons[node.name] = "its quantizer leaves it in float"
        elif node.name in attention:
            reasons[node.name] = "a product of two activations"
        elif node.input[0] in mixers:
            reasons[node.name] = "reads probabilities; its weights are stored in int8"
        else:
            reasons[node.name] = "no form that is quantized"
    return reasons
