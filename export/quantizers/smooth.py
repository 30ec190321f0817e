"""Static U8S8 after outliers were moved from activations into weights: for transformers and heads of mixed inputs.

Source: Xiao et al. 2022 (arXiv 2211.10438), "SmoothQuant", eq. 3-4: x W = (x / s) (s W) with
s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) for each input channel j of a product.

A few channels of a transformer's activations are many times larger than the rest, and one scale for all of them
leaves the rest a handful of steps. The division is a Mul of its own before the quantization, not folded into the
LayerNorm: it costs microseconds, works behind any op and leaves residual branches alone. As in `static`, a row's
answer depends on that row alone.

Convolutions are quantized as by `static`. Ranges over the calibration feeds: (min, max) for what convolutions read
and write, (minima [C], maxima [C]) for what matrix products read.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper
from pydantic import Field

from export.quantizers import QUANTIZERS, Feeds, Quantizer, Ranges, _qdq
from models.bundle.manifest import FrozenModel
from models.flow import Array


class Params(FrozenModel):
    alpha: float = Field(0.75, ge=0.0, le=1.0)
    keep: tuple[str, ...] = ()  # names of nodes that stay in float
    reduce_range: bool = False  # 7-bit weights; see `static`


def observe(model: onnx.ModelProto, feeds: Feeds, params: Params) -> Ranges:
    by_channel = {node.input[0] for node in _matrices(model)}

    def see(name: str, values: Array) -> tuple[Array, Array]:
        flat = values.reshape(-1, values.shape[-1]) if name in by_channel else values.reshape(-1)
        return flat.min(axis=0), flat.max(axis=0)

    seen = _qdq.watch(model, feeds, _qdq.watched(model), see)
    return {
        name: (np.min([low for low, _ in all_], axis=0).tolist(), np.max([high for _, high in all_], axis=0).tolist())
        for name, all_ in seen.items()
    }


def quantize(model: onnx.ModelProto, ranges: Ranges, params: Params) -> onnx.ModelProto:
    packed = _qdq.pack(model)
    smoothed, limits = smooth(packed, ranges, params.alpha, params.keep)
    return _qdq.write(smoothed, limits, keep=params.keep, reduce_range=params.reduce_range)


def smooth(
    model: onnx.ModelProto, ranges: Ranges, alpha: float, keep: Sequence[str] = ()
) -> tuple[onnx.ModelProto, Ranges]:
    """-> the same function with even channels before its products, and the ranges of what these then read."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    fixed = _qdq.constants(copy)
    limits = dict(ranges)
    before: dict[str, onnx.NodeProto] = {}
    for node in _matrices(copy, keep):
        weight = fixed[node.input[1]]
        flipped = _attribute(node, "transB")
        matrix = numpy_helper.to_array(weight)
        rows = matrix.T if flipped else matrix  # [inputs, outputs]
        low, high = (np.asarray(bound, np.float64) for bound in ranges[node.input[0]])
        scale = factors(np.maximum(np.abs(low), np.abs(high)), np.abs(rows).max(axis=1), alpha)
        scaled = (rows * scale[:, None]).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(scaled.T if flipped else scaled), weight.name))
        even = f"{node.input[1]}_input"
        copy.graph.initializer.append(numpy_helper.from_array((1 / scale).astype(np.float32), f"{even}_gain"))
        before[node.name] = helper.make_node("Mul", [node.input[0], f"{even}_gain"], [even], f"Mul.{even}")
        node.input[0] = even
        limits[even] = float((low / scale).min()), float((high / scale).max())
    nodes = [each for node in copy.graph.node for each in (before.get(node.name), node) if each is not None]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy, limits


def factors(activation: Array, weight: Array, alpha: float) -> Array:
    """Largest magnitudes per input channel [C] -> s [C], geometric mean 1."""
    scale = np.maximum(activation, 1e-5) ** alpha / np.maximum(weight, 1e-5) ** (1 - alpha)
    even: Array = scale / np.exp(np.log(scale).mean())
    return even


def _matrices(model: onnx.ModelProto, keep: Sequence[str] = ()) -> list[onnx.NodeProto]:
    return [node for node in _qdq.products(model, keep) if node.op_type != "Conv"]


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


QUANTIZERS.register("smooth")(Quantizer(Params, quantize, observe))
