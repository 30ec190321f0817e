"""The specification of each operator: names, shapes, meaning. It imports neither onnx nor onnxruntime.

It is the contract between `export`, which writes a node, and the library, which runs it. Every operator has an oracle
in `reference`. A graph carries an ONNX local function of the same domain and name, so a plain runtime can run it.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from calmclip.models import suppression
from calmclip.models.bundle.manifest import Tensor

DOMAIN = "ai.calmclip"
VERSION = 1

Method = suppression.Method
METHODS = suppression.METHODS  # an index is the operator's code
Activation = Literal["none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu")  # the same
Attribute = int | float | str | tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True)
class Op:
    """``inputs`` and ``outputs`` in order. A string dimension is unknown before a run; "..." is any number of them.

    ``attributes``: name -> default.
    """

    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    attributes: dict[str, Attribute] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name in snake case: that of the oracle, of the op wrapper and of the local function."""
        return re.sub("(?<=[a-z])(?=[A-Z])", "_", self.name).lower()


def _tensor(dtype: Literal["float32", "int64", "uint8", "int8"], *shape: int | str) -> Tensor:
    return Tensor(dtype=dtype, shape=shape)


# clamp((zeta - gamma) * softmax(x) + gamma, 0, 1) over one axis: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4.
# gamma <= 0 <= 1 <= zeta; 0 and 1 are plain softmax. Rows are not normalized again. -inf counts as the lowest finite
# float32, so a row with only masked values is uniform for either mask value. A row that holds NaN or +inf is NaN
# throughout. An empty axis gives an empty output.
SOFTMAX = Op(
    "Softmax",
    inputs={"x": _tensor("float32", "...")},
    outputs={"y": _tensor("float32", "...")},
    attributes={"axis": -1, "gamma": 0.0, "zeta": 1.0},
)

# Greedy suppression that decays the scores of overlapping boxes: Bodla et al. 2017 (arXiv 1704.04503), section 3. Its
# settings are inputs, not attributes, so one graph serves every request.
#
# The shapes below are for one image. For B images boxes are [B, N, 4], scores and classes [B, N]. Each image is
# suppressed alone, and the outputs follow one another in the order of the images. Ties go to the lower index. IoU is
# rounded to float32 before it is compared with the threshold, so a tie of whole pixels (7/10 and 0.7) is a tie in every
# implementation. A box overlaps nothing if its area is no normal, finite float32: inverted, infinite, NaN. Two boxes do
# not overlap if the sum of their areas overflows float32. A box is dropped if its weight is 0 (or no normal float32) or
# its score is under min_score.
#
# max_output 0, N = 0 and B = 0 give empty outputs. The library raises InvalidArgument, with the reason, for a NaN
# score, a sigma that is not positive, a method or per_class out of range, a NaN threshold, a negative max_output, and
# shapes that do not fit. A local function cannot raise: there a NaN score is dropped, and the other cases are
# undefined.
SOFT_NMS = Op(
    "SoftNMS",
    inputs={
        "boxes": _tensor("float32", "N", 4),  # x0 y0 x1 y1, continuous coordinates
        "scores": _tensor("float32", "N"),
        "classes": _tensor("int64", "N"),
        "method": _tensor("int64", 1),  # 0 hard, 1 linear, 2 gaussian
        "per_class": _tensor("int64", 1),  # 0: boxes of all classes suppress each other; 1: only those of one class
        "iou_threshold": _tensor("float32", 1),  # hard and linear apply over it
        "sigma": _tensor("float32", 1),  # > 0; weight = exp(-IoU^2 / sigma). TensorFlow's and OpenVINO's is half of it
        "min_score": _tensor("float32", 1),  # every output has at least this score
        "max_output": _tensor("int64", 1),  # for each image, over all classes
    },
    outputs={
        "indices": _tensor("int64", "K"),  # into the N of its image, best first
        "kept_scores": _tensor("float32", "K"),  # decayed
        "kept_classes": _tensor("int64", "K"),
        "batch_indices": _tensor("int64", "K"),  # the image of each box; 0 for one image
    },
)

# A picture of any size -> the input of a graph. The attributes are those of `ImagePreprocess`, by name; shortest = 0
# means none. gain is 1 / (255 std) and bias is -mean / std. A node holds these and not mean and std, because float32
# attributes of the latter would change the last bit. The resize is Pillow's on 8 bits: weights rounded to 22 bits, one
# pass for each axis, rounded to 8 bits between the two, in the order of Pillow 13
# (`calmclip.models.preprocess.placement.columns_first`). Then x * gain + bias in float32, two roundings. Sides of the
# picture: 1 to 65536.
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

# The same as uint8: clip(rint(x / scale) + zero_point, 0, 255), half to even. It is an operator of its own, because the
# type of an output must follow from the types of the inputs, and these are the same.
IMAGE_TO_QUANTIZED_PIXELS = Op(
    "ImageToQuantizedPixels",
    inputs=IMAGE_TO_PIXELS.inputs,
    outputs={"pixels": _tensor("uint8", 1, 3, "h", "w")},
    attributes=IMAGE_TO_PIXELS.attributes | {"scale": 1.0, "zero_point": 0},
)

# For all operators below: numbers are quantized as QuantizeLinear does it, clip(rint(x / scale) + zero, 0, 255), half
# to even; or by x * (1 / scale), which may differ by a step next to a tie. Scales are positive and normal. The
# quantizer of y is y_scale and y_zero, one for the tensor (rank 0) or one for each of its N columns. A node states all
# attributes.

# f((x - x_zero) w * x_scale * weight_scale + bias), quantized. The products are summed in int32, exactly. The epilogue
# is float32: sum * (x_scale * weight_scale) + bias, two roundings, and f. If f is none or relu, it may be sum *
# (x_scale * weight_scale / y_scale) + bias / y_scale, which may differ by a step next to a tie. Otherwise as in Jacob
# et al. 2017 (arXiv 1712.05877), 2.2. K is at most 65536. `activation`: an index into ACTIVATIONS; gelu is x Phi(x),
# gelu_tanh its form with tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415), quick_gelu x sigmoid(1.702 x), silu
# x sigmoid(x).
QUANT_LINEAR = Op(
    "QuantLinear",
    inputs={
        "x": _tensor("uint8", "...", "K"),
        "x_scale": _tensor("float32"),
        "x_zero": _tensor("uint8"),
        "weight": _tensor("int8", "K", "N"),
        "weight_scale": _tensor("float32", "N"),  # or one number of rank 0
        "bias": _tensor("float32", "N"),
        "y_scale": _tensor("float32", "..."),
        "y_zero": _tensor("uint8", "..."),
    },
    outputs={"y": _tensor("uint8", "...", "N")},
    attributes={"activation": 0},
)

# The same in float32, not quantized, plus a residual: f(...) + residual, one rounding more. A residual of one number is
# added to all. It is an operator of its own, because the type of an output must follow from the types of the inputs.
QUANT_LINEAR_TO_FLOAT = Op(
    "QuantLinearToFloat",
    inputs={name: tensor for name, tensor in QUANT_LINEAR.inputs.items() if not name.startswith("y_")}
    | {"residual": _tensor("float32", "...")},  # [..., N], or [1]
    outputs={"y": _tensor("float32", "...", "N")},
    attributes=QUANT_LINEAR.attributes,
)

# The same for rows in steps of their own (QUANT_ROWS), which a few large numbers of one token do not spoil for another:
# x_scale has one number for each row. With `gated`, the first half of the columns gates the others: y = f(a) b +
# residual, where a and b are the halves of x w + bias (Shazeer 2020, arXiv 2002.05202).
QUANT_ROWS_LINEAR = Op(
    "QuantRowsLinear",
    inputs=QUANT_LINEAR_TO_FLOAT.inputs | {"x_scale": _tensor("float32", "...", 1)},
    outputs={"y": _tensor("float32", "...", "N")},  # or N / 2
    attributes=QUANT_LINEAR.attributes | {"gated": 0},
)

# QuantLinear of every pixel of a picture, channels last, without activation: a 1 x 1 convolution. It is an operator of
# its own for its local function, which is that convolution: without the library ONNX Runtime runs it in 8 bits. For
# this and QUANT_DEPTHWISE: with constants of more than one x_scale or y_scale, ONNX Runtime (1.32) refuses the graph
# that it makes of the function, so no rewrite writes such a node.
QUANT_POINTWISE = Op(
    "QuantPointwise",
    inputs=QUANT_LINEAR.inputs | {"x": _tensor("uint8", "B", "H", "W", "K")},
    outputs={"y": _tensor("uint8", "B", "H", "W", "N")},
)

# A convolution with channels last: quantize(sum over the window and C of (x - x_zero) w * x_scale * weight_scale +
# bias). Outside the picture x is x_zero. Sums and roundings are those of QUANT_LINEAR, sides and pads those of
# QUANT_DEPTHWISE. A number is a sum of at most 65536 products, where w C counts as the next multiple of 4.
QUANT_CONV = Op(
    "QuantConv",
    inputs={
        "x": _tensor("uint8", "B", "H", "W", "C"),
        "x_scale": _tensor("float32"),
        "x_zero": _tensor("uint8"),
        "weight": _tensor("int8", "h", "w", "C", "N"),
        "weight_scale": _tensor("float32", "N"),  # or one number of rank 0
        "bias": _tensor("float32", "N"),
        "y_scale": _tensor("float32", "..."),
        "y_zero": _tensor("uint8", "..."),
    },
    outputs={"y": _tensor("uint8", "B", "H'", "W'", "N")},
    attributes={"strides": (1, 1), "pads": (0, 0, 0, 0)},
)

# Attention on uint8: softmax(q k^T + mask) v for each of H heads of d numbers; q_scale includes the scale d^-1/2. q, k
# and v may be one tensor: each is the W = H d columns of its input from `*_start` on. k and v have the zero point 128.
# logits = (q - q_zero) k^T, exact in int32, * (q_scale * k_scale), + mask. p is that of SOFTMAX, with gamma and zeta,
# quantized at p_scale with the zero point 0 (1/255: Bondarenko et al. 2023, arXiv 2306.12929, section 5; more than 255
# becomes 255). Then the sum of p v, exact in int32, * (v_scale * p_scale), quantized.
#
# p_scale = 0 means: normalize by the row maximum. e = exp(logit - row maximum) is quantized at 1/255, so no row loses
# its small probabilities; the result is sum of e v * v_scale / sum of e, both sums over the rounded e. gamma is 0 and
# zeta 1 then.
#
# mask: float32, added. Its last two dimensions are [T or 1, S or 1], the optional ones before them B or 1 and H or 1.
# [1] with the number 0 is no mask.
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

# Attention in float32 with grouped queries, for `heads` heads of q and `groups` heads of k and v, each of `dims`
# numbers; heads / groups heads of q read one of k and v. q, k and v may be one tensor, as in QUANT_ATTENTION. Each head
# of q and k is first x, or, with a weight, x / sqrt(mean of x^2 + epsilon) * weight (RMSNorm). Then it is rotated: x *
# cos + swap(x) * sin, where swap exchanges the halves (RoPE: Su et al. 2021, arXiv 2104.09864; sin is negative in the
# first half). A weight or a table of one number means: none. logits = q k^T; with a cap over 0, cap tanh(logits) (Gemma
# 2, 2024, arXiv 2408.00118); + mask. p is that of SOFTMAX, with gamma and zeta; y = p v.
#
# mask: float32 [B or 1, 1, T or 1, S], added; its leading sides of 1 may be left out. At most -1e4, NaN or -inf hides
# the key: it counts as -1e30 in place of the logit, so a row with only hidden keys is uniform. [1] with the number 0 is
# no mask. Keys that are hidden before the first or after the last visible one cost nothing. Memory is linear in T and
# S.
ROTARY_ATTENTION = Op(
    "RotaryAttention",
    inputs={
        "q": _tensor("float32", "B", "T", "Q"),
        "k": _tensor("float32", "B", "S", "K"),
        "v": _tensor("float32", "B", "S", "V"),
        "q_weight": _tensor("float32", "d"),  # or [1]: no norm
        "k_weight": _tensor("float32", "d"),
        "q_cos": _tensor("float32", "T", "d"),  # or [B or 1, 1, T, d], or [1]: no rotation
        "q_sin": _tensor("float32", "T", "d"),
        "k_cos": _tensor("float32", "S", "d"),
        "k_sin": _tensor("float32", "S", "d"),
        "mask": _tensor("float32", "..."),
    },
    outputs={"y": _tensor("float32", "B", "T", "W")},
    attributes={
        "heads": 1, "groups": 1, "dims": 64, "q_start": 0, "k_start": 0, "v_start": 0, "epsilon": 1e-6, "cap": 0.0,
        "gamma": 0.0, "zeta": 1.0,
    },
)  # fmt: skip

# s = x + residual; LayerNormalization over the last axis, as ONNX defines it, times weight, plus bias; quantized. A
# residual of one number is added to all. `normed` is the result before quantization, `sum` is s; both are optional. A
# node names all three outputs, "" for one it does not need, because ONNX Runtime refuses a function with fewer outputs.
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

# Each row in steps of its own: z = x, or, with `normalize`, x / sqrt(mean of x^2 + epsilon) (RMSNorm: Zhang and
# Sennrich 2019, arXiv 1910.07467); z = z * weight; scale = max(max |z| / 127, 1e-30), y = rint(z / scale) + 128, or by
# z * (1 / scale). So y is 1 to 255, and a row's answer depends on no other row. A row with NaN gives unspecified bytes.
QUANT_ROWS = Op(
    "QuantRows",
    inputs={"x": _tensor("float32", "...", "W"), "weight": _tensor("float32", "W")},  # or one number, 1
    outputs={"y": _tensor("uint8", "...", "W"), "scale": _tensor("float32", "...", 1)},
    attributes={"normalize": 0, "epsilon": 1e-6},
)

# Pixels quantized and cut into patches, row by row. A patch is ordered channel by channel, row by row, like a
# convolution's weight [N, C, h, w], flattened. `strides`: the distance of patches, down and to the right; 0 means the
# height or width of a patch. `pads`: top, left, bottom and right of the picture, filled with y_zero. P is P_h P_w, P_h
# = floor((H + top + bottom - h) / stride) + 1, or 0 if H and its pads are less than h; P_w the same. A remainder at the
# bottom and to the right is in no patch. No attribute is over 65536.
QUANT_PATCHES = Op(
    "QuantPatches",
    inputs={"x": _tensor("float32", "B", "C", "H", "W"), "y_scale": _tensor("float32"), "y_zero": _tensor("uint8")},
    outputs={"y": _tensor("uint8", "B", "P", "K")},
    attributes={"patch": (32, 32), "strides": (0, 0), "pads": (0, 0, 0, 0)},
)

# A depthwise convolution, channels last: quantize(sum over the window of (x - x_zero) w * x_scale * weight_scale +
# bias), as in QUANT_LINEAR without activation. Outside the picture x is x_zero. The window is h by w of the weight, at
# most 65536 taps, dilation 1. `pads` is top, left, bottom, right, as in Conv. H' = (H + top + bottom - h) / strides[0]
# + 1, rounded down, or 0 if the window does not fit. The quantizers of x and y are one for the tensor or one for each
# channel. `group` is C: the Conv of the local function needs it.
QUANT_DEPTHWISE = Op(
    "QuantDepthwise",
    inputs={
        "x": _tensor("uint8", "B", "H", "W", "C"),
        "x_scale": _tensor("float32", "..."),
        "x_zero": _tensor("uint8", "..."),
        "weight": _tensor("int8", "h", "w", "C"),
        "weight_scale": _tensor("float32", "C"),  # or one number of rank 0
        "bias": _tensor("float32", "C"),
        "y_scale": _tensor("float32", "..."),
        "y_zero": _tensor("uint8", "..."),
    },
    outputs={"y": _tensor("uint8", "B", "H'", "W'", "C")},
    attributes={"strides": (1, 1), "pads": (0, 0, 0, 0), "group": 1},
)

# The greatest number of each window, channels last: MaxPool of ONNX. Outside of the picture nothing counts; a window
# without a place in the picture gives 0. Sides and pads are those of QUANT_DEPTHWISE.
QUANT_MAX_POOL = Op(
    "QuantMaxPool",
    inputs={"x": _tensor("uint8", "B", "H", "W", "C")},
    outputs={"y": _tensor("uint8", "B", "H'", "W'", "C")},
    attributes={"window": (2, 2), "strides": (1, 1), "pads": (0, 0, 0, 0)},
)

# table[x]: any function of one variable from uint8 to uint8. y may have the memory of x.
QUANT_LOOKUP = Op(
    "QuantLookup",
    inputs={"x": _tensor("uint8", "..."), "table": _tensor("uint8", 256)},
    outputs={"y": _tensor("uint8", "...")},
)

# quantize((a - a_zero) * a_scale + (b - b_zero) * b_scale), for two tensors of one shape. In float32 it is fma(a,
# a_scale / y_scale, fma(b, b_scale / y_scale, c)), c = -(a_zero a_scale + b_zero b_scale) / y_scale, which may differ
# by a step next to a tie. A scale or zero point is one for the tensor or one for each of its columns. a_scale and
# b_scale are at most 2^20 y_scale. y may have the memory of a or b.
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
