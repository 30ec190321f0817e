"""Static U8S8 after outliers were moved from activations into weights: for transformers and heads of mixed inputs.

Source: Xiao et al. 2022 (arXiv 2211.10438), "SmoothQuant", eq. 3-4: x W = (x / s) (s W) with
s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) for each input channel j of the products that read x. Bias correction: Nagel
et al. 2019 (arXiv 1906.04721), section 4.2.

A few channels of a transformer's activations are many times larger than the rest, and one scale for all of them
leaves the rest a handful of steps. The division is a Mul of its own before the quantization, not folded into the
LayerNorm: it costs microseconds, works behind any op and leaves residual branches alone. As in `static`, a row's
answer depends on that row alone.

Convolutions are quantized as by `static`. With ``channels`` what depthwise ones read is made even too (`even`; Nagel et
al., section 4.1), for which there need be no outliers: channels that never mix may differ in size as they like.

Ranges over the calibration feeds: (min, max) for what convolutions read and write, and for attention; (minima [C],
maxima [C]) for what matrix products read and what `even` divides.
"""

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import onnx
from pydantic import Field

from calmclip.export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, _qdq
from calmclip.export.quantizers._sites import ACTIVATIONS
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.flow import Array

_HEADROOM = 1.25  # a channel alone is seen seldom, so a range goes farther than it was seen to


class Params(FrozenModel):
    """By tensor (what products read): ``alphas``, instead of ``alpha``, None for no division; ``clips``, instead of
    the extremes, after the division. By node: ``shifts``, added to its output channels."""

    alpha: float | None = Field(0.75, ge=0.0, le=1.0)
    alphas: dict[str, float | None] = Field(default_factory=dict)
    clips: dict[str, tuple[float, float]] = Field(default_factory=dict)
    shifts: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    attention: tuple[str, ...] = ()  # names of products of two activations that are quantized too
    channels: bool = False  # what depthwise convolutions read is made even, channel by channel
    keep: tuple[str, ...] = ()  # names of nodes that stay in float
    reduce_range: bool = False  # 7-bit weights; see `static`


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    axes = dict.fromkeys((node.input[0] for node in matrices(model)), -1)
    if params.channels:
        axes |= dict.fromkeys(separate(model, params.keep), 1)

    def see(name: str, values: Array) -> tuple[Array, Array]:
        return _qdq.extremes(values, axes.get(name))

    seen = _qdq.watch(model, feeds, _qdq.watched(model, params.attention), see)
    return {name: _qdq.widest(all_) for name, all_ in seen.items()}


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = _qdq.Draft(model)
    _qdq.pack(draft)
    alphas = {name: params.alphas.get(name, params.alpha) for name in ranges}
    limits = smooth(draft, ranges, alphas, params.keep)
    clipped = {evened(name) if evened(name) in limits else name: clip for name, clip in params.clips.items()}
    related = _qdq.relate(draft, params.attention)
    inner, divided = even(draft, ranges, params.keep) if params.channels else ({}, {})
    shifts = {node: np.divide(shift, divided.get(node, 1.0)).tolist() for node, shift in params.shifts.items()}
    _qdq.write(
        draft,
        {**limits, **clipped, **related, **inner},
        keep=params.keep,
        reduce_range=params.reduce_range,
        attention=params.attention,
        shifts=shifts,
    )
    return draft.finish()


def smooth(
    draft: _qdq.Draft, ranges: Ranges, alphas: Mapping[str, float | None], keep: Collection[str] = ()
) -> dict[str, tuple[float, float]]:
    """Make channels even before the products of ``draft``, which stays the same function; -> the ranges of what is
    then read. ``alphas``: tensor -> how much of its outliers moves; products that read one tensor share its division.
    """
    limits = {name: (float(np.min(low)), float(np.max(high))) for name, (low, high) in ranges.items()}
    groups: dict[str, list[str]] = {}
    for node in matrices(draft, keep):
        groups.setdefault(node.input[0], []).append(node.name)
    chosen = {name: group for group in groups.values() for name in group}
    nodes: list[onnx.NodeProto] = []
    divided: dict[str, Array] = {}
    for original in draft.nodes:
        if original.name not in chosen:
            nodes.append(original)
            continue
        node, source = draft.own(original), original.input[0]
        low, high = (np.asarray(bound, np.float64) for bound in ranges[source])
        if alphas[source] is None or low.ndim == 0:
            nodes.append(node)
            continue
        if source not in divided:
            together = [n for n in draft.nodes if n.name in groups[source]]
            largest = np.max([np.abs(rows(draft, n)).max(axis=1) for n in together], axis=0)
            scale = factors(np.maximum(np.abs(low), np.abs(high)), largest, alphas[source])
            divided[source] = scale
            gain = draft.add(f"{source}_gain", (1 / scale).astype(np.float32))
            nodes.append(_qdq.node_of("Mul", [source, gain], evened(source)))
            limits[evened(source)] = float((low / scale).min()), float((high / scale).max())
        scaled = (rows(draft, node) * divided[source][:, None]).astype(np.float32)
        flipped = _qdq.attribute(node, "transB")
        node.input[0] = evened(source)
        node.input[1] = draft.add(f"{node.output[0]}_weight", scaled.T if flipped else scaled)
        nodes.append(node)
    draft.nodes = nodes
    return limits


def separate(model: onnx.ModelProto | _qdq.Draft, keep: Collection[str] = ()) -> list[str]:
    """The tensors that depthwise convolutions read, and no other product with a constant does."""
    own = _qdq.depthwise(model, keep)
    names = {node.name for node in own}
    others = {node.input[0] for node in _qdq.products(model, keep) if node.name not in names}
    return [name for name in dict.fromkeys(node.input[0] for node in own) if name not in others]


def even(
    draft: _qdq.Draft, ranges: Ranges, keep: Collection[str] = ()
) -> tuple[dict[str, tuple[float, float]], dict[str, Array]]:
    """Divide the `separate` tensors of ``draft`` by the largest magnitude of each channel, which stays the same
    function: the division goes into the convolution that makes a tensor, behind its Relu too, else it is a Mul; it is
    taken back by the weights of the depthwise convolutions and, before what else reads a convolution's answer, by a
    Mul. -> the ranges of what is then read, and by node the factors [C] that its answer was divided by.

    Not of what another function than Relu makes of a convolution's answer: with no Mul behind it it is a table of bytes
    (`rewrites.quant_lookup`), and beyond a cut's bound no channel goes.
    """
    convolutions = {node.output[0] for node in _qdq.products(draft, keep) if node.op_type == "Conv"}
    readers = {node.name: node.input[0] for node in _qdq.depthwise(draft, keep)}
    spatial = {node.input[0]: len(draft.fixed[node.input[1]].dims) - 2 for node in _qdq.depthwise(draft, keep)}
    made = {name: node for node in draft.nodes for name in node.output}
    wanted = Counter(name for node in draft.nodes for name in node.input)
    wanted.update(value.name for value in draft.model.graph.output)
    sizes: dict[str, Array] = {}
    answers: dict[str, Array] = {}  # of convolutions, before a Relu
    inside: set[str] = set()  # what they make, behind it
    for name in separate(draft, keep):
        source, maker = name, made.get(name)
        if maker is not None and maker.op_type in ACTIVATIONS and maker.input[0] in convolutions:
            source = maker.input[0]
            if maker.op_type != "Relu" or wanted[source] > 1:
                continue
        largest = np.max(np.abs(ranges[name]), axis=0)
        sizes[name] = factors(largest, np.ones(len(largest)), 1.0)
        if source in convolutions:
            answers[source] = sizes[name]
            inside.add(name)
    wanted.subtract(readers.values())
    nodes: list[onnx.NodeProto] = []
    divided: dict[str, Array] = {}
    there = set(inside)  # no Mul need make it

    def multiply(source: str, to: str, factor: Array, sides: int) -> None:
        gain = draft.add(f"{to}_gain", factor.astype(np.float32).reshape(-1, *[1] * sides))
        nodes.append(_qdq.node_of("Mul", [source, gain], to))

    for original in draft.nodes:
        node, out = draft.own(original), original.output[0]
        if (name := readers.get(node.name, "")) in sizes:
            if name not in there:
                multiply(name, evened(name), 1 / sizes[name], spatial[name])
                there.add(name)
            node.input[0] = evened(name)
        if name in sizes or out in answers:
            _rescale(draft, node, sizes.get(name), answers.get(out))
        if out in answers:
            divided[node.name] = answers[out]
        elif out in inside:
            node.input[0] = evened(node.input[0])
        if out in answers or out in inside:
            node.output[0] = evened(out)
        nodes.append(node)
        if out in inside and wanted[out]:
            multiply(evened(out), out, sizes[out], spatial[out])
    draft.nodes = nodes
    bounds = {name: [_HEADROOM * np.asarray(bound) / size for bound in ranges[name]] for name, size in sizes.items()}
    return {evened(name): (float(low.min()), float(high.max())) for name, (low, high) in bounds.items()}, divided


def _rescale(draft: _qdq.Draft, node: onnx.NodeProto, into: Array | None, out: Array | None) -> None:
    """Let the convolution ``node`` read what was divided by ``into`` and answer what is to be divided by ``out``."""
    weight, name = draft.array(node.input[1]), node.output[0]
    factor = np.ones(len(weight)) if into is None else np.repeat(into, len(weight) // len(into))
    factor = factor if out is None else factor / out
    scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    node.input[1] = draft.add(f"{name}_weight", scaled.astype(np.float32))
    if out is not None and len(node.input) > 2 and node.input[2]:
        node.input[2] = draft.add(f"{name}_bias", (draft.array(node.input[2]) / out).astype(np.float32))


def evened(name: str) -> str:
    """What a tensor is called after its division."""
    return f"{name}_even"


def factors(activation: Array, weight: Array, alpha: float) -> Array:
    """Largest magnitudes per input channel [C] -> s [C], geometric mean 1."""
    scale = np.maximum(activation, 1e-5) ** alpha / np.maximum(weight, 1e-5) ** (1 - alpha)
    even: Array = scale / np.exp(np.log(scale).mean())
    return even


def rows(draft: _qdq.Draft, node: onnx.NodeProto) -> Array:
    """The weight of a matrix product as [inputs, outputs]."""
    matrix = draft.array(node.input[1])
    return matrix.T if _qdq.attribute(node, "transB") else matrix


def matrices(model: onnx.ModelProto | _qdq.Draft, keep: Collection[str] = ()) -> list[onnx.NodeProto]:
    return [node for node in _qdq.products(model, keep) if node.op_type != "Conv"]


QUANTIZERS.register("smooth")(Quantizer(Params, quantize, observe))
