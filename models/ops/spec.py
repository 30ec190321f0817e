"""What each of our operators promises: names, shapes, meaning. Knows neither onnx nor onnxruntime.

A promise between the one who writes the node (`export`) and the one who runs it. Every op has an oracle in
`reference` and travels in each graph as an ONNX local function of the same domain and name, so a plain
runtime can run it.
"""

from dataclasses import dataclass, field
from typing import Literal

from calmclip.models.bundle.manifest import Tensor

DOMAIN = "ai.calmclip"
VERSION = 1

Method = Literal["hard", "linear", "gaussian"]
METHODS: tuple[Method, ...] = ("hard", "linear", "gaussian")  # their places are the op's codes
Activation = Literal["none", "relu", "gelu", "gelu_tanh", "quick_gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "gelu", "gelu_tanh", "quick_gelu")  # their places are codes
Attribute = int | float | str | tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True)
class Op:
    """``inputs`` and ``outputs`` in order; string dimensions are known only at run time, "..." is any number of them.

    ``attributes``: name -> default.
    """

    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    attributes: dict[str, Attribute] = field(default_factory=dict)


def _tensor(dtype: Literal["float32", "int64", "uint8", "int8"], *shape: int | str) -> Tensor:
    return Tensor(dtype=dtype, shape=shape)


# clamp((zeta - gamma) * softmax(x) + gamma, 0, 1) over one axis: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4.
# gamma <= 0 <= 1 <= zeta; 0 and 1 are plain softmax. Rows are not normalised again.
# -inf counts as the lowest finite float32, so a row of nothing but masks is uniform, whichever the mask; a row that
# holds NaN or +inf is NaN throughout; an empty axis gives an empty output.
SOFTMAX = Op(
    "Softmax",
    inputs={"x": _tensor("float32", "...")},
    outputs={"y": _tensor("float32", "...")},
    attributes={"axis": -1, "gamma": 0.0, "zeta": 1.0},
)

# Greedy suppression that decays the scores of overlapping boxes: Bodla et al. 2017 (arXiv 1704.04503), section 3.
# Its settings are inputs, not attributes, so that one graph serves every request.
#
# Of one image, as the shapes below say, or of B at once: then boxes are [B, N, 4], scores and classes [B, N], every
# image is suppressed alone, and the outputs follow one another, images in order. Ties go to the lower index.
# IoU is rounded to float32, then compared: is it over the threshold? So a tie of whole pixels (7/10 and 0.7) is one
# everywhere. A box overlaps nothing when its area is no normal, finite float32: turned inside out, infinite, NaN; nor
# do two whose areas add up to more than a float32 holds.
# A box goes when its weight is 0 (or no normal float32) or its score falls under min_score.
# max_output 0, N = 0 and B = 0 give empty outputs. A NaN score, a sigma that is not positive, a method or per_class
# out of range, a NaN threshold, a negative max_output, shapes that do not fit: the library raises InvalidArgument and
# says which. A local function cannot raise: there a NaN score drops out, and the rest is not promised.
SOFT_NMS = Op(
    "SoftNMS",
    inputs={
        "boxes": _tensor("float32", "N", 4),  # x0 y0 x1 y1, continuous coordinates
        "scores": _tensor("float32", "N"),
        "classes": _tensor("int64", "N"),
        "method": _tensor("int64", 1),  # 0 hard, 1 linear, 2 gaussian
        "per_class": _tensor("int64", 1),  # 0: boxes of all classes suppress each other; 1: only those of one class
        "iou_threshold": _tensor("float32", 1),  # hard and linear act over it
        "sigma": _tensor("float32", 1),  # > 0; weight = exp(-IoU^2 / sigma). TensorFlow's and OpenVINO's is half of it
        "min_score": _tensor("float32", 1),  # every output has at least this score
        "max_output": _tensor("int64", 1),  # of an image, over all classes
    },
    outputs={
        "indices": _tensor("int64", "K"),  # into the N of its image, best first
        "kept_scores": _tensor("float32", "K"),  # decayed
        "kept_classes": _tensor("int64", "K"),
        "batch_indices": _tensor("int64", "K"),  # of which image; 0 for one image
    },
)

# A picture of any size -> what a graph takes. The attributes are `ImagePreprocess`, by name; shortest = 0 is none.
# Of mean and std a node holds what they come to in float32, for in float32 they would come to another last bit.
# Resized as Pillow does it on 8 bits: weights rounded to 22 bits, one pass for each axis, rounded to 8 bits between the
# two, in the order of Pillow 13 (`calmclip.models.preprocess.image.columns_first`); then x * gain + bias in
# float32, two roundings; gain is 1 / (255 std), bias -mean / std. Sides of the picture: 1 to 65536.
IMAGE_TO_PIXELS = Op(
    "ImageToPixels",
    inputs={"image": _tensor("uint8", "H", "W", 3)},
    outputs={"pixels": _tensor("float32", 1, 3, "h", "w")},
    attributes={
        "size": (224, 224),  # h, w
        "resize": "shortest",
        "shortest": 224,
        "keep_square": 0,
        "crop_offset": "round",
        "resample": "bicubic",
        "gain": (1 / 255, 1 / 255, 1 / 255),
        "bias": (0.0, 0.0, 0.0),
        "pad": 0,
    },
)

# The same as uint8: clip(rint(x / scale) + zero_point, 0, 255), half to even. An operator of its own, for an output's
# type follows from the inputs' types, and these are the same.
IMAGE_TO_QUANTIZED_PIXELS = Op(
    "ImageToQuantizedPixels",
    inputs=IMAGE_TO_PIXELS.inputs,
    outputs={"pixels": _tensor("uint8", 1, 3, "h", "w")},
    attributes=IMAGE_TO_PIXELS.attributes | {"scale": 1.0, "zero_point": 0},
)

# Of all that follow: numbers are quantized as QuantizeLinear does it, clip(rint(x / scale) + zero, 0, 255),
# half to even, or by x * (1 / scale), which another step comes of only next to a tie. Scales are positive and normal.
# What is quantized to y has y_scale and y_zero, one for the tensor (rank 0) or one for each of its N columns.
# Attributes of a node are all stated.

# f((x - x_zero) w * x_scale * weight_scale + bias), quantized. The products are summed in int32, exactly; then
# float32: sum * (x_scale * weight_scale) + bias, two roundings, and f. Where f is none or relu, it may be
# sum * (x_scale * weight_scale / y_scale) + bias / y_scale, which another step comes of only next to a tie. The rest is
# Jacob et al. 2017 (arXiv 1712.05877), 2.2.
# K is at most 65536. `activation`: a place in ACTIVATIONS; gelu is x Phi(x), gelu_tanh its form with tanh (Hendrycks
# and Gimpel 2016, arXiv 1606.08415), quick_gelu x sigmoid(1.702 x).
QUANT_LINEAR = Op(
    "QuantLinear",
    inputs={
        "x": _tensor("uint8", "...", "K"),
        "x_scale": _tensor("float32"),
        "x_zero": _tensor("uint8"),
        "weight": _tensor("int8", "K", "N"),
        "weight_scale": _tensor("float32", "N"),  # or one for all, of rank 0
        "bias": _tensor("float32", "N"),
        "y_scale": _tensor("float32", "..."),
        "y_zero": _tensor("uint8", "..."),
    },
    outputs={"y": _tensor("uint8", "...", "N")},
    attributes={"activation": 0},
)

# The same in float32, not quantized, and added to what went around it: f(...) + residual, one rounding more. A residual
# of one number is added to all of them. An operator of its own, for an output's type follows from the inputs' types.
QUANT_LINEAR_TO_FLOAT = Op(
    "QuantLinearToFloat",
    inputs={name: tensor for name, tensor in QUANT_LINEAR.inputs.items() if not name.startswith("y_")}
    | {"residual": _tensor("float32", "...")},  # [..., N], or [1]
    outputs={"y": _tensor("float32", "...", "N")},
    attributes=QUANT_LINEAR.attributes,
)

# QuantLinear of every place of a picture, channels last, and no activation: a convolution of 1 by 1. An operator of its
# own for its body, which is that convolution: without the library ONNX Runtime has one in 8 bits. For this and
# QUANT_DEPTHWISE: with constants of more than one x_scale or y_scale, ONNX Runtime (1.32) refuses what it makes of the
# body, so no rule writes such a node.
QUANT_POINTWISE = Op(
    "QuantPointwise",
    inputs=QUANT_LINEAR.inputs | {"x": _tensor("uint8", "B", "H", "W", "K")},
    outputs={"y": _tensor("uint8", "B", "H", "W", "N")},
)

# Attention in bytes: softmax(q k^T + mask) v for each of H heads, d numbers wide; the scale d^-1/2 lies in q_scale.
# q, k and v may be one tensor: each is the W = H d columns of its input from `*_start` on. k and v have the zero
# point 128. logits = (q - q_zero) k^T, exact in int32, * (q_scale * k_scale), + mask; p as SOFTMAX has it, gamma and
# zeta too, quantized at p_scale with the zero point 0 (1/255: Bondarenko et al. 2023, arXiv 2306.12929, section 5;
# what is over 255 is 255); sum of p v, exact in int32, * (v_scale * p_scale); quantized.
# With p_scale = 0 it is e = exp(logit - the row's greatest) that is quantized, at 1/255, so no row loses its small
# probabilities; sum of e v * v_scale / sum of e, both sums of what was rounded. gamma is 0 and zeta 1 then.
# mask: float32, added; its last two dimensions are [T or 1, S or 1], those before them (there may be none) B or 1 and
# H or 1. [1] holding 0 is no mask.
QUANT_ATTENTION = Op(
    "QuantAttention",
    inputs={
        "q": _tensor("uint8", "B", "T", "Q"),
        "q_scale": _tensor("float32"),
        "q_zero": _tensor("uint8"),
        "k": _tensor("uint8", "B", "S", "K"),
        "k_scale": _tensor("float32"),
        "v": _tensor("uint8", "B", "S", "V"),
        "v_scale": _tensor("float32"),
        "p_scale": _tensor("float32"),
        "mask": _tensor("float32", "..."),
        "y_scale": _tensor("float32", "..."),
        "y_zero": _tensor("uint8", "..."),
    },
    outputs={"y": _tensor("uint8", "B", "T", "W")},
    attributes={"heads": 1, "width": 64, "q_start": 0, "k_start": 0, "v_start": 0, "gamma": 0.0, "zeta": 1.0},
)

# s = x + residual; LayerNormalization over the last axis, as ONNX has it, times weight, plus bias; quantized. A
# residual of one number is added to all. `normed`, what was quantized, and `sum`, s, are answered where they are
# asked for: a node names all three, "" for one it does without, for of a function with fewer ONNX Runtime complains.
QUANT_LAYER_NORM = Op(
    "QuantLayerNorm",
    inputs={
        "x": _tensor("float32", "...", "W"),
        "residual": _tensor("float32", "..."),  # like x, or [1]
        "weight": _tensor("float32", "W"),
        "bias": _tensor("float32", "W"),
        "y_scale": _tensor("float32", "..."),
        "y_zero": _tensor("uint8", "..."),
    },
    outputs={
        "y": _tensor("uint8", "...", "W"),
        "normed": _tensor("float32", "...", "W"),
        "sum": _tensor("float32", "...", "W"),
    },
    attributes={"epsilon": 1e-5},
)

# Pixels quantized and cut into patches, row by row; a patch is channel by channel, row by row: what a convolution's
# weight [N, C, h, w], flattened, is multiplied with. `strides`: how far apart patches begin, down and to the right, 0
# as far as they are high or wide. `pads`: top, left, bottom and right of the picture lie as many bytes y_zero. P is
# P_h P_w, P_h = floor((H + top + bottom - h) / stride) + 1, or 0 where H and its pads are less than h; P_w the same.
# What is left over at the bottom and to the right is in no patch. No attribute is over 65536.
QUANT_PATCHES = Op(
    "QuantPatches",
    inputs={"x": _tensor("float32", "B", "C", "H", "W"), "y_scale": _tensor("float32"), "y_zero": _tensor("uint8")},
    outputs={"y": _tensor("uint8", "B", "P", "K")},
    attributes={"patch": (32, 32), "strides": (0, 0), "pads": (0, 0, 0, 0)},
)

# A depthwise convolution with channels last: quantize(sum over the window of (x - x_zero) w * x_scale * weight_scale +
# bias), as QUANT_LINEAR has it: the sum in int32, exactly, then two roundings to float32. Outside the picture x counts
# as x_zero. The window is h by w of the weight, at most 65536 taps, dilation 1; `pads` is top, left, bottom, right, as
# Conv has it, and H' = (H + top + bottom - h) / strides[0] + 1, rounded down, or 0 where the window does not fit. What
# x and y are quantized with is one for the tensor or one for each channel. `group` is C: a function's Conv wants it.
QUANT_DEPTHWISE = Op(
    "QuantDepthwise",
    inputs={
        "x": _tensor("uint8", "B", "H", "W", "C"),
        "x_scale": _tensor("float32", "..."),
        "x_zero": _tensor("uint8", "..."),
        "weight": _tensor("int8", "h", "w", "C"),
        "weight_scale": _tensor("float32", "C"),  # or one for all, of rank 0
        "bias": _tensor("float32", "C"),
        "y_scale": _tensor("float32", "..."),
        "y_zero": _tensor("uint8", "..."),
    },
    outputs={"y": _tensor("uint8", "B", "H'", "W'", "C")},
    attributes={"strides": (1, 1), "pads": (0, 0, 0, 0), "group": 1},
)

# table[x], of any function of one variable between bytes. y may lie where x does.
QUANT_LOOKUP = Op(
    "QuantLookup",
    inputs={"x": _tensor("uint8", "..."), "table": _tensor("uint8", 256)},
    outputs={"y": _tensor("uint8", "...")},
)

# quantize((a - a_zero) * a_scale + (b - b_zero) * b_scale), of two tensors of one shape. In float32 it is
# fma(a, a_scale / y_scale, fma(b, b_scale / y_scale, c)), c = -(a_zero a_scale + b_zero b_scale) / y_scale, which
# another step comes of only next to a tie. A scale or zero point is one for the tensor or one for each of its columns;
# a_scale and b_scale are at most 2^20 y_scale. y may lie where a or b does.
QUANT_ADD = Op(
    "QuantAdd",
    inputs={
        "a": _tensor("uint8", "..."),
        "a_scale": _tensor("float32", "..."),
        "a_zero": _tensor("uint8", "..."),
        "b": _tensor("uint8", "..."),
        "b_scale": _tensor("float32", "..."),
        "b_zero": _tensor("uint8", "..."),
        "y_scale": _tensor("float32", "..."),
        "y_zero": _tensor("uint8", "..."),
    },
    outputs={"y": _tensor("uint8", "...")},
)

OPS: tuple[Op, ...] = (
    SOFTMAX,
    SOFT_NMS,
    IMAGE_TO_PIXELS,
    IMAGE_TO_QUANTIZED_PIXELS,
    QUANT_LINEAR,
    QUANT_LINEAR_TO_FLOAT,
    QUANT_POINTWISE,
    QUANT_ATTENTION,
    QUANT_LAYER_NORM,
    QUANT_PATCHES,
    QUANT_DEPTHWISE,
    QUANT_LOOKUP,
    QUANT_ADD,
)
