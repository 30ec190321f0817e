"""What the static quantizers share: watching a graph at work, and writing QuantizeLinear / DequantizeLinear pairs.

Products of an activation and a constant (Conv, Gemm, MatMul) read uint8 activations, one scale a tensor, and int8
weights, one scale an output channel: U8S8, because ONNX Runtime's S8S8 is 1.6 to 2.9 times slower. Convolutions
write uint8 too, which lets the runtime stay in integers from one to the next; matrix products write float, and so
does everything between them. What else reads a matrix product's input (a residual branch) reads it in float.

Products of two activations (attention) stay in float unless they are asked for: a few percent of the time, and the
part that loses most. Where they are quantized, the first factor is uint8 and the second int8 around 0, and
probabilities are quantized row by row (`relate`).

Source: Jacob et al. 2017 (arXiv 1712.05877), sections 2.1 and 2.4 (the bias is int32 at the product of both scales).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calmclip.export import light
from calmclip.export.quantizers import Feeds, Ranges
from calmclip.models.errors import BadRequest, ExportError
from calmclip.models.flow import Array

PRODUCTS = ("Conv", "Gemm", "MatMul")
CUTS = ("Clip", "Relu")  # vanish into the uint8 range of the convolution before them
BACK = "_back"  # ends the name of a tensor that went through 8 bits
_TABLE = 1 << 20  # numbers; smaller tables are not worth three more nodes
_INT32 = 2.0**32 - 2  # a bias that is larger than half of this, in steps, would overflow
T = TypeVar("T")


class Draft:
    """A graph being changed: its nodes and constants, without a copy of the weights it does not touch."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.fixed = constants(model)

    def array(self, name: str) -> Array:
        return numpy_helper.to_array(self.fixed[name])

    def add(self, name: str, array: Array) -> str:
        self.fixed[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def own(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A copy of ``node`` that may be changed."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        return copy

    def finish(self) -> onnx.ModelProto:
        """-> a model of the nodes as they are now, with the constants they read."""
        old, new = self.model, onnx.ModelProto()
        new.ir_version, new.producer_name = old.ir_version, old.producer_name
        new.producer_version = old.producer_version
        new.opset_import.extend(old.opset_import)
        new.functions.extend(old.functions)
        graph, before = new.graph, old.graph
        graph.name = before.name
        graph.node.extend(self.nodes)
        graph.input.extend(before.input)
        graph.output.extend(before.output)
        made = {name for node in self.nodes for name in node.output}
        graph.value_info.extend(value for value in before.value_info if value.name in made)
        used = {name for node in self.nodes for name in node.input} | {value.name for value in before.output}
        graph.initializer.extend(tensor for name, tensor in self.fixed.items() if name in used)
        return new


def constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {initializer.name: initializer for initializer in model.graph.initializer}


def products(model: onnx.ModelProto | Draft, keep: Collection[str] = ()) -> list[onnx.NodeProto]:
    """The nodes that are quantized: an activation times a constant, in topological order, without those in ``keep``.

    Not those that read probabilities: all but a few of these would round to 0 at 1/255 (see `pack`). Nor a Gemm that
    scales or flips its activation, or a MatMul with a stack of matrices, which no net of ours has.
    """
    nodes, fixed = _parts(model)
    floats = fixed.keys() | probabilities(nodes)
    return [
        n
        for n in nodes
        if n.op_type in PRODUCTS
        and n.input[0] not in floats
        and n.input[1] in fixed
        and n.name not in keep
        and (n.op_type == "Conv" or len(fixed[n.input[1]].dims) == 2)
        and (n.op_type != "Gemm" or _plain(n))
    ]


def pairs(model: onnx.ModelProto | Draft) -> list[onnx.NodeProto]:
    """The products of two activations: attention, in topological order."""
    nodes, fixed = _parts(model)
    return [n for n in nodes if n.op_type == "MatMul" and not fixed.keys() & {*n.input}]


def depthwise(model: onnx.ModelProto | Draft, keep: Collection[str] = ()) -> list[onnx.NodeProto]:
    """The products that mix no channels: convolutions each of whose outputs reads one of several inputs."""
    _, fixed = _parts(model)
    found = (node for node in products(model, keep) if node.op_type == "Conv")
    return [node for node in found if attribute(node, "group", 1) > 1 and fixed[node.input[1]].dims[1] == 1]


def watched(model: onnx.ModelProto, attention: Collection[str] = ()) -> list[str]:
    """Every tensor that becomes 8 bits: what products read, what convolutions write, and what is left of a cut;
    and both factors of the products of activations named in ``attention``."""
    names: dict[str, None] = {}
    written = {name for node in products(model) if node.op_type == "Conv" for name in node.output}
    for node in products(model):
        names[node.input[0]] = None
    for node in model.graph.node:
        if written & {*node.output} or (node.op_type in CUTS and node.input[0] in written):
            names[node.output[0]] = None
    for node in pairs(model):
        if node.name in attention:
            names |= dict.fromkeys(node.input)
    return list(names)


def watch(
    model: onnx.ModelProto, feeds: Feeds, names: Sequence[str], see: Callable[[str, Array], T]
) -> dict[str, list[T]]:
    """Run the float graph over ``feeds``; -> per tensor what ``see(tensor, values)`` made of it, feed by feed.

    Raises `BadRequest` where there are no feeds; `ExportError` naming a tensor that is NaN or infinite.
    """
    run = tap(model, names)
    seen: dict[str, list[T]] = {name: [] for name in names}
    number = 0
    for number, feed in enumerate(feeds, 1):
        for name, values in run(feed).items():
            if not np.isfinite(values).all():
                raise ExportError(
                    f"the float graph's tensor {name!r} holds NaN or infinity on calibration input {number}, so it has "
                    "no range; look at the checkpoint's weights, or at that input"
                )
            if values.size:  # an expert of a mixture may get no token
                seen[name].append(see(name, values))
    if names and not number:
        raise BadRequest("there is nothing to calibrate on; give pictures (--images) or texts (--texts)")
    if unseen := [name for name in names if not seen[name]]:
        raise ExportError(
            f"no calibration input gives {unseen[0]} a value, and {len(unseen)} tensors in all, so they have no range; "
            "give more pictures or texts, or, where experts are routed, export with --experts dense"
        )
    return seen


def extremes(values: Array, axis: int | None = None) -> tuple[Array, Array]:
    """The least and the largest of ``values``, of each place along ``axis``."""
    others = None if axis is None else tuple(i for i in range(values.ndim) if i != axis % values.ndim)
    return values.min(axis=others), values.max(axis=others)


def widest(limits: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """The range that holds all ``limits``, as numbers or lists of them."""
    return np.min([low for low, _ in limits], axis=0).tolist(), np.max([high for _, high in limits], axis=0).tolist()


def tap(model: onnx.ModelProto, names: Sequence[str]) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """-> a function from feeds to the tensors ``names``, wherever in the graph they lie."""
    outputs, inputs = ({value.name for value in side} for side in (model.graph.output, model.graph.input))
    inside = [name for name in names if name not in inputs]
    more = [name for name in inside if name not in outputs]
    kept = len(model.graph.output)
    try:  # lent, not copied: a large graph has large weights
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in more)
        session = light.Session(model)
    finally:
        del model.graph.output[kept:]

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        computed = session.run(inside, dict(feed)) if inside else []  # no names would mean all outputs
        found = {**feed, **dict(zip(inside, computed, strict=True))}
        return {name: found[name] for name in names}

    return run


def write(
    draft: Draft,
    ranges: Ranges,
    *,
    keep: Collection[str],
    reduce_range: bool = False,
    attention: Collection[str] = (),
    shifts: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Put QDQ pairs around the products of ``draft``.

    ``ranges`` holds one (min, max) for each `watched` tensor; 0 is made part of it. ``shifts``: node -> what is added
    to each of its output channels.
    """
    chosen = {node.name: node for node in products(draft, keep)}
    twos = {node.name for node in pairs(draft) if node.name in attention}
    convolutions = [node for node in chosen.values() if node.op_type == "Conv"]
    written = {node.output[0] for node in convolutions}
    cuts = [node for node in draft.nodes if node.op_type in CUTS and node.input[0] in written]
    ends = {value.name for value in draft.model.graph.output}
    readers = Counter(name for node in draft.nodes for name in node.input)
    # a cut vanishes where nothing else reads its convolution: the range, which ends where it cuts, cuts as well
    gone = {n.output[0]: n.input[0] for n in cuts if readers[n.input[0]] == 1 and n.input[0] not in ends}
    eight = {node.input[0] for node in convolutions} | (written - {*gone.values()}) | {node.output[0] for node in cuts}
    source = dict(gone)
    made: dict[tuple[str, bool], tuple[str, np.float32]] = {}
    nodes: list[onnx.NodeProto] = []

    def through(name: str, around_zero: bool = False) -> tuple[str, np.float32]:
        """The pair for the tensor ``name``, made once; -> what is read instead, and the scale."""
        if (name, around_zero) not in made:
            low, high = (float(bound) for bound in ranges[name])
            size, zero = step(low, high, around_zero)
            kind = "int8" if around_zero else "uint8"
            back = f"{name}_int8{BACK}" if around_zero else name if name in eight & ends else f"{name}{BACK}"
            how = [draft.add(f"{name}_{kind}_step", size), draft.add(f"{name}_{kind}_zero", zero)]
            nodes.append(node_of("QuantizeLinear", [source.get(name, name), *how], f"{name}_{kind}"))
            nodes.append(node_of("DequantizeLinear", [f"{name}_{kind}", *how], back))
            made[name, around_zero] = back, size
        return made[name, around_zero]

    for original in draft.nodes:
        if original.output[0] in gone:
            continue
        node = draft.own(original)
        for place, name in enumerate(original.input):
            if name in eight or (place == 0 and node.name in chosen) or node.name in twos:
                node.input[place], size = through(name, around_zero=place == 1 and node.name in twos)
                if place == 0 and node.name in chosen:
                    nodes += _weights(draft, node, size, reduce_range, (shifts or {}).get(node.name))
        renamed = [name for name in node.output if name in eight & ends]
        for place, name in enumerate(node.output):
            if name in renamed:  # the graph's output keeps its name, and is what went through 8 bits
                node.output[place] = source[name] = f"{name}_float"
        nodes.append(node)
        shift = (shifts or {}).get(node.name)
        if node.name in chosen and node.op_type == "MatMul" and shift is not None:
            out, node.output[0] = node.output[0], f"{node.output[0]}_unshifted"
            added = draft.add(f"{out}_shift", np.asarray(shift, np.float32))
            nodes.append(node_of("Add", [node.output[0], added], out))
        for name in renamed:
            through(name)
        for name in (name for name, conv in gone.items() if conv == node.output[0] and name in ends):
            through(name)
    draft.nodes = nodes


def step(low: float, high: float, around_zero: bool = False, top: int = 255) -> tuple[np.float32, np.uint8 | np.int8]:
    """Scale and zero point of a range; 0 is in it and exact. ``top``: the largest integer, where not around 0."""
    low, high = float(np.float32(min(low, 0.0))), float(np.float32(max(high, 0.0)))
    if around_zero:
        scale = max(-low, high) / 127
        return np.float32(scale if scale >= np.finfo(np.float32).tiny else 1.0), np.int8(0)
    scale = (high - low) / top
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1.0), np.uint8(0)
    return np.float32(scale), np.uint8(np.round(-low / scale))


def _weights(
    draft: Draft, node: onnx.NodeProto, step: np.float32, reduce_range: bool, shift: Sequence[float] | None
) -> list[onnx.NodeProto]:
    """Turn weight and bias of ``node`` into int8 and int32; -> what gives them back."""
    name = node.input[1]
    axis = output_axis(node)
    weight = draft.array(name)
    bias = None
    if node.op_type != "MatMul":
        given = node.input[2] if len(node.input) > 2 and node.input[2] else ""
        if given or shift is not None:
            bias = np.zeros(weight.shape[axis], np.float32)
            bias = bias + draft.array(given).reshape(-1) if given else bias
            bias = bias if shift is None else (bias + np.asarray(shift)).astype(np.float32)
    whole, scale = integers(weight, axis, reduce_range, step, bias)
    stem = f"{name}_int8" if f"{name}_int8" not in draft.fixed else f"{name}_{node.output[0]}_int8"
    node.input[1] = f"{stem}{BACK}"
    how = [draft.add(f"{stem}_step", scale), draft.add(f"{stem}_zero", np.zeros(len(scale), np.int8))]
    made = [node_of("DequantizeLinear", [draft.add(stem, whole), *how], node.input[1], axis=axis)]
    if bias is not None:
        stem = f"{node.output[0]}_bias"
        steps = step * scale
        large = np.iinfo(np.int32).max
        whole = np.clip(np.rint(bias.astype(np.float64) / steps), -large, large).astype(np.int32)
        how = [draft.add(f"{stem}_step", steps), draft.add(f"{stem}_zero", np.zeros(len(steps), np.int32))]
        made.append(node_of("DequantizeLinear", [draft.add(f"{stem}_int32", whole), *how], f"{stem}{BACK}", axis=0))
        del node.input[2:]
        node.input.append(f"{stem}{BACK}")
    return made


def integers(
    weight: Array, axis: int, reduce_range: bool = False, step: np.float32 | None = None, bias: Array | None = None
) -> tuple[Array, Array]:
    """-> int8 like ``weight`` and float32 scales along ``axis``, wide enough for the int32 ``bias`` at ``step``."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others).astype(np.float64)
    scale = largest / (64 if reduce_range else 127)
    scale = np.where(scale < np.finfo(np.float32).tiny, 1.0, scale).astype(np.float32)
    if step is not None and bias is not None:
        scale = np.maximum(scale, narrowest(step, bias)).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    limit = 64 if reduce_range else 127
    return np.clip(np.rint(weight / scale.reshape(shape)), -limit, limit).astype(np.int8), scale


def narrowest(step: np.float32, bias: Array) -> Array:
    """The least scale of a weight, float64 like ``bias``, at which the bias is an int32 times both scales: a channel
    of a folded norm may have hardly a weight, and all that it says in its bias."""
    least: Array = 1.0001 * 2 * np.abs(bias, dtype=np.float64) / _INT32 / np.float64(step)
    return least


def pack(draft: Draft) -> None:
    """Store in int8 what is computed in float all the same: one scale a row or column.

    Big embedding tables (Gather), which are read a few rows at a time, and matrices that mix their rows by
    probabilities (MatMul behind Softmax). The runtime casts such a matrix once, when it loads the graph.
    """
    mixers = probabilities(draft.nodes)
    nodes: list[onnx.NodeProto] = []
    for node in draft.nodes:
        out = node.output[0]
        if node.op_type == "Gather" and node.input[0] in draft.fixed and _large(draft.fixed[node.input[0]]):
            table, scale = _pack(draft, node.input[0], axis=1)
            nodes += [
                node_of("Gather", [table, node.input[1]], f"{out}_int8"),
                # `dynamic` has a {out}_scale of its own, where a product reads the rows
                node_of("Gather", [scale, node.input[1]], f"{out}_steps"),
                node_of("Cast", [f"{out}_int8"], f"{out}_whole", to=TensorProto.FLOAT),
                node_of("Mul", [f"{out}_whole", f"{out}_steps"], out),
            ]
        elif node.op_type == "MatMul" and node.input[0] in mixers and node.input[1] in draft.fixed:
            table, scale = _pack(draft, node.input[1], axis=0)
            nodes += [
                node_of("Cast", [table], f"{table}_whole", to=TensorProto.FLOAT),
                node_of("MatMul", [node.input[0], f"{table}_whole"], f"{out}_whole"),
                node_of("Mul", [f"{out}_whole", scale], out),
            ]
        else:
            nodes.append(node)
    draft.nodes = nodes


def relate(draft: Draft, attention: Collection[str]) -> dict[str, tuple[float, float]]:
    """Take the Softmax of attention apart, where nothing comes between it and the mixture that is quantized and between
    that and its rows: softmax(x) v = e v / sum(e) with e = exp(x - the row's greatest). -> each e's range, 0 to 1.

    In steps of 1/255 a row of many small probabilities is nothing, and other steps lose those close to 1. The greatest
    e of a row is 1, whatever else there is. The sum is of what was rounded, so that weights still sum to 1. Not of a
    clipped softmax, whose probabilities are compared with 0 and 1.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in draft.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def through(name: str, *kinds: str) -> bool:
        for kind in kinds:
            after = readers.get(name, [])
            if [node.op_type for node in after] != [kind]:
                return False
            name = after[0].output[0]
        return True

    ends = {value.name for value in draft.model.graph.output}
    softmaxes = {node.output[0]: node for node in draft.nodes if node.op_type == "Softmax"}
    mixers = {
        node.input[0]: node
        for node in draft.nodes
        if node.name in attention
        and node.input[0] in softmaxes.keys() - ends
        and attribute(softmaxes[node.input[0]], "axis", -1) == -1
        and through(node.input[0], "MatMul")
        and through(node.output[0], "Transpose", "Reshape")
    }
    found: dict[str, tuple[float, float]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in draft.nodes:
        if node.output[0] in mixers:
            name, x = node.output[0], node.input[0]
            last = draft.add("last_axis", np.array([-1]))
            nodes += [
                node_of("ReduceMax", [x, last], f"{name}_greatest"),
                node_of("Sub", [x, f"{name}_greatest"], f"{name}_below"),
                node_of("Exp", [f"{name}_below"], f"{name}_relative"),
            ]
            found[f"{name}_relative"] = (0.0, 1.0)
        elif node.input and mixers.get(node.input[0]) is node:
            mixing, name, out = draft.own(node), f"{node.input[0]}_relative", node.output[0]
            mixing.input[0], mixing.output[0] = name, f"{out}_whole"
            nodes += [
                mixing,
                node_of("ReduceSum", [f"{name}{BACK}", last], f"{name}_sum"),
                node_of("Div", [f"{out}_whole", f"{name}_sum"], out),
            ]
        else:
            nodes.append(node)
    draft.nodes = nodes
    return found


def _large(tensor: TensorProto) -> bool:
    return tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and int(np.prod(tensor.dims)) >= _TABLE


def _pack(draft: Draft, name: str, axis: int) -> tuple[str, str]:
    """Adds int8 and scales to the draft; -> their names. One scale for all along ``axis``."""
    values = draft.array(name)
    scale = np.maximum(np.abs(values).max(axis=axis, keepdims=True) / 127, 1e-12).astype(np.float32)
    return draft.add(f"{name}_int8", np.rint(values / scale).astype(np.int8)), draft.add(f"{name}_scale", scale)


def probabilities(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {node.output[0] for node in nodes if node.op_type == "Softmax"}


def node_of(kind: str, inputs: Sequence[str], output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], f"{kind}.{output}", **attributes)


def attribute(node: onnx.NodeProto, name: str, otherwise: int = 0) -> int:
    return next((one.i for one in node.attribute if one.name == name), otherwise)


def output_axis(node: onnx.NodeProto) -> int:
    """Along which axis of a product's weight its outputs lie."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB") else 1


def _plain(node: onnx.NodeProto) -> bool:
    """A Gemm that is x W + b."""
    return not attribute(node, "transA") and all(
        one.f == 1.0 for one in node.attribute if one.name in ("alpha", "beta")
    )


def _parts(model: onnx.ModelProto | Draft) -> tuple[Sequence[onnx.NodeProto], Mapping[str, TensorProto]]:
    return (model.nodes, model.fixed) if isinstance(model, Draft) else (model.graph.node, constants(model))
