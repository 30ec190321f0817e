"""A convolution in 8 bits whose patches do not overlap -> `ai.calmclip.QuantPatches`, and a product of matrices.

    QuantizeLinear(pixels) -> DequantizeLinear -> Conv, stride as large as its kernel
    -> QuantizeLinear -> DequantizeLinear -> Reshape to [B, N, P] -> Transpose to [B, P, N]

becomes patches, DequantizeLinear, MatMul, the bias, QuantizeLinear and DequantizeLinear, which `quant_linear` matches.
The sums and their rounding stay the same.

The op is `models.ops.spec.QUANT_PATCHES`. Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1: the patch
embedding is a linear layer of flattened patches.
"""

from typing import Any

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.convolutions import Convolution, convolution
from calmclip.export.matching.quantized import quantized_source, quantizer_of
from calmclip.export.matching.values import (
    Side,
    insert,
    is_transpose,
    new_constant,
    new_value,
    present,
    producer,
    shape,
    sole_consumer,
)
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.ops.spec import QUANT_PATCHES, Op


def match(node: ir.Node) -> Match | str | None:
    conv = convolution(node)
    if conv is None or (patch := _patch(conv)) is None:
        return None
    if why := unfit_windows(conv):
        return why
    nodes, value = [], node.outputs[0]
    for op_type in ("QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose"):
        if (consumer := sole_consumer(value, op_type)) is None:
            return "no QuantizeLinear, DequantizeLinear, Reshape and Transpose follow it"
        nodes.append(consumer)
        value = consumer.outputs[0]
    quantize, dequantize, reshape, transpose = nodes
    flattens = _flattens(shape(node.outputs[0]), shape(reshape.outputs[0]))
    if not flattens or not is_transpose(transpose, (0, 2, 1)):
        return "its places do not become rows"
    steps = present(quantize.inputs[1:])
    if steps[0].shape:
        return "its result has a scale for each column"
    result = quantized_source(dequantize.outputs[0], ir.DataType.UINT8)
    if result is None or quantizer_of(result) is None:
        return "its result is dequantized in other steps than it is quantized in"
    if result.scale.producer() is not None or result.zero.producer() is not None:
        return "the steps of its result are computed by nodes, which may come after it"
    batch, places = (shape(value) or ("B", "P"))[:2]

    def insert_nodes(y: ir.Value) -> None:
        z = insert_windows(conv, node, batch, places, patch=patch)
        quantized = new_value(f"{z.name}_uint8", ir.DataType.UINT8, z.shape)
        insert(node, "QuantizeLinear", [z, *steps], quantized)
        insert(node, "DequantizeLinear", [quantized, *steps], y)

    return Match((value,), insert_nodes)


def unfit_windows(conv: Convolution) -> str:
    """Why its windows and their product cannot stand for ``conv``, as far as its inputs go."""
    if producer(conv.x.value, "QuantizeLinear") is None:
        return "its input comes in 8 bits, not from a QuantizeLinear"
    if quantizer_of(conv.x) is None:
        return "its pixels are dequantized in other steps than they are quantized in"
    if conv.x.per_channel:
        return "its pixels have a scale for each column"
    return conv.unfit_parameters()


def _patch(conv: Convolution) -> tuple[int, ...] | None:
    """Height and width of its patches; None if its windows overlap or leave a part of the picture out."""
    picture, window = shape(conv.node.inputs[0]), conv.sizes[2:]
    if picture is None or len(picture) != 4 or len(window) != 2 or conv.group != 1 or conv.strides != window:
        return None
    divides = all(isinstance(side, int) and side % size == 0 for side, size in zip(picture[2:], window, strict=True))
    return window if divides and not any(conv.pads) and not conv.dilated and min(window) > 1 else None


def _flattens(result: tuple[int | str, ...] | None, rows: tuple[int | str, ...] | None) -> bool:
    """Whether a Reshape makes [B, N, h w] of [B, N, h, w]: N stays, and either B or h w does too."""
    if result is None or rows is None or len(rows) != 3 or rows[1] != result[1]:
        return False
    sides = [side for side in result[2:] if isinstance(side, int)]
    return rows[0] == result[0] or (len(sides) == 2 and rows[2] == sides[0] * sides[1])


def insert_windows(
    conv: Convolution, before: ir.Node, batch: Side, places: Side, **windows: tuple[int, ...]
) -> ir.Value:
    """Insert QuantPatches and the product of its windows with the weight of ``conv``, to which `unfit_windows` does not
    object. ``windows``: attributes of the op. -> the sums with their bias, float32 [batch, places, outputs]."""
    quantize = producer(conv.x.value, "QuantizeLinear")
    assert quantize is not None
    pixels, steps = quantize.inputs[0], [conv.x.scale, conv.x.zero]
    weight, outputs, inner, stem = conv.weight, conv.sizes[0], int(np.prod(conv.sizes[1:])), conv.node.outputs[0].name

    def add(
        op: Op | str, inputs: list[ir.Value | None], name: str, dtype: ir.DataType, *sizes: Side, **attributes: Any
    ) -> ir.Value:
        return insert(before, op, inputs, new_value(f"{stem}_{name}", dtype, sizes), **attributes)

    float32, int8 = ir.DataType.FLOAT, ir.DataType.INT8
    settings = QUANT_PATCHES.attributes | windows
    patches = add(QUANT_PATCHES, [pixels, *steps], "patches", ir.DataType.UINT8, batch, places, inner, **settings)
    x = add("DequantizeLinear", [patches, *steps], "patches_back", float32, batch, places, inner)
    # ONNX Runtime folds both when it loads the graph
    flat_sizes = new_constant(before, f"{stem}_flat", np.array([outputs, inner]))
    flat = add("Reshape", [weight.value, flat_sizes], "weight_flat", int8, outputs, inner)
    columns = add("Transpose", [flat], "weight_turned", int8, inner, outputs, perm=(1, 0))
    w = add("DequantizeLinear", [columns, weight.scale, weight.zero], "weight_back", float32, inner, outputs, axis=1)
    z = add("MatMul", [x, w], "rows", float32, batch, places, outputs)
    if conv.bias is not None:
        bias = new_constant(before, f"{stem}_bias_float", conv.bias)
        z = add("Add", [z, bias], "sums", float32, batch, places, outputs)
    for use in list(conv.x.real.uses()):
        if use.node.op_type == "Shape":  # the pixels have the same shape
            use.node.replace_input_with(use.idx, pixels)
    return z


REWRITES.register("quant_patches")(Rewrite(QUANT_PATCHES, at_each_node(match), replaces=6))
