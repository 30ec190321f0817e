"""QuantizeLinear / DequantizeLinear pairs around the products of a graph: scales, zero points, and the writer.

Products of an activation and a constant (Conv, Gemm, MatMul) read uint8 activations with one scale per tensor, and int8
weights with one scale per output channel. This is U8S8; ONNX Runtime's S8S8 is 1.6 to 2.9 times slower. Convolutions
also write uint8, so the runtime stays in integers between convolutions, and in what `carried_tensors` lists: leaky
activations, sums, averages and changes of size, which have steps of their own, and what only moves numbers, whose
inputs and result have the same steps. Matrix products write float, and everything between them is float too. Other
readers of a matrix product's input (a residual branch) read it in float.

Products of two activations (attention) stay in float by default: they take a few percent of the time, and they lose
the most accuracy. When they are quantized, the first factor is uint8, and the second is int8 with zero point 0. If one
op of ours can stand for the attention (`matching.attention.fused`), its probabilities are normalized by the row maximum
(`quantizers.attention`), and its mixture is in 8 bits for all its readers, because the op answers in 8 bits.

Source: Jacob et al. 2017 (arXiv 1712.05877), sections 2.1 and 2.4 (the bias is int32 at the product of both scales).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy

import numpy as np
import onnx

from calmclip.export.graph import Draft, activation_products, node_of, output_axis, products, readers
from calmclip.export.matching.attention import fused
from calmclip.export.quantizers import Ranges
from calmclip.models.flow import Array

CUTS = ("Clip", "Relu")  # the uint8 range of the convolution before them replaces them
BENT = ("LeakyRelu",)  # functions of each number, a table in 8 bits
# They have steps of their own. In the steps of its inputs a mean of four bytes would be a tie in one case of four, and
# two ways to compute it would round ties apart.
SUMMED = ("Add", "AveragePool", "Resize")
MOVED = ("Concat", "MaxPool")  # their results are numbers of their inputs: one grid
BACK = "_back"  # suffix of a tensor that was quantized and dequantized
_INT32 = 2.0**32 - 2  # a bias larger than half of this, in steps, would overflow
_TINY = np.finfo(np.float32).tiny


def quantized_tensors(model: onnx.ModelProto, attention: Collection[str] = ()) -> list[str]:
    """Every tensor that becomes 8-bit: inputs of products, outputs of convolutions and of the cuts behind them, both
    factors of the products of activations named in ``attention``, and the mixtures of those that are fused."""
    written = {name for node in products(model) if node.op_type == "Conv" for name in node.output}
    names = dict.fromkeys(node.input[0] for node in products(model))
    carried = carried_tensors(model.graph.node, products(model))
    for node in model.graph.node:
        if written & {*node.output} or (node.op_type in CUTS and node.input[0] in written):
            names[node.output[0]] = None
        if node.output[0] in carried:
            names[node.output[0]] = None
    for node in activation_products(model):
        if node.name in attention:
            names |= dict.fromkeys(node.input)
    return list(names | dict.fromkeys(fused(model, attention).values()))


def carried_tensors(nodes: Sequence[onnx.NodeProto], convolutions: Collection[onnx.NodeProto]) -> dict[str, str]:
    """The tensors between ``convolutions`` that stay in 8 bits: the results of `BENT`, `SUMMED` and `MOVED` that read
    only results of convolutions or each other, and that a convolution reads in the end; and the tensors that `MOVED`
    reads for them. -> tensor -> a tensor of those that have the same steps, the same for all of them."""
    convs = [node for node in convolutions if node.op_type == "Conv"]
    written = {node.output[0] for node in convs}
    written |= {node.output[0] for node in nodes if node.op_type in CUTS and node.input[0] in written}
    carrying: list[onnx.NodeProto] = []
    for node in nodes:
        known = node.op_type in (*BENT, *SUMMED, *MOVED) and len(node.output) == 1
        if known and written.issuperset(_numbers(node)):
            written.add(node.output[0])
            carrying.append(node)
    wanted = {node.input[0] for node in convs}
    leader: dict[str, str] = {}

    def lead(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for node in reversed(carrying):
        if node.output[0] in wanted:
            first = lead(node.output[0])
            wanted.update(_numbers(node))
            for name in _numbers(node) if node.op_type in MOVED else ():
                leader[lead(name)] = first
    return {name: lead(name) for name in leader}


def _numbers(node: onnx.NodeProto) -> Sequence[str]:
    """The inputs that hold numbers, not settings."""
    return list(node.input)[: 1 if node.op_type in ("AveragePool", "MaxPool", "Resize") else None]


def write_pairs(
    draft: Draft, ranges: Ranges, keep: Collection[str], *, reduce_range: bool = False, attention: Collection[str] = (),
    mixtures: Collection[str] = (), shifts: Mapping[str, Sequence[float]] | None = None,
) -> None:  # fmt: skip
    """Put QDQ pairs around the products of ``draft``.

    ``ranges``: (min, max) per tensor of `quantized_tensors`; a range is widened to hold 0. ``mixtures``: tensors of
    `matching.attention.fused`. ``shifts``: node -> numbers to add to its output channels.
    """
    shifts = shifts or {}
    chosen = {node.name: node for node in products(draft, keep)}
    attending = {node.name for node in activation_products(draft) if node.name in attention}
    convolutions = [node for node in chosen.values() if node.op_type == "Conv"]
    written = {node.output[0] for node in convolutions}
    cuts = [node for node in draft.nodes if node.op_type in CUTS and node.input[0] in written]
    ends = draft.outputs
    reads = Counter(name for node in draft.nodes for name in node.input)
    # a cut is removed if it is the sole reader of its convolution: the quantized range ends at the same bounds
    removed = {n.output[0]: n.input[0] for n in cuts if reads[n.input[0]] == 1 and n.input[0] not in ends}
    read = {node.input[0] for node in convolutions}
    quantized = read | (written - {*removed.values()}) | {node.output[0] for node in cuts}
    carried = carried_tensors(draft.nodes, convolutions)
    quantized |= carried.keys()
    ranges = {**ranges, **_shared_ranges(ranges, carried)}
    quantized |= {name for name in mixtures if not _read_in_8_bits(name, draft, chosen)}
    source = dict(removed)
    pairs: dict[tuple[str, bool], tuple[str, np.float32]] = {}
    nodes: list[onnx.NodeProto] = []

    def pair(name: str, around_zero: bool = False) -> tuple[str, np.float32]:
        """Write the pair of the tensor ``name``, once; -> the dequantized tensor's name, and the scale."""
        if (name, around_zero) not in pairs:
            low, high = (float(bound) for bound in ranges[name])
            scale, zero = scale_and_zero(low, high, around_zero)
            kind = "int8" if around_zero else "uint8"
            back = f"{name}_int8{BACK}" if around_zero else name if name in quantized & ends else f"{name}{BACK}"
            grid = [draft.add(f"{name}_{kind}_step", scale), draft.add(f"{name}_{kind}_zero", zero)]
            nodes.append(node_of("QuantizeLinear", [source.get(name, name), *grid], f"{name}_{kind}"))
            nodes.append(node_of("DequantizeLinear", [f"{name}_{kind}", *grid], back))
            pairs[name, around_zero] = back, scale
        return pairs[name, around_zero]

    for original in draft.nodes:
        if original.output[0] in removed:
            continue
        node, shift = deepcopy(original), shifts.get(original.name)
        for place, name in enumerate(original.input):
            reads_activation = place == 0 and node.name in chosen
            if name in quantized or reads_activation or node.name in attending:
                node.input[place], scale = pair(name, around_zero=place == 1 and node.name in attending)
                if reads_activation:
                    nodes += _weights(draft, node, scale, reduce_range, shift)
        renamed = [name for name in node.output if name in quantized & ends]
        for place, name in enumerate(node.output):
            if name in renamed:  # the graph's output keeps its name and is the dequantized tensor
                node.output[place] = source[name] = f"{name}_float"
        nodes.append(node)
        if node.name in chosen and node.op_type == "MatMul" and shift is not None:
            out, node.output[0] = node.output[0], f"{node.output[0]}_unshifted"
            added = draft.add(f"{out}_shift", np.asarray(shift, np.float32))
            nodes.append(node_of("Add", [node.output[0], added], out))
        for name in [*renamed, *(cut for cut, conv in removed.items() if conv == node.output[0] and cut in ends)]:
            pair(name)
    draft.nodes = nodes


def _shared_ranges(ranges: Ranges, carried: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Each tensor of ``carried`` -> the range of all that have its steps."""
    shared: dict[str, tuple[float, float]] = {}
    for name, first in carried.items():
        low, high = (float(bound) for bound in ranges[name])
        least, most = shared.get(first, (low, high))
        shared[first] = min(least, low), max(most, high)
    return {name: shared[first] for name, first in carried.items()}


def _read_in_8_bits(name: str, draft: Draft, chosen: Collection[str]) -> bool:
    """Whether one product of ``chosen`` reads the tensor ``name`` and nothing else, perhaps divided (`smooth`)."""
    by_tensor = readers(draft.nodes)
    after = by_tensor.get(name, [])
    if [node.op_type for node in after] == ["Mul"]:
        after = by_tensor.get(after[0].output[0], [])
    return name not in draft.outputs and len(after) == 1 and after[0].name in chosen


def scale_and_zero(
    low: float, high: float, around_zero: bool = False, top: int = 255
) -> tuple[np.float32, np.uint8 | np.int8]:
    """Scale and zero point of a range. The range is widened to hold 0, which is exact. ``top``: the largest integer
    of the uint8 grid; ``around_zero`` means int8 with zero point 0."""
    low, high = float(np.float32(min(low, 0.0))), float(np.float32(max(high, 0.0)))
    if around_zero:
        scale = max(-low, high) / 127
        return np.float32(scale if scale >= _TINY else 1.0), np.int8(0)
    scale = (high - low) / top
    if scale < _TINY:
        return np.float32(1.0), np.uint8(0)
    return np.float32(scale), np.uint8(np.round(-low / scale))


def _weights(
    draft: Draft, node: onnx.NodeProto, scale: np.float32, reduce_range: bool, shift: Sequence[float] | None
) -> list[onnx.NodeProto]:
    """Quantize weight and bias of ``node``, whose input has ``scale``; -> the nodes that dequantize them."""
    name = node.input[1]
    axis = output_axis(node)
    weight = draft.array(name)
    bias = None
    if node.op_type != "MatMul":
        old_bias = node.input[2] if len(node.input) > 2 else ""
        if old_bias or shift is not None:
            bias = np.zeros(weight.shape[axis], np.float32)
            bias = bias + draft.array(old_bias).reshape(-1) if old_bias else bias
            bias = bias if shift is None else (bias + np.asarray(shift)).astype(np.float32)
    integers, scales = quantize_weight(weight, axis, reduce_range, scale, bias)
    stem = f"{name}_int8" if f"{name}_int8" not in draft.constants else f"{name}_{node.output[0]}_int8"

    def dequantize(stem: str, name: str, integers: Array, scales: Array, axis: int) -> onnx.NodeProto:
        grid = [draft.add(f"{stem}_step", scales), draft.add(f"{stem}_zero", np.zeros(len(scales), integers.dtype))]
        return node_of("DequantizeLinear", [draft.add(name, integers), *grid], f"{stem}{BACK}", axis=axis)

    nodes = [dequantize(stem, stem, integers, scales, axis)]
    if bias is not None:
        stem, scales = f"{node.output[0]}_bias", scale * scales
        nodes.append(dequantize(stem, f"{stem}_int32", quantize_bias(bias, scales), scales, 0))
        del node.input[2:]
        node.input.append(nodes[1].output[0])
    node.input[1] = nodes[0].output[0]
    return nodes


def quantize_weight(
    weight: Array, axis: int, reduce_range: bool = False, input_scale: np.float32 | None = None,
    bias: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """-> int8 in the shape of ``weight``, and float32 scales along ``axis``, large enough for the int32 ``bias``."""
    limit = 64 if reduce_range else 127
    scale = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)).astype(np.float64) / limit
    scale = np.where(scale < _TINY, 1.0, scale).astype(np.float32)
    if input_scale is not None and bias is not None:
        scale = np.maximum(scale, least_weight_scale(input_scale, bias)).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.clip(np.rint(weight / scale.reshape(shape)), -limit, limit).astype(np.int8), scale


def quantize_bias(bias: Array, scales: Array) -> Array:
    """-> int32; ``scales``: of the input times those of the weight."""
    limit = np.iinfo(np.int32).max
    return np.clip(np.rint(bias.astype(np.float64) / scales), -limit, limit).astype(np.int32)


def least_weight_scale(input_scale: np.float32, bias: Array) -> Array:
    """The least scale of a weight, float64 per output, at which the bias fits int32 at the product of both scales. A
    channel of a folded norm may have a tiny weight and a large bias."""
    return np.asarray(1.0001 * 2 * np.abs(bias, dtype=np.float64) / _INT32 / np.float64(input_scale))
