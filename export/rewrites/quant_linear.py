"""A product of 8 bits, its bias, its activation and what makes 8 bits of that again -> `ai.calmclip.QuantLinear`.

    MatMul or Gemm of DequantizeLinear(x) and DequantizeLinear(w)  [-> Add(bias)] [-> activation] -> QuantizeLinear
    the same -> Split along the last axis -> QuantizeLinear of each part, in steps of its own

x is uint8 in one scale, w int8 around 0 in one scale or one an output. A bias may come in several Adds. A Mul by
positive numbers column by column before the QuantizeLinear (`quantizers.smooth`) goes into its scale: then an answer
next to a tie may fall a step to the other side. What is split is split in 8 bits.

The op is `models.ops.spec.QUANT_LINEAR`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.4, fused layers.
"""

from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _patterns
from calmclip.export.rewrites._eight import Eight, constant, insert, like, maker, only, put, read, shape, sweep, written
from calmclip.models.flow import Array
from calmclip.models.ops.spec import ACTIVATIONS, QUANT_LINEAR, Activation

_QUICK = 1.702
MOST = 65536  # inputs; see the promise


@dataclass(frozen=True)
class Product:
    """``end`` = activation(x w + bias), the last value that the op computes in float; ``last`` makes it."""

    x: Eight
    weight: Eight
    flipped: bool  # the weight is [N, K]
    bias: Array
    activation: Activation
    end: ir.Value
    last: ir.Node

    def inputs(self, before: ir.Node) -> list[ir.Value]:
        """Those that both ops have; what has to be made is made before ``before``."""
        weight = self.weight.value
        if self.flipped:  # of a constant: ONNX Runtime does it when it loads the graph
            weight = like(weight, name=f"{self.weight.value.name}_turned")
            weight.shape = ir.Shape(reversed(self.weight.value.shape or ()))
            insert(before, "Transpose", [self.weight.value], {"perm": (1, 0)}, [weight], domain="")
        bias = constant(before, f"{self.end.name}_bias_float", self.bias)
        return [self.x.value, self.x.scale, self.x.zero, weight, self.weight.scale, bias]

    @property
    def attributes(self) -> dict[str, int]:
        return {"activation": ACTIVATIONS.index(self.activation)}


def product(node: ir.Node) -> Product | str | None:
    """What ``node`` starts; in words why it is none, None where it is not even of 8 bits."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    x, weight = read(node.inputs[0], ir.DataType.UINT8), read(node.inputs[1], ir.DataType.INT8, weight=True)
    if x is None or weight is None:
        return None
    sizes = shape(weight.value)
    if sizes is None or len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        return None  # of two activations
    if len(x.scale.shape or ()):
        return "its activation has a scale for each column; the op takes one"
    zeros = _patterns.array(weight.zero)
    if zeros is None or zeros.any():
        return "its weights are not around 0, or that cannot be seen"
    if node.op_type == "Gemm" and (why := _unfit(node)):
        return why
    flipped = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    scales = shape(weight.scale)
    along = weight.nodes[0].attributes.get_int("axis", 1) % 2
    if scales and (len(scales) > 1 or along != (0 if flipped else 1)):
        return "its weights have a scale for each input; the op takes one for each output"
    outputs, inputs = (int(size) for size in (sizes if flipped else reversed(sizes)))
    if inputs > MOST:
        return f"it adds up {inputs} products; the op at most {MOST}"
    end, bias = node.outputs[0], np.zeros(outputs, np.float32)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        held = bias_of(node.inputs[2])
        if held is None or (held.size != 1 and held.shape not in ((outputs,), (1, outputs))):
            return "its bias is no constant of a number for each output"
        bias = bias + held.reshape(-1)
    while (added := _added(end, outputs)) is not None:
        end, bias = only(end).outputs[0], (bias + added).astype(np.float32)  # type: ignore[union-attr]
    activation, end = _activation(end)
    last = end.producer()
    assert last is not None
    return Product(x, weight, flipped, bias, activation, end, last)


def _unfit(gemm: ir.Node) -> str:
    plain = {"alpha": 1.0, "beta": 1.0}
    if any(gemm.attributes.get_float(name, 1.0) != value for name, value in plain.items()):
        return "it is scaled"
    return "its activation is transposed" if gemm.attributes.get_int("transA", 0) else ""


def bias_of(value: ir.Value) -> Array | None:
    """Of a Gemm or a convolution: float, or int32 in steps; None where it is no constant."""
    node = maker(value, "DequantizeLinear")
    if node is None:
        return _patterns.array(value)
    held = [_patterns.array(one) for one in node.inputs]
    whole, steps, zero = (*held, np.zeros((), np.int32))[:3]
    if whole is None or steps is None or zero is None:
        return None
    return ((whole.astype(np.float64) - zero) * steps).astype(np.float32)


def _added(end: ir.Value, outputs: int) -> Array | None:
    """What the only reader of ``end`` adds to it, the same to each row."""
    node = only(end)
    if node is None or node.op_type != "Add":
        return None
    (other,) = [value for value in node.inputs if value is not end] or [None]
    found = _patterns.array(other)
    if found is None or found.size != outputs or found.shape[-1:] != (outputs,):
        return None
    rank = 1 if end.shape is None else len(end.shape)  # a constant of more makes the answer one of more
    return found.reshape(-1) if found.ndim <= rank else None


def _activation(z: ir.Value) -> tuple[Activation, ir.Value]:
    node = only(z)
    if node is not None and node.op_type == "Gelu":
        return ("gelu_tanh" if node.attributes.get_string("approximate", "none") == "tanh" else "gelu"), node.outputs[0]
    if node is not None and node.op_type == "Relu":
        return "relu", node.outputs[0]
    return ("quick_gelu", end) if (end := _quick(z)) is not None else ("none", z)


def _quick(z: ir.Value) -> ir.Value | None:
    """z sigmoid(1.702 z)."""
    users = [use.node for use in z.uses()]
    scaled = [n for n in users if n.op_type == "Mul" and any(_is(value, _QUICK) for value in n.inputs)]
    if len(users) != 2 or len(scaled) != 1 or z.is_graph_output():
        return None
    sigmoid = only(scaled[0].outputs[0])
    if sigmoid is None or sigmoid.op_type != "Sigmoid":
        return None
    end = only(sigmoid.outputs[0])
    return end.outputs[0] if end is not None and end.op_type == "Mul" and z in end.inputs else None


def _is(value: ir.Value | None, number: float) -> bool:
    held = _patterns.array(value)
    return held is not None and held.ndim < 2 and held.size == 1 and held.item() == np.float32(number)


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        found = product(node) if node.graph is not None else None
        if isinstance(found, str):
            missed[str(node.name)] = found
        elif found is not None:
            fired += _whole(found) or _in_parts(found)
    return Outcome(fired, missed)


def _whole(found: Product) -> bool:
    after = written(found.end)
    if after is None:
        return False
    y = like(after.value)
    put(after.value, y)
    last = after.nodes[-1]
    insert(last, QUANT_LINEAR.name, [*found.inputs(last), after.scale, after.zero], found.attributes, [y])
    sweep(found.last.graph, [last])  # type: ignore[arg-type]
    return True


def _in_parts(found: Product) -> bool:
    split = only(found.end)
    rank = None if found.end.shape is None else len(found.end.shape)
    if split is None or split.op_type != "Split" or rank is None:
        return False
    sizes = widths(split)
    parts = [written(part) for part in split.outputs]
    if split.attributes.get_int("axis", 0) not in (-1, rank - 1) or sizes is None or None in parts:
        return False
    steps, zeros = [], []
    for part, size in zip(parts, sizes, strict=True):
        assert part is not None  # none is None
        held = _patterns.array(part.scale), _patterns.array(part.zero)
        if held[0] is None or held[1] is None:
            return False
        steps.append(np.broadcast_to(held[0], size))
        zeros.append(np.broadcast_to(held[1], size))
    name = found.end.name
    after = (
        constant(split, f"{name}_steps", np.concatenate(steps)),
        constant(split, f"{name}_zeros", np.concatenate(zeros)),
    )
    y = like(found.end, ir.DataType.UINT8, f"{name}_uint8")
    insert(split, QUANT_LINEAR.name, [*found.inputs(split), *after], found.attributes, [y])
    outputs = [like(part.value) for part in parts if part is not None]
    for part, out in zip(parts, outputs, strict=True):
        put(part.value, out)  # type: ignore[union-attr]
    given = {name: attribute.value for name, attribute in split.attributes.items()}
    insert(split, "Split", [y, *(v for v in split.inputs[1:] if v is not None)], given, outputs, domain="")
    sweep(split.graph, [part.nodes[-1] for part in parts if part is not None])  # type: ignore[arg-type]
    return True


def widths(split: ir.Node) -> list[int] | None:
    """The sizes of its parts along its axis."""
    sizes = [found[-1] if (found := shape(value)) else None for value in split.outputs]
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


REWRITES.register("quant_linear")(
    Rewrite(QUANT_LINEAR, lambda params: BODIES[QUANT_LINEAR.name](**QUANT_LINEAR.attributes), rewrite, replaces=5)
)
