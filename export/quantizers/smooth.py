"""Static U8S8 after outliers were moved from activations into weights: for transformers and heads of mixed inputs.

Source: Xiao et al. 2022 (arXiv 2211.10438), "SmoothQuant", eq. 3-4: x W = (x / s) (s W) with
s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) for each input channel j of the products that read x. Cross-layer
equalization and bias correction: Nagel et al. 2019 (arXiv 1906.04721), sections 4.1 and 4.2.

A few channels of a transformer's activations are many times larger than the others, and one scale for all channels
leaves the others a handful of steps. The division is a separate Mul before the quantization. It is not folded into the
LayerNorm: it costs microseconds, works after any op and leaves residual branches alone. As in `static`, a row's answer
depends on that row alone.

Convolutions are quantized as by `static`. With ``channels``, the inputs of depthwise convolutions are equalized too
(`equalize`). That needs no outliers: channels that never mix can differ in size.

Ranges over the calibration feeds: (min, max) for inputs and outputs of convolutions, and for attention; (minima [C],
maxima [C]) for inputs of matrix products and for the tensors that `equalize` divides.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from pydantic import Field

from calmclip.export.graph import (
    ACTIVATIONS,
    Draft,
    attribute,
    depthwise,
    matrices,
    node_of,
    producers,
    products,
)  # fmt: skip
from calmclip.export.matching.attention import fused
from calmclip.export.qdq import quantized_tensors, write_pairs
from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges
from calmclip.export.quantizers.attention import normalize_by_row_max
from calmclip.export.quantizers.packing import pack
from calmclip.export.quantizers.ranges import Observed, collect, extremes, reduced, widest
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array

_HEADROOM = 1.25  # calibration sees few values of a single channel, so a range is widened


class Params(FrozenModel):
    """By tensor (inputs of products): ``alphas`` replace ``alpha``, None for no division; ``clips`` replace the
    extremes, after the division. By node: ``shifts`` are added to its output channels."""

    alpha: float | None = Field(default=0.75, ge=0.0, le=1.0)
    alphas: dict[str, float | None] = Field(default_factory=dict)
    clips: dict[str, tuple[float, float]] = Field(default_factory=dict)
    shifts: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    attention: tuple[str, ...] = ()  # names of products of two activations that are quantized too
    channels: bool = False  # equalize the channels of the inputs of depthwise convolutions
    keep: tuple[str, ...] = ()  # names of nodes that stay in float
    reduce_range: bool = False  # 7-bit weights; see `static`


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Observed[tuple[Any, Any]]:
    axes = dict.fromkeys((node.input[0] for node in matrices(model)), -1)
    if params.channels:
        axes |= dict.fromkeys(equalizable(model, params.keep), 1)

    def limits(name: str, values: Array) -> tuple[Array, Array]:
        return extremes(values, axes.get(name))

    by_tensor = collect(model, feeds, quantized_tensors(model, params.attention), limits)
    return reduced(by_tensor, widest)


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = Draft(model)
    pack(draft)
    alphas = {name: params.alphas.get(name, params.alpha) for name in ranges}
    limits = smooth(draft, ranges, alphas, params.keep)
    clips = {equalized(name) if equalized(name) in limits else name: clip for name, clip in params.clips.items()}
    mixtures = fused(model, params.attention)
    normalized = normalize_by_row_max(draft, mixtures)
    inner, divisors = equalize(draft, ranges, params.keep) if params.channels else ({}, {})
    shifts = {node: np.divide(shift, divisors.get(node, 1.0)).tolist() for node, shift in params.shifts.items()}
    limits |= clips | normalized | inner
    write_pairs(
        draft,
        limits,
        params.keep,
        reduce_range=params.reduce_range,
        attention=params.attention,
        mixtures={*mixtures.values()},
        shifts=shifts,
    )
    return draft.finish()


def smooth(
    draft: Draft, ranges: Ranges, alphas: Mapping[str, float | None], keep: Collection[str] = ()
) -> dict[str, tuple[float, float]]:
    """Equalize the input channels of the products of ``draft``, which stays the same function; -> the ranges of their
    new inputs. ``alphas``: tensor -> how much of its outliers moves. Products that read one tensor share its division.
    """
    limits = {name: (float(np.min(low)), float(np.max(high))) for name, (low, high) in ranges.items()}
    groups: dict[str, list[str]] = {}
    for node in matrices(draft, keep):
        groups.setdefault(node.input[0], []).append(node.name)
    chosen = {name: group for group in groups.values() for name in group}
    nodes: list[onnx.NodeProto] = []
    divisors: dict[str, Array] = {}
    for original in draft.nodes:
        source = original.input[0] if original.name in chosen else ""
        alpha = alphas[source] if source else None
        if alpha is None or np.ndim(ranges[source][0]) == 0:
            nodes.append(original)
            continue
        if source not in divisors:
            low, high = (np.asarray(bound, np.float64) for bound in ranges[source])
            group = [node for node in draft.nodes if node.name in groups[source]]
            largest = np.max([np.abs(rows(draft, node)).max(axis=1) for node in group], axis=0)
            divisor = divisors[source] = factors(np.maximum(np.abs(low), np.abs(high)), largest, alpha)
            gain = draft.add(f"{source}_gain", (1 / divisor).astype(np.float32))
            nodes.append(node_of("Mul", [source, gain], equalized(source)))
            limits[equalized(source)] = float((low / divisor).min()), float((high / divisor).max())
        node = deepcopy(original)
        scaled = (rows(draft, node) * divisors[source][:, None]).astype(np.float32)
        node.input[0] = equalized(source)
        node.input[1] = draft.add(f"{node.output[0]}_weight", scaled.T if attribute(node, "transB") else scaled)
        nodes.append(node)
    draft.nodes = nodes
    return limits


def equalizable(model: onnx.ModelProto | Draft, keep: Collection[str] = ()) -> list[str]:
    """The tensors that depthwise convolutions read and that no other product with a constant reads."""
    convolutions = depthwise(model, keep)
    names = {node.name for node in convolutions}
    others = {node.input[0] for node in products(model, keep) if node.name not in names}
    return [name for name in dict.fromkeys(node.input[0] for node in convolutions) if name not in others]


def equalize(
    draft: Draft, ranges: Ranges, keep: Collection[str] = ()
) -> tuple[dict[str, tuple[float, float]], dict[str, Array]]:
    """Divide the `equalizable` tensors of ``draft`` by the largest magnitude of each channel; the graph stays the same
    function. -> the ranges of the divided tensors, and by node the factors [C] that its output was divided by.

    The division goes into the convolution that computes the tensor, also through a Relu; otherwise it is a Mul. The
    weights of the depthwise convolutions undo it. For other readers of a convolution's output, a Mul undoes it.

    A convolution's output behind another function than Relu is left out. Without a Mul behind it, such a function is a
    table of bytes (`rewrites.quant_lookup`); and no channel goes beyond the bound of a cut.
    """
    convolutions = {node.output[0] for node in products(draft, keep) if node.op_type == "Conv"}
    inputs = {node.name: node.input[0] for node in depthwise(draft, keep)}
    spatial = {node.input[0]: len(draft.constants[node.input[1]].dims) - 2 for node in depthwise(draft, keep)}
    producer = producers(draft.nodes)
    reads = Counter(name for node in draft.nodes for name in node.input)
    reads.update(draft.outputs)
    divisors: dict[str, Array] = {}  # by tensor that a depthwise convolution reads
    outputs: dict[str, Array] = {}  # by output of a convolution, before a Relu
    folded: set[str] = set()  # tensors whose division goes into a convolution
    for name in equalizable(draft, keep):
        source, node = name, producer.get(name)
        if node is not None and node.op_type in ACTIVATIONS and node.input[0] in convolutions:
            source = node.input[0]
            if node.op_type != "Relu" or reads[source] > 1:
                continue
        largest = np.max(np.abs(ranges[name]), axis=0)
        divisors[name] = factors(largest, np.ones(len(largest)), 1.0)
        if source in convolutions:
            outputs[source] = divisors[name]
            folded.add(name)
    reads.subtract(inputs.values())
    nodes: list[onnx.NodeProto] = []
    divided: dict[str, Array] = {}
    computed = set(folded)  # divided tensors that need no Mul, or have one

    def multiply(source: str, to: str, factor: Array, sides: int) -> None:
        gain = draft.add(f"{to}_gain", factor.astype(np.float32).reshape(-1, *[1] * sides))
        nodes.append(node_of("Mul", [source, gain], to))

    for original in draft.nodes:
        node, out = deepcopy(original), original.output[0]
        if (name := inputs.get(node.name, "")) in divisors:
            if name not in computed:
                multiply(name, equalized(name), 1 / divisors[name], spatial[name])
                computed.add(name)
            node.input[0] = equalized(name)
        if name in divisors or out in outputs:
            _rescale(draft, node, divisors.get(name), outputs.get(out))
        if out in outputs:
            divided[node.name] = outputs[out]
        elif out in folded:
            node.input[0] = equalized(node.input[0])
        if out in outputs or out in folded:
            node.output[0] = equalized(out)
        nodes.append(node)
        if out in folded and reads[out]:
            multiply(equalized(out), out, divisors[out], spatial[out])
    draft.nodes = nodes
    bounds = {n: [_HEADROOM * np.asarray(bound) / divisor for bound in ranges[n]] for n, divisor in divisors.items()}
    return {equalized(name): (float(low.min()), float(high.max())) for name, (low, high) in bounds.items()}, divided


def _rescale(draft: Draft, node: onnx.NodeProto, input_: Array | None, output: Array | None) -> None:
    """Adapt the convolution ``node`` to its input divided by ``input_`` [C] and its output by ``output`` [C]."""
    weight, name = draft.array(node.input[1]), node.output[0]
    factor = np.ones(len(weight)) if input_ is None else np.repeat(input_, len(weight) // len(input_))
    factor = factor if output is None else factor / output
    scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    node.input[1] = draft.add(f"{name}_weight", scaled.astype(np.float32))
    if output is not None and len(node.input) > 2 and node.input[2]:
        node.input[2] = draft.add(f"{name}_bias", (draft.array(node.input[2]) / output).astype(np.float32))


def equalized(name: str) -> str:
    """The name of a tensor after its division."""
    return f"{name}_even"


def factors(activation: Array, weight: Array, alpha: float) -> Array:
    """Largest magnitudes per input channel [C] -> s [C], geometric mean 1."""
    scale = np.maximum(activation, 1e-5) ** alpha / np.maximum(weight, 1e-5) ** (1 - alpha)
    return np.asarray(scale / np.exp(np.log(scale).mean()))


def rows(draft: Draft, node: onnx.NodeProto) -> Array:
    """The weight of a matrix product as [inputs, outputs]."""
    matrix = draft.array(node.input[1])
    return matrix.T if attribute(node, "transB") else matrix


QUANTIZERS.register("smooth")(Quantizer(Params, quantize, observe))
