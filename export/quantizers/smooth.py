"""Static U8S8 after outliers were moved from activations into weights: for transformers and heads of mixed inputs.

Source: Xiao et al. 2022 (arXiv 2211.10438), "SmoothQuant", eq. 3-4: x W = (x / s) (s W) with
s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) for each input channel j of the products that read x. Bias correction: Nagel
et al. 2019 (arXiv 1906.04721), section 4.2.

A few channels of a transformer's activations are many times larger than the rest, and one scale for all of them
leaves the rest a handful of steps. The division is a Mul of its own before the quantization, not folded into the
LayerNorm: it costs microseconds, works behind any op and leaves residual branches alone. As in `static`, a row's
answer depends on that row alone.

Convolutions are quantized as by `static`. Ranges over the calibration feeds: (min, max) for what convolutions read
and write, and for attention; (minima [C], maxima [C]) for what matrix products read.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from pydantic import Field

from export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, _qdq
from models.bundle.manifest import FrozenModel
from models.flow import Array


class Params(FrozenModel):
    """By tensor (what products read): ``alphas``, instead of ``alpha``, None for no division; ``clips``, instead of
    the extremes, after the division. By node: ``shifts``, added to its output channels."""

    alpha: float | None = Field(0.75, ge=0.0, le=1.0)
    alphas: dict[str, float | None] = Field(default_factory=dict)
    clips: dict[str, tuple[float, float]] = Field(default_factory=dict)
    shifts: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    attention: tuple[str, ...] = ()  # names of products of two activations that are quantized too
    keep: tuple[str, ...] = ()  # names of nodes that stay in float
    reduce_range: bool = False  # 7-bit weights; see `static`


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    by_channel = {node.input[0] for node in matrices(model)}

    def see(name: str, values: Array) -> tuple[Array, Array]:
        flat = values.reshape(-1, values.shape[-1]) if name in by_channel else values.reshape(-1)
        return flat.min(axis=0), flat.max(axis=0)

    seen = _qdq.watch(model, feeds, _qdq.watched(model, params.attention), see)
    return {
        name: (np.min([low for low, _ in all_], axis=0).tolist(), np.max([high for _, high in all_], axis=0).tolist())
        for name, all_ in seen.items()
    }


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    draft = _qdq.Draft(model)
    _qdq.pack(draft)
    alphas = {name: params.alphas.get(name, params.alpha) for name in ranges}
    limits = smooth(draft, ranges, alphas, params.keep)
    clipped = {evened(name) if evened(name) in limits else name: clip for name, clip in params.clips.items()}
    related = _qdq.relate(draft, params.attention)
    _qdq.write(
        draft,
        {**limits, **clipped, **related},
        keep=params.keep,
        reduce_range=params.reduce_range,
        attention=params.attention,
        shifts=params.shifts,
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
