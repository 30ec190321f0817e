"""A convolution of 8 bits whose patches do not overlap -> `ai.calmclip.QuantPatches`, and a product of matrices.

    QuantizeLinear(pixels) -> DequantizeLinear -> Conv, stride as large as its kernel
    -> QuantizeLinear -> DequantizeLinear -> Reshape to [B, N, P] -> Transpose to [B, P, N]

becomes patches, DequantizeLinear, MatMul, the bias, QuantizeLinear and DequantizeLinear, which `quant_linear` knows.
The same numbers are added and rounded.

The op is `models.ops.spec.QUANT_PATCHES`. Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1: the patch
embedding is a linear layer of flattened patches.
"""

from collections.abc import Mapping

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite
from calmclip.export.rewrites._eight import constant, insert, like, maker, only, put, read, shape, sweep, writer
from calmclip.export.rewrites.quant_linear import bias_of
from calmclip.models.ops.spec import QUANT_PATCHES

Side = int | str | ir.SymbolicDim


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        if node.graph is None or node.domain or node.op_type != "Conv":
            continue
        pixels, weight = read(node.inputs[0], ir.DataType.UINT8), read(node.inputs[1], ir.DataType.INT8, weight=True)
        if pixels is None or weight is None or (size := _patch(node)) is None:
            continue
        if why := unfit(node) or _unfit(node):
            missed[str(node.name)] = why
        else:
            _put(node, size)
            fired += 1
    return Outcome(fired, missed)


def unfit(conv: ir.Node) -> str:
    """Why a convolution of 8 bits is no product of windows of its pixels, as far as what it reads goes."""
    pixels, weight = read(conv.inputs[0], ir.DataType.UINT8), read(conv.inputs[1], ir.DataType.INT8, weight=True)
    if pixels is None or weight is None:
        return "it is not of 8 bits"
    if maker(pixels.value, "QuantizeLinear") is None:
        return "what it reads is 8 bits before it comes here"
    if writer(pixels) is None:
        return "its pixels are read in other steps than they are written in"
    if len(pixels.scale.shape or ()):
        return "its pixels have a scale for each column"
    if len(weight.scale.shape or ()) and weight.nodes[0].attributes.get_int("axis", 1) % 4:
        return "its weights have no scale for each output"
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    return "its bias is no constant" if bias is not None and bias_of(bias) is None else ""


def _patch(conv: ir.Node) -> tuple[int, int] | None:
    """Height and width of its patches, if it cuts its input into patches that do not overlap."""
    sizes, picture = shape(conv.inputs[1]), shape(conv.inputs[0])
    if sizes is None or picture is None or len(sizes) != 4 or len(picture) != 4:
        return None
    kernel = list(sizes[2:])
    plain = conv.attributes.get_int("group", 1) == 1 and list(conv.attributes.get_ints("strides", [1, 1])) == kernel
    pads, dilations = conv.attributes.get_ints("pads", [0] * 4), conv.attributes.get_ints("dilations", [1, 1])
    whole = all(isinstance(side, int) and side % k == 0 for side, k in zip(picture[2:], kernel, strict=True))
    if not (plain and whole and not any(pads) and set(dilations) == {1} and min(kernel) > 1):
        return None
    return (kernel[0], kernel[1])


def _after(conv: ir.Node) -> list[ir.Node] | None:
    """QuantizeLinear, DequantizeLinear, Reshape, Transpose behind it, nobody else reading what lies between."""
    found, value = [], conv.outputs[0]
    for kind in ("QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose"):
        node = only(value)
        if node is None or node.op_type != kind:
            return None
        found.append(node)
        value = node.outputs[0]
    return found


def _unfit(conv: ir.Node) -> str:
    after = _after(conv)
    if after is None:
        return "it is not followed by QuantizeLinear, DequantizeLinear, Reshape and Transpose"
    flat = _flat(shape(conv.outputs[0]), shape(after[2].outputs[0]))
    if not flat or list(after[3].attributes.get_ints("perm", [])) != [0, 2, 1]:
        return "its places are not made rows"
    if len(after[0].inputs[1].shape or ()):  # type: ignore[union-attr]
        return "what it answers has a scale for each column"
    answer = read(after[1].outputs[0], ir.DataType.UINT8)
    if answer is None or writer(answer) is None:
        return "what it answers is read in other steps than it is written in"
    if answer.scale.producer() is not None or answer.zero.producer() is not None:
        return "the steps of what it answers are made by nodes, which may come behind it"
    return ""


def _flat(answer: tuple[int | str, ...] | None, rows: tuple[int | str, ...] | None) -> bool:
    """Whether [B, N, h, w] becomes [B, N, h w]: where N stays, B says it of the places, or they of B."""
    if answer is None or rows is None or len(rows) != 3 or rows[1] != answer[1]:
        return False
    places = [side for side in answer[2:] if isinstance(side, int)]
    return rows[0] == answer[0] or (len(places) == 2 and rows[2] == places[0] * places[1])


def _put(conv: ir.Node, size: tuple[int, int]) -> None:
    after = _after(conv)
    assert after is not None  # `rewrite` saw them all
    end = after[3].outputs[0]
    batch, places = (shape(end) or ("B", "P"))[:2]
    z = sums(conv, conv, batch, places, {"patch": size})
    how = [value for value in after[0].inputs[1:] if value is not None]
    eight = ir.Value(name=f"{z.name}_uint8", shape=z.shape, type=ir.TensorType(ir.DataType.UINT8))
    insert(conv, "QuantizeLinear", [z, *how], {}, [eight], domain="")
    y = like(end)
    put(end, y)
    insert(conv, "DequantizeLinear", [eight, *how], {}, [y], domain="")
    sweep(conv.graph, [after[3]])  # type: ignore[arg-type]


def sums(conv: ir.Node, before: ir.Node, batch: Side, places: Side, how: Mapping[str, tuple[int, ...]]) -> ir.Value:
    """The sums of ``conv``, a row for each place, float32 [B, P, N]: made before ``before``, of patches cut as ``how``
    says, attributes of the op. It reads what `unfit` finds nothing against."""
    pixels, weight = read(conv.inputs[0], ir.DataType.UINT8), read(conv.inputs[1], ir.DataType.INT8, weight=True)
    source = None if pixels is None else maker(pixels.value, "QuantizeLinear")
    if pixels is None or weight is None or source is None:
        raise AssertionError("`unfit` saw them all")
    outputs, channels, height, width = (int(d) for d in shape(weight.value) or ())
    inner, stem = channels * height * width, conv.outputs[0].name

    def new(name: str, kind: ir.DataType, *sizes: Side) -> ir.Value:
        return ir.Value(name=f"{stem}_{name}", shape=ir.Shape(sizes), type=ir.TensorType(kind))

    def make(op: str, inputs: list[ir.Value], out: ir.Value, **attributes: object) -> ir.Value:
        insert(before, op, inputs, attributes, [out], domain="")
        return out

    patches = new("patches", ir.DataType.UINT8, batch, places, inner)
    steps = [pixels.scale, pixels.zero]
    cut = QUANT_PATCHES.attributes | how
    insert(before, QUANT_PATCHES.name, [source.inputs[0], *steps], cut, [patches])  # type: ignore[list-item]
    x = make("DequantizeLinear", [patches, *steps], new("patches_back", ir.DataType.FLOAT, batch, places, inner))
    # of a constant: ONNX Runtime does it when it loads the graph
    flat = new("weight_flat", ir.DataType.INT8, outputs, inner)
    make("Reshape", [weight.value, constant(before, f"{stem}_flat", np.array([outputs, inner]))], flat)
    turned = make("Transpose", [flat], new("weight_turned", ir.DataType.INT8, inner, outputs), perm=(1, 0))
    back = new("weight_back", ir.DataType.FLOAT, inner, outputs)
    w = make("DequantizeLinear", [turned, weight.scale, weight.zero], back, axis=1)
    z = make("MatMul", [x, w], new("rows", ir.DataType.FLOAT, batch, places, outputs))
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        bias = constant(before, f"{stem}_bias_float", bias_of(conv.inputs[2]))  # type: ignore[arg-type]
        z = make("Add", [z, bias], new("sums", ir.DataType.FLOAT, batch, places, outputs))
    for use in list(pixels.real.uses()):
        if use.node.op_type == "Shape":  # which is the picture's, too
            use.node.replace_input_with(use.idx, source.inputs[0])
    return z


REWRITES.register("quant_patches")(
    Rewrite(QUANT_PATCHES, lambda params: BODIES[QUANT_PATCHES.name](**QUANT_PATCHES.attributes), rewrite, replaces=6)
)
