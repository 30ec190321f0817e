"""A product in 8 bits, its bias, its activation and the quantization of the result -> `ai.calmclip.QuantLinear`.

    MatMul or Gemm of DequantizeLinear(x) and DequantizeLinear(w)  [-> Add(bias)] [-> activation] -> QuantizeLinear
    the same -> Split along the last axis -> QuantizeLinear of each part, in steps of its own

x is uint8 in one scale, w int8 around 0 in one scale or one for each output. Several Adds may hold the bias. A Mul by
positive numbers for each column before the QuantizeLinear (`quantizers.smooth`) goes into its scale; a result next to
a tie may then fall a step to the other side. A Split is done in 8 bits.

The op is `models.ops.spec.QUANT_LINEAR`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.4, fused layers.
"""

from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.quantized import (
    ASYMMETRIC,
    QuantizedTensor,
    dequantized_constant,
    quantized_result,
    quantized_source,
)
from calmclip.export.matching.values import (
    constant_array,
    fixed_shape,
    insert,
    new_constant,
    new_value,
    new_value_like,
    optional_input,
    other_input,
    present,
    shape,
    sole_consumer,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.flow import Array
from calmclip.models.ops.spec import ACTIVATIONS, QUANT_LINEAR, Activation

_QUICK = np.float32(1.702)
MAX_INPUTS = 65536  # of one sum; `models.ops.spec` says why


@dataclass(frozen=True)
class Product:
    """``end`` = activation(x w + bias), the last value that the op computes in float."""

    x: QuantizedTensor
    weight: QuantizedTensor
    flipped: bool  # the weight is [N, K]
    bias: Array
    activation: Activation
    end: ir.Value

    def inputs(self, before: ir.Node) -> list[ir.Value]:
        """The inputs that both ops have; new nodes are inserted before ``before``."""
        weight = self.weight.value
        if self.flipped:  # ONNX Runtime folds it when it loads the graph
            columns_first = new_value_like(weight, f"{weight.name}_turned")
            columns_first.shape = ir.Shape(reversed(weight.shape or ()))
            weight = insert(before, "Transpose", [weight], columns_first, perm=(1, 0))
        bias = new_constant(before, f"{self.end.name}_bias_float", self.bias)
        return [self.x.value, self.x.scale, self.x.zero, weight, self.weight.scale, bias]

    @property
    def attributes(self) -> dict[str, int]:
        return {"activation": ACTIVATIONS.index(self.activation)}


def product(node: ir.Node) -> Product | str | None:
    """The product that ``node`` starts; None if it is not in 8 bits, the reason if no op of ours takes it."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    x = quantized_source(node.inputs[0], ir.DataType.UINT8)
    weight = quantized_source(node.inputs[1], ir.DataType.INT8, weight=True)
    sizes = None if weight is None else fixed_shape(weight.value)
    if x is None or weight is None or sizes is None or len(sizes) != 2:  # of two activations
        return None
    if x.per_channel:
        return "its activation has a scale for each column; the op takes one"
    if not weight.symmetric:
        return ASYMMETRIC
    is_gemm = node.op_type == "Gemm"
    if is_gemm and any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return "its alpha or beta is not 1"
    if is_gemm and node.attributes.get_int("transA", 0) != 0:
        return "its activation is transposed"
    flipped = is_gemm and node.attributes.get_int("transB", 0) == 1
    scales = shape(weight.scale)
    if scales and (len(scales) > 1 or weight.axis % 2 != (0 if flipped else 1)):
        return "its weight has a scale for each input; the op takes one for each output"
    outputs, inputs = sizes if flipped else sizes[::-1]
    if inputs > MAX_INPUTS:
        return f"it sums {inputs} products; the op takes at most {MAX_INPUTS}"
    end, bias = node.outputs[0], np.zeros(outputs, np.float32)
    if is_gemm and (bias_input := optional_input(node, 2)) is not None:
        summand = dequantized_constant(bias_input)
        if summand is None or (summand.size != 1 and summand.shape not in ((outputs,), (1, outputs))):
            return "its bias is not a constant with a number for each output"
        bias = bias + summand.reshape(-1)
    while (add := sole_consumer(end, "Add")) is not None and (summand := row(add, end, outputs)) is not None:
        end, bias = add.outputs[0], (bias + summand).astype(np.float32)
    return Product(x, weight, flipped, bias, *activation(end))


def row(add: ir.Node, end: ir.Value, outputs: int) -> Array | None:
    """The numbers that ``add`` adds to each row of ``end``; None if they are not the same for all rows."""
    summand = constant_array(other_input(add, end))
    if summand is None or summand.size != outputs or summand.shape[-1:] != (outputs,):
        return None
    rank = 1 if end.shape is None else len(end.shape)  # a constant of a higher rank would raise that of the sum
    return summand.reshape(-1) if summand.ndim <= rank else None


def activation(z: ir.Value) -> tuple[Activation, ir.Value]:
    """The activation that follows ``z``, and its result. silu is none of them: between two products in 8 bits it is a
    table (`quant_lookup`)."""
    node = sole_consumer(z, "Gelu", "Relu")
    if node is None:
        return ("none", z) if (end := _quick_gelu(z)) is None else ("quick_gelu", end)
    if node.op_type == "Relu":
        return "relu", node.outputs[0]
    return ("gelu_tanh" if node.attributes.get_string("approximate", "none") == "tanh" else "gelu"), node.outputs[0]


def _quick_gelu(z: ir.Value) -> ir.Value | None:
    """The value of z sigmoid(1.702 z), if nothing else reads ``z``."""
    users = [use.node for use in z.uses()]
    scaled = [node for node in users if node.op_type == "Mul" and any(map(_is_slope, node.inputs))]
    if len(users) != 2 or len(scaled) != 1 or z.is_graph_output():
        return None
    sigmoid = sole_consumer(scaled[0].outputs[0], "Sigmoid")
    end = None if sigmoid is None else sole_consumer(sigmoid.outputs[0], "Mul")
    return end.outputs[0] if end is not None and z in end.inputs else None


def _is_slope(value: ir.Value | None) -> bool:
    number = constant_array(value)
    return number is not None and number.ndim < 2 and number.size == 1 and number.item() == _QUICK


def match(node: ir.Node) -> Match | str | None:
    start = product(node)
    if not isinstance(start, Product):
        return start
    result = quantized_result(start.end)
    if result is None:
        return _match_split(start)
    last, steps = result.nodes[-1], [result.scale, result.zero]

    def insert_op(y: ir.Value) -> None:
        insert(last, QUANT_LINEAR, [*start.inputs(last), *steps], y, **start.attributes)

    return Match((result.value,), insert_op)


def _match_split(start: Product) -> Match | None:
    """A product whose result is split, and quantized part by part."""
    end, split = start.end, sole_consumer(start.end, "Split")
    if split is None or end.shape is None or split.attributes.get_int("axis", 0) not in (-1, len(end.shape) - 1):
        return None
    widths, parts = split_widths(split), present(map(quantized_result, split.outputs))
    steps, zeros = (
        present(map(constant_array, values)) for values in ([p.scale for p in parts], [p.zero for p in parts])
    )
    if widths is None or not len(widths) == len(parts) == len(steps) == len(zeros):
        return None

    def insert_op(*outputs: ir.Value) -> None:
        def joined(name: str, arrays: list[Array]) -> ir.Value:
            columns = np.concatenate(
                [np.broadcast_to(array, width) for array, width in zip(arrays, widths, strict=True)]
            )
            return new_constant(split, f"{end.name}_{name}", columns)

        after = [joined("steps", steps), joined("zeros", zeros)]
        y = new_value(f"{end.name}_uint8", ir.DataType.UINT8, end.shape)
        insert(split, QUANT_LINEAR, [*start.inputs(split), *after], y, **start.attributes)
        settings = {name: attribute.value for name, attribute in split.attributes.items()}
        insert(split, "Split", [y, *present(split.inputs[1:])], *outputs, **settings)

    return Match(tuple(part.value for part in parts), insert_op)


def split_widths(split: ir.Node) -> list[int] | None:
    """The sizes of its outputs along the last axis; None if one of their shapes is unknown."""
    widths = [(shape(value) or ("",))[-1] for value in split.outputs]
    numbers = [width for width in widths if isinstance(width, int)]
    return numbers if len(numbers) == len(widths) else None


REWRITES.register("quant_linear")(Rewrite(QUANT_LINEAR, at_each_node(match), replaces=5))
