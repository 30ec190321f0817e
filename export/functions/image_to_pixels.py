"""`ImageToPixels` and `ImageToQuantizedPixels` as local functions: Pillow's 8-bit resize, to the bit, of standard ops.

ONNX Runtime's own Resize (antialias, cubic, exclude_outside) is up to 2 grey levels off, and more if the columns go
first. So each pass is a product of matrices. The weights of an axis [source, outputs] are computed in float64 as in
csrc/kernels/image_to_pixels.cc, rounded to 22 bits, and split into three signed 8-bit digits; MatMulInteger sums each
digit exactly. Digits are stored plus 128, because products of unsigned bytes saturate on no processor. Source samples
that no output needs are sliced off first, so a long and narrow picture needs little memory.

The body is generated for the attributes of one node; the node states them too, for the op. A graph has one body for
the name, so all its nodes have the same attributes.
"""

from typing import Any

import numpy as np
import onnx
from onnx import parser

from calmclip.models.bundle.manifest import ImagePreprocess
from calmclip.models.ops.spec import DOMAIN, IMAGE_TO_PIXELS, IMAGE_TO_QUANTIZED_PIXELS, Op

OPSET = 18

# n source samples are resized to `to` samples, of which `count` are computed, from `first` on. Results: the range of
# source samples that they need, low to high, and its weights as digits {0}2, {0}1, {0}0 [high - low, count].
_WEIGHTS = """
    {0}n = Cast <to = 11> ({0}source)
    {0}m = Cast <to = 11> ({0}to)
    {0}scale = Div ({0}n, {0}m)
    {0}stretch = Max ({0}scale, unit)
    {0}inverse = Div (unit, {0}stretch)
    {0}support = Mul ({0}stretch, radius)
    {0}stop = Add ({0}first, {0}count)
    {0}place = Range ({0}first, {0}stop, one)
    {0}output = Cast <to = 11> ({0}place)
    {0}middle = Add ({0}output, half)
    {0}centre = Mul ({0}middle, {0}scale)
    {0}left = Sub ({0}centre, {0}support)
    {0}left_half = Add ({0}left, half)
    {0}right = Add ({0}centre, {0}support)
    {0}right_half = Add ({0}right, half)
    {0}from_ = Floor ({0}left_half)
    {0}from = Max ({0}from_, nil)
    {0}until_ = Floor ({0}right_half)
    {0}until = Min ({0}until_, {0}n)
    {0}low_ = ReduceMin <keepdims = 0> ({0}from)
    {0}high_ = ReduceMax <keepdims = 0> ({0}until)
    {0}low = Cast <to = 7> ({0}low_)
    {0}high = Cast <to = 7> ({0}high_)
    {0}range = Range ({0}low_, {0}high_, unit)
    {0}sample = Unsqueeze ({0}range, axis1)
    {0}distance_ = Sub ({0}sample, {0}centre)
    {0}distance = Add ({0}distance_, half)
    {0}shrunk = Mul ({0}distance, {0}inverse)
    {0}x = Abs ({0}shrunk)
    {filter}
    {0}begun = GreaterOrEqual ({0}sample, {0}from)
    {0}open = Less ({0}sample, {0}until)
    {0}within = And ({0}begun, {0}open)
    {0}part = Where ({0}within, {0}value, nil)
    {0}total = ReduceSum <keepdims = 1> ({0}part, axis0)
    {0}weight = Div ({0}part, {0}total)
    {0}large = Mul ({0}weight, bits)
    {0}size = Abs ({0}large)
    {0}size_half = Add ({0}size, half)
    {0}whole = Floor ({0}size_half)
    {0}sign = Sign ({0}large)
    {0}fixed = Mul ({0}whole, {0}sign)
    {0}digit0_ = Add ({0}fixed, offset0)
    {0}over1 = Mul ({0}digit0_, per_byte)
    {0}rest1 = Floor ({0}over1)
    {0}under1 = Mul ({0}rest1, byte)
    {0}digit0 = Sub ({0}digit0_, {0}under1)
    {0}over2 = Mul ({0}rest1, per_byte)
    {0}rest2 = Floor ({0}over2)
    {0}under2 = Mul ({0}rest2, byte)
    {0}digit1 = Sub ({0}rest1, {0}under2)
    {0}0 = Cast <to = 2> ({0}digit0)
    {0}1 = Cast <to = 2> ({0}digit1)
    {0}2 = Cast <to = 2> ({0}rest2)
"""

_FILTERS = {
    "bilinear": """
    {0}slope = Sub (unit, {0}x)
    {0}value = Max ({0}slope, nil)
""",
    # Keys 1981 with a = -1/2
    "bicubic": """
    {0}near1 = Mul ({0}x, near_a)
    {0}near2 = Sub ({0}near1, near_b)
    {0}near3 = Mul ({0}near2, {0}x)
    {0}near4 = Mul ({0}near3, {0}x)
    {0}near = Add ({0}near4, unit)
    {0}far1 = Sub ({0}x, far_a)
    {0}far2 = Mul ({0}far1, {0}x)
    {0}far3 = Add ({0}far2, far_b)
    {0}far4 = Mul ({0}far3, {0}x)
    {0}far5 = Sub ({0}far4, far_c)
    {0}far = Mul ({0}far5, keys)
    {0}is_near = Less ({0}x, unit)
    {0}is_far = Less ({0}x, radius)
    {0}tail = Where ({0}is_far, {0}far, nil)
    {0}value = Where ({0}is_near, {0}near, {0}tail)
""",
}

# {1} -> {2}, along the columns (weights on the left) or the rows (on the right), in 8 bits again.
_SUMS = """
        {0}sum0 = MatMulInteger ({args0})
        {0}sum1 = MatMulInteger ({args1})
        {0}sum2 = MatMulInteger ({args2})
        {0}long0 = Cast <to = 7> ({0}sum0)
        {0}long1 = Cast <to = 7> ({0}sum1)
        {0}long2 = Cast <to = 7> ({0}sum2)
        {0}up2 = Mul ({0}long2, byte_long)
        {0}mid = Add ({0}up2, {0}long1)
        {0}up1 = Mul ({0}mid, byte_long)
        {0}sum = Add ({0}up1, {0}long0)
        {0}rounded = Add ({0}sum, half_long)
        {0}scaled = Div ({0}rounded, bits_long)
        {0}clipped = Clip ({0}scaled, zero, top_long)
        {out} = Cast <to = 2> ({0}clipped)
"""

_PLACE = {
    "exact": """
    to_h = Identity (rows)
    to_w = Identity (cols)
    top = Identity (zero)
    left = Identity (zero)
    count_h = Identity (rows)
    count_w = Identity (cols)
""",
    "letterbox": """
    wide = Cast <to = 11> (source_w)
    high = Cast <to = 11> (source_h)
    cols_real = Cast <to = 11> (cols)
    rows_real = Cast <to = 11> (rows)
    ratio_w = Div (cols_real, wide)
    ratio_h = Div (rows_real, high)
    ratio = Min (ratio_w, ratio_h)
    w_real = Mul (wide, ratio)
    h_real = Mul (high, ratio)
    w_round = Round (w_real)
    h_round = Round (h_real)
    w_long = Cast <to = 7> (w_round)
    h_long = Cast <to = 7> (h_round)
    to_w = Max (w_long, one)
    to_h = Max (h_long, one)
    top = Identity (zero)
    left = Identity (zero)
    count_h = Min (rows, to_h)
    count_w = Min (cols, to_w)
""",
    "shortest": """
    short = Min (source_h, source_w)
    long = Max (source_h, source_w)
    product = Mul (shortest, long)
    longer = Div (product, short)
    is_tall = LessOrEqual (source_w, source_h)
    to_h_ = Where (is_tall, longer, shortest)
    to_w_ = Where (is_tall, shortest, longer)
    spare_h = Sub (to_h_, rows)
    spare_w = Sub (to_w_, cols)
    {margin}
    is_square = Equal (source_h, source_w)
    stays = And (is_square, keep_square)
    to_h = Where (stays, rows, to_h_)
    to_w = Where (stays, cols, to_w_)
    top = Where (stays, zero, top_)
    left = Where (stays, zero, left_)
    count_h = Identity (rows)
    count_w = Identity (cols)
""",
}

_MARGIN = {
    "floor": """
    top_ = Div (spare_h, two)
    left_ = Div (spare_w, two)
""",
    "round": """
    half_h = Div (spare_h, two)
    half_w = Div (spare_w, two)
    odd_h = Mod (spare_h, two)
    odd_w = Mod (spare_w, two)
    up_h = Mod (half_h, two)
    up_w = Mod (half_w, two)
    more_h = Mul (odd_h, up_h)
    more_w = Mul (odd_w, up_w)
    top_ = Add (half_h, more_h)
    left_ = Add (half_w, more_w)
""",
}

_BODY = """
<domain: "{domain}", opset_import: ["": {opset}]>
{name} <{attributes}> (image) => (pixels)
{{
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    two = Constant <value = int64 {{2}}> ()
    axis0 = Constant <value = int64[1] {{0}}> ()
    axis1 = Constant <value = int64[1] {{1}}> ()
    axis2 = Constant <value = int64[1] {{2}}> ()
    nil = Constant <value = double {{0.0}}> ()
    half = Constant <value = double {{0.5}}> ()
    unit = Constant <value = double {{1.0}}> ()
    near_a = Constant <value = double {{1.5}}> ()
    near_b = Constant <value = double {{2.5}}> ()
    far_a = Constant <value = double {{5.0}}> ()
    far_b = Constant <value = double {{8.0}}> ()
    far_c = Constant <value = double {{4.0}}> ()
    keys = Constant <value = double {{-0.5}}> ()
    radius = Constant <value = double {{{radius}}}> ()
    bits = Constant <value = double {{4194304.0}}> ()
    byte = Constant <value = double {{256.0}}> ()
    per_byte = Constant <value = double {{0.00390625}}> ()
    offset0 = Constant <value = double {{8421504.0}}> ()
    byte_long = Constant <value = int64 {{256}}> ()
    half_long = Constant <value = int64 {{2097152}}> ()
    bits_long = Constant <value = int64 {{4194304}}> ()
    top_long = Constant <value = int64 {{255}}> ()
    middle = Constant <value = uint8 {{128}}> ()
    none = Constant <value = uint8 {{0}}> ()
    rows = Constant <value = int64 {{{rows}}}> ()
    cols = Constant <value = int64 {{{cols}}}> ()
    shortest = Constant <value = int64 {{{shortest}}}> ()
    keep_square = Constant <value = bool {{{keep_square}}}> ()
    gain = Constant <value = float[3, 1, 1] {{{gain}}}> ()
    bias = Constant <value = float[3, 1, 1] {{{bias}}}> ()

    shape = Shape (image)
    source_h = Gather (shape, zero)
    source_w = Gather (shape, one)
    {place}
    h_source = Identity (source_h)
    h_to = Identity (to_h)
    h_first = Identity (top)
    h_count = Identity (count_h)
    w_source = Identity (source_w)
    w_to = Identity (to_w)
    w_first = Identity (left)
    w_count = Identity (count_w)
    {weights_h}
    {weights_w}
    h0t = Transpose (h_0)
    h1t = Transpose (h_1)
    h2t = Transpose (h_2)

    start_h = Unsqueeze (h_low, axis0)
    start_w = Unsqueeze (w_low, axis0)
    end_h = Unsqueeze (h_high, axis0)
    end_w = Unsqueeze (w_high, axis0)
    starts = Concat <axis = 0> (start_h, start_w)
    ends = Concat <axis = 0> (end_h, end_w)
    two_axes = Constant <value = int64[2] {{0, 1}}> ()
    seen = Slice (image, starts, ends, two_axes)
    planes = Transpose <perm = [2, 0, 1]> (seen)

    shrinks = Greater (source_h, to_h)
    less_h = Sub (source_h, to_h)
    less_w = Sub (source_w, to_w)
    twice_w = Mul (less_w, two)
    much = Greater (less_h, twice_w)
    columns_first = And (shrinks, much)
    resized = If (columns_first) <
        then_branch = down_across () => (uint8[c, p, q] down_then_across) {{
            {down_first}
            {across_second}
        }},
        else_branch = across_down () => (uint8[c, r, s] across_then_down) {{
            {across_first}
            {down_second}
        }}
    >
    {pad}
    real = Cast <to = 1> (placed)
    stretched = Mul (real, gain)
    values = Add (stretched, bias)
    {end}
}}
"""

_PAD = """
    none_long = Constant <value = int64[4] {{0, 0, 0, 0}}> ()
    space_h = Sub (rows, count_h)
    space_w = Sub (cols, count_w)
    pad_h = Unsqueeze (space_h, axis0)
    pad_w = Unsqueeze (space_w, axis0)
    pads = Concat <axis = 0> (none_long, pad_h, pad_w)
    three = Constant <value = int64[3] {{0, 1, 2}}> ()
    pad_value = Constant <value = uint8 {{{0}}}> ()
    placed_ = Pad (resized, pads, pad_value)
    placed = Identity (placed_)
"""


def image_to_pixels(**attributes: Any) -> onnx.FunctionProto:
    """The body for these attributes of `IMAGE_TO_PIXELS`; the others have their defaults.

    Raises pydantic's ValidationError for attributes out of range.
    """
    return _function(IMAGE_TO_PIXELS, attributes, "pixels = Unsqueeze (values, axis0)")


def image_to_quantized_pixels(**attributes: Any) -> onnx.FunctionProto:
    """The body for these attributes of `IMAGE_TO_QUANTIZED_PIXELS`."""
    values = IMAGE_TO_QUANTIZED_PIXELS.attributes | attributes
    scale, zero_point = _text(values["scale"]), values["zero_point"]
    end = f"""
    step = Constant <value = float {{{scale}}}> ()
    zero_point = Constant <value = uint8 {{{zero_point}}}> ()
    quantized = QuantizeLinear (values, step, zero_point)
    pixels = Unsqueeze (quantized, axis0)
"""
    return _function(IMAGE_TO_QUANTIZED_PIXELS, attributes, end)


def _function(op: Op, attributes: dict[str, Any], end: str) -> onnx.FunctionProto:
    if unknown := attributes.keys() - op.attributes.keys():
        raise TypeError(f"{op.name} has no attribute {', '.join(sorted(unknown))}; it has {', '.join(op.attributes)}")
    values: dict[str, Any] = {name: (op.attributes | attributes)[name] for name in IMAGE_TO_PIXELS.attributes}
    places = {name: value for name, value in values.items() if name not in ("gain", "bias")}
    ImagePreprocess.model_validate(
        places | {"shortest": values["shortest"] or None, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    )
    text = _BODY.format(
        domain=DOMAIN,
        opset=OPSET,
        name=op.name,
        attributes=", ".join(op.attributes),
        radius={"bicubic": 2.0, "bilinear": 1.0}[values["resample"]],
        rows=values["size"][0],
        cols=values["size"][1],
        shortest=values["shortest"],
        keep_square=int(values["keep_square"]),
        gain=", ".join(map(_text, values["gain"])),
        bias=", ".join(map(_text, values["bias"])),
        place=_PLACE[values["resize"]].format(margin=_MARGIN[values["crop_offset"]]),
        weights_h=_weights("h_", values["resample"]),
        weights_w=_weights("w_", values["resample"]),
        down_first=_down("d1_", "planes", "lower"),
        across_second=_across("a2_", "lower", "down_then_across"),
        across_first=_across("a1_", "planes", "narrower"),
        down_second=_down("d2_", "narrower", "across_then_down"),
        pad=_PAD.format(values["pad"]) if values["resize"] == "letterbox" else "placed = Identity (resized)",
        end=end,
    )
    return parser.parse_function(text)


def _weights(axis: str, resample: str) -> str:
    return _WEIGHTS.format(axis, filter=_FILTERS[resample].format(axis))


def _down(prefix: str, source: str, out: str) -> str:
    arguments = {f"args{i}": f"h{i}t, {source}, middle, none" for i in range(3)}
    return _SUMS.format(prefix, out=out, **arguments)


def _across(prefix: str, source: str, out: str) -> str:
    arguments = {f"args{i}": f"{source}, w_{i}, none, middle" for i in range(3)}
    return _SUMS.format(prefix, out=out, **arguments)


def _text(value: float) -> str:
    """A float32, to its last bit."""
    return f"{float(np.float32(value)):.9g}" if value % 1 else f"{float(value):.1f}"
