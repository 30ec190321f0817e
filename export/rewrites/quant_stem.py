"""The convolution of 8 bits that reads the pixels -> `ai.calmclip.QuantPatches`, and a product of matrices.

    QuantizeLinear(pixels) -> DequantizeLinear -> Conv [-> activation] [-> QuantizeLinear]

becomes windows, DequantizeLinear, MatMul, the bias, the activation and QuantizeLinear, which `quant_linear` knows, then
Reshape to [B, H', W', N] and Transpose to [B, N, H', W']. ONNX Runtime runs convolutions of 8 bits with channels last,
and takes that Transpose out with its own. The same numbers are added and rounded.

Windows may overlap, so their bytes are more than the pixels': few beside what is made of them where channels are few,
which is also where ONNX Runtime's own convolution is far from what the products need.

The op is `models.ops.spec.QUANT_PATCHES`. Source: Chellapilla, Puri and Simard 2006, High Performance Convolutional
Neural Networks for Document Processing: a convolution unrolled is a product of matrices.
"""

from dataclasses import dataclass

import numpy as np
from onnxscript import ir

from calmclip.export.functions import BODIES
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _patterns
from calmclip.export.rewrites._eight import FIRST, constant, insert, like, maker, only, put, read, shape, sweep
from calmclip.export.rewrites.quant_lookup import POINTWISE
from calmclip.export.rewrites.quant_patches import sums, unfit
from calmclip.models.ops.spec import QUANT_PATCHES

_CHANNELS, _NUMBERS = 4, 256  # of a window: with more of both a convolution is left alone


@dataclass(frozen=True)
class Windows:
    """Of a convolution; ``high``, ``wide``: how many there are."""

    patch: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    high: int
    wide: int


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    fired, missed = 0, {}
    for node in list(model.graph):
        if node.graph is None or not _reads_pixels(node):
            continue
        found = _windows(node)
        if isinstance(found, str):
            missed[str(node.name)] = found
        else:
            _put(node, found)
            fired += 1
    return Outcome(fired, missed)


def _reads_pixels(conv: ir.Node) -> bool:
    """Whether it is a convolution of 8 bits, larger than a pixel, of what the graph is given in float."""
    if conv.domain or conv.op_type != "Conv":
        return False
    pixels, weight = read(conv.inputs[0], ir.DataType.UINT8), read(conv.inputs[1], ir.DataType.INT8, weight=True)
    source = None if pixels is None else maker(pixels.value, "QuantizeLinear")
    sizes = None if weight is None else shape(weight.value)
    given = source is not None and source.inputs[0] is not None and source.inputs[0].is_graph_input()
    return given and sizes is not None and len(sizes) == 4 and sizes[2:] != (1, 1)


def _windows(conv: ir.Node) -> Windows | str:
    """Or in words why it is left alone."""
    picture, sizes = shape(conv.inputs[0]), shape(conv.inputs[1])
    if why := unfit(conv):
        return why
    if picture is None or sizes is None or not all(isinstance(side, int) for side in (*picture[1:], *sizes)):
        return "the sides of its pixels are not known"
    kernel = [int(side) for side in sizes[2:]]
    numbers = int(sizes[1]) * kernel[0] * kernel[1]
    if int(sizes[1]) > _CHANNELS and numbers > _NUMBERS:
        return f"its windows hold {numbers} numbers of {sizes[1]} channels; to write them takes longer than it does"
    if conv.attributes.get_int("group", 1) != 1:
        return "its channels are in groups"
    if set(conv.attributes.get_ints("dilations", [1, 1])) != {1}:
        return "its windows have holes"
    if conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return "its pads are not stated"
    zeros = _patterns.array(conv.inputs[1].producer().inputs[2])  # type: ignore[union-attr]
    if zeros is None or zeros.any():
        return "its weights are not around 0, or that cannot be seen"
    strides = conv.attributes.get_ints("strides", [1, 1])
    pads = conv.attributes.get_ints("pads", [0] * 4)
    sides = [int(side) for side in picture[2:]]
    more = [side + pads[axis] + pads[axis + 2] - kernel[axis] for axis, side in enumerate(sides)]
    if min(*pads, *more) < 0:
        return "its pads or its pictures are less than a window"
    high, wide = (left // stride + 1 for left, stride in zip(more, strides, strict=True))
    return Windows((kernel[0], kernel[1]), tuple(strides), tuple(pads), high, wide)  # type: ignore[arg-type]


def _activations(conv: ir.Node) -> list[ir.Node]:
    """What is made of its answer, number by number, nobody else reading what lies between."""
    found, value = [], conv.outputs[0]
    while (node := only(value)) is not None and node.op_type in POINTWISE:
        others = [_patterns.array(other) for other in node.inputs if other not in (None, value)]
        if any(other is None or other.size != 1 or other.ndim > 1 for other in others):
            break
        found.append(node)
        value = node.outputs[0]
    return found


def _put(conv: ir.Node, found: Windows) -> None:
    between = _activations(conv)
    last = between[-1] if between else conv
    after = only(last.outputs[0])
    if after is not None and after.op_type == "QuantizeLinear" and _in_one_step(after):
        between, last = [*between, after], after
    old, stem = last.outputs[0], conv.outputs[0].name
    batch, outputs = conv.inputs[0].shape[0], int(shape(conv.inputs[1])[0])  # type: ignore[union-attr, index]
    how = {"patch": found.patch, "strides": found.strides, "pads": found.pads}
    before, value = conv.outputs[0], sums(conv, last, batch, found.high * found.wide, how)
    for node in between:
        made = like(node.outputs[0], name=f"{node.outputs[0].name}_rows")
        made.shape = value.shape
        given = [value if one is before else one for one in node.inputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        insert(last, node.op_type, given, attributes, [made], domain="")  # type: ignore[arg-type]
        before, value = node.outputs[0], made
    sizes = np.array([0, found.high, found.wide, outputs])
    places = like(old, name=f"{old.name}_places")
    places.shape = ir.Shape([batch, *sizes[1:].tolist()])
    insert(last, "Reshape", [value, constant(last, f"{stem}_places_shape", sizes)], {}, [places], domain="")
    y = like(old)
    put(old, y)
    insert(last, "Transpose", [places], {"perm": FIRST}, [y], domain="")
    sweep(conv.graph, [last])  # type: ignore[arg-type]


def _in_one_step(quantize: ir.Node) -> bool:
    scale, zero = quantize.inputs[1], quantize.inputs[2] if len(quantize.inputs) > 2 else None
    one = scale is not None and scale.shape is not None and len(scale.shape) == 0
    return one and zero is not None and zero.dtype == ir.DataType.UINT8


REWRITES.register("quant_stem")(
    Rewrite(QUANT_PATCHES, lambda params: BODIES[QUANT_PATCHES.name](**QUANT_PATCHES.attributes), rewrite, replaces=4)
)
