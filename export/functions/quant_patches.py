"""`QuantPatches` as a local function of QuantizeLinear, Pad and Gather.

Rows of pixels are gathered with channels last, columns with the numbers of a column last. So Gather moves more than one
byte at a time, and each Transpose moves one axis, for which ONNX Runtime has a fast form.
"""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import QUANT_PATCHES


def _places(axis: str, side: str, size: str, stride: str) -> str:
    """``axis``: the places of each window along a side, [windows, size]; ``axis``_count: the number of windows, [1]."""
    return f"""
    {axis}_last = Sub ({side}, {size})
    {axis}_end = Add ({axis}_last, one)
    {axis}_limit = Squeeze ({axis}_end)
    {axis}_stride = Squeeze ({stride})
    {axis}_begins = Range (zero, {axis}_limit, {axis}_stride)
    {axis}_count = Shape ({axis}_begins)
    {axis}_size = Squeeze ({size})
    {axis}_inside = Range (zero, {axis}_size, one)
    {axis}_column = Unsqueeze ({axis}_begins, second)
    {axis} = Add ({axis}_column, {axis}_inside)
"""


_NODES = f"""
    sides = Constant <value_ints: ints = @patch> ()
    asked = Constant <value_ints: ints = @strides> ()
    around = Constant <value_ints: ints = @pads> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    second = Constant <value_ints = [1]> ()
    none_there = Constant <value_ints = [0, 0]> ()

    bytes = QuantizeLinear (x, y_scale, y_zero)
    before, behind = Split <axis = 0, num_outputs = 2> (around)
    on_all_axes = Concat <axis = 0> (none_there, before, none_there, behind)
    padded = Pad (bytes, on_all_axes, y_zero)
    shape = Shape (padded)
    batch, channels, height, width = Split <axis = 0, num_outputs = 4> (shape)
    high, wide = Split <axis = 0, num_outputs = 2> (sides)
    none = Equal (asked, zero)
    strides = Where (none, sides, asked)
    down, right = Split <axis = 0, num_outputs = 2> (strides)
    {_places("lines", "height", "high", "down")}
    {_places("columns", "width", "wide", "right")}
    channels_last = Transpose <perm = [0, 2, 3, 1]> (padded)
    in_lines = Gather <axis = 1> (channels_last, lines)
    by_column = Transpose <perm = [0, 1, 3, 4, 2]> (in_lines)
    in_columns = Gather <axis = 2> (by_column, columns)
    windows = Transpose <perm = [0, 1, 2, 4, 5, 3]> (in_columns)

    patches = Mul (lines_count, columns_count)
    pixels = Mul (high, wide)
    numbers = Mul (channels, pixels)
    flat = Concat <axis = 0> (batch, patches, numbers)
    y = Reshape <allowzero = 1> (windows, flat)
"""


def quant_patches() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.QUANT_PATCHES`."""
    return local_function(QUANT_PATCHES, _NODES)
