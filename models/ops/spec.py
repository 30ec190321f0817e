"""What each of our operators promises: names, shapes, meaning. Knows neither onnx nor onnxruntime.

A promise between the one who writes the node (`export`) and the one who runs it. Every op has an oracle in
`reference` and travels in each graph as an ONNX local function of the same domain and name, so a plain
runtime can run it.
"""

from dataclasses import dataclass, field
from typing import Literal

from models.bundle.manifest import Tensor

DOMAIN = "ai.calmclip"
VERSION = 1

Method = Literal["hard", "linear", "gaussian"]
METHODS: tuple[Method, ...] = ("hard", "linear", "gaussian")  # their places are the op's codes
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


def _tensor(dtype: Literal["float32", "int64", "uint8"], *shape: int | str) -> Tensor:
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
# two, in the order of Pillow 13 (`models.preprocess.image.columns_first`); then x * gain + bias in
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

OPS: tuple[Op, ...] = (SOFTMAX, SOFT_NMS, IMAGE_TO_PIXELS, IMAGE_TO_QUANTIZED_PIXELS)
