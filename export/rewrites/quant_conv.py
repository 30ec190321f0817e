"""A convolution in 8 bits with a larger window -> `ai.calmclip.QuantConv`, with channels last.

    DequantizeLinear(x) -> Conv -> QuantizeLinear

becomes Transpose, the operator, and Transpose back. ONNX Runtime removes Transposes that undo each other.

An activation behind the pair stays behind it: a LeakyRelu is a table of bytes (`quant_lookup`). If the operator
computed it, it would round once, but the operator's local function twice, because ONNX Runtime makes a convolution in 8
bits only of a Conv whose result is quantized. Then answers with and without the library would differ by more than ties
(docs/decisions/0072).

The op is `models.ops.spec.QUANT_CONV`. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.2.
"""

from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.convolutions import Convolution, channels_last, convolution, reads_pixels
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.export.rewrites.quant_linear import MAX_INPUTS
from calmclip.models.ops.spec import QUANT_CONV


def match(node: ir.Node) -> Match | str | None:
    """A convolution of pictures whose channels are in one group; `quant_pointwise` takes those of 1 x 1, `quant_stem`
    those that read the pixels."""
    conv = convolution(node, axis=1)
    if conv is None or conv.group != 1 or len(conv.sizes) != 4 or reads_pixels(conv):
        return None
    if conv.sizes[2:] == (1, 1) and set(conv.strides) == {1} and not any(conv.pads):
        return None
    if why := _unfit(conv):
        return why
    settings, sizes_name = {"strides": conv.strides, "pads": conv.pads}, f"{conv.weight.value.name}_sizes"
    return channels_last(conv, QUANT_CONV, conv.sizes, (2, 3, 1, 0), sizes_name, settings)


def _unfit(conv: Convolution) -> str:
    if conv.dilated:
        return "its window is dilated"
    if conv.auto_pad:
        return "its pads depend on the size of its input"
    if min(conv.pads) < 0:
        return "its pads are negative"
    _, inputs, high, wide = conv.sizes
    products = high * -(-wide * inputs // 4) * 4
    return f"it sums {products} products; the op takes at most {MAX_INPUTS}" if products > MAX_INPUTS else ""


REWRITES.register("quant_conv")(Rewrite(QUANT_CONV, at_each_node(match), replaces=5))
