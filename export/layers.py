"""A graph in float and in INT8 at work, side by side: what each product loses, and why one stays in float."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from calmclip.export import parity
from calmclip.export.quantizers import _qdq
from calmclip.export.share import count
from calmclip.models.flow import Arrays


def compare(
    model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Iterable[Arrays], dims: Mapping[str, int]
) -> dict[str, Any]:
    """``sqnr_db``: node -> of its output, float against INT8 with all that came before (10 log10 of squared float over
    squared difference, all feeds together), for each product that runs in INT8. Where tokens are routed, an expert is
    left out for a feed that sends it none, or other tokens in INT8; a convolution is whose answer is nowhere as it was,
    for depthwise ones alone read it and its channels were made even."""
    whole = {one.name for one in count(quantized, dims) if one.int8}
    there = {name for node in quantized.graph.node for name in node.output if name}
    after = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type in _qdq.CUTS}
    outputs = {}
    for node in model.graph.node:
        if node.name in whole:
            out = node.output[0]
            cut = after.get(out, "")
            options = ((cut, f"{cut}{_qdq.BACK}"), (out, f"{out}{_qdq.BACK}"), (out, out), (cut, cut))
            if found := next((pair for pair in options if pair[1] in there), None):
                outputs[node.name] = found
    taken, answered = ([*dict.fromkeys(pair[side] for pair in outputs.values())] for side in (0, 1))
    squares: dict[str, list[float]] = {}
    for feed in feeds:  # opened anew for each: both at once, with all that is tapped, are too much of a large net
        true = _qdq.tap(model, taken)(feed)
        other = _qdq.tap(quantized, answered)(feed)
        for name, (left, right) in outputs.items():
            if true[left].size and true[left].shape == other[right].shape:
                pair = squares.setdefault(name, [0.0, 0.0])
                pair[0] += float(np.square(true[left], dtype=np.float64).sum())
                pair[1] += float(np.square(true[left].astype(np.float64) - other[right]).sum())
    return {"sqnr_db": {name: parity.decibels(*squares[name]) for name in outputs if name in squares}}


def ranges(quantized: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Tensor -> the least and the largest number that its 8 bits hold, as the graph's own steps say."""
    fixed = _qdq.constants(quantized)
    found = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            step, zero = (numpy_helper.to_array(fixed[name]) for name in node.input[1:3])
            limits = np.iinfo(zero.dtype)
            low, high = (float(step) * (bound - int(zero)) for bound in (limits.min, limits.max))
            found[node.input[0]] = float(f"{low:.6g}"), float(f"{high:.6g}")
    return found


def in_float(
    model: onnx.ModelProto, quantized: onnx.ModelProto, dims: Mapping[str, int], asked: Iterable[str]
) -> dict[str, str]:
    """Node -> why its product is left in float; ``asked``: those that the recipe or the net keeps."""
    whole = {one.name for one in count(quantized, dims) if one.int8}
    mixers = _qdq.probabilities(model.graph.node)
    possible = {node.name for node in _qdq.products(model)}
    pairs, asked = {node.name for node in _qdq.pairs(model)}, set(asked)
    reasons = {}
    for node in model.graph.node:
        if node.op_type not in _qdq.PRODUCTS or node.name in whole:
            continue
        if node.name in asked:
            reasons[node.name] = "asked for"
        elif node.name in possible:
            reasons[node.name] = "its quantizer leaves it in float"
        elif node.name in pairs:
            reasons[node.name] = "a product of two activations"
        elif node.input[0] in mixers:
            reasons[node.name] = "reads probabilities; its weights are stored in int8"
        else:
            reasons[node.name] = "no form that is quantized"
    return reasons
