"""`SoftNMS` as a local function: a Loop over standard ops, one step per box that is kept.

The three methods are one formula without a branch,

    weight = exp(-IoU^2 * gaussian / sigma) * (1 - (IoU > iou_threshold) * (hard + linear * IoU)),

in which the switches hard, linear and gaussian are 0 or 1. The state holds only the boxes that are still in the
race, in their first order, so that ArgMax settles ties as the spec asks and every step is shorter than the last.
A NaN score compares false and drops out: a function cannot raise, the reference does.
"""

import onnx
from onnx import parser

from models.ops.spec import DOMAIN, SOFT_NMS

OPSET = 18

_TEXT = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{SOFT_NMS.name} ({", ".join(SOFT_NMS.inputs)}) => ({", ".join(SOFT_NMS.outputs)})
{{
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    two = Constant <value = int64[1] {{2}}> ()
    nil = Constant <value = float[1] {{0.0}}> ()
    unit = Constant <value = float[1] {{1.0}}> ()
    tiny = Constant <value = float[1] {{1e-30}}> ()

    is_hard = Equal (method, zero)
    hard = CastLike (is_hard, unit)
    is_linear = Equal (method, one)
    linear = CastLike (is_linear, unit)
    is_gaussian = Equal (method, two)
    gaussian = CastLike (is_gaussian, unit)
    steep = Div (gaussian, sigma)
    slope = Neg (steep)
    groups = Mul (classes, per_class)

    columns = Transpose <perm = [1, 0]> (boxes)
    lows, highs = Split <axis = 0, num_outputs = 2> (columns)
    open_sides = Sub (highs, lows)
    sides = Relu (open_sides)
    widths, heights = Split <axis = 0, num_outputs = 2> (sides)
    area = Mul (widths, heights)
    good = GreaterOrEqual (scores, min_score)
    first = NonZero (good)
    order0 = Squeeze (first, zero)
    low0 = Gather <axis = 1> (lows, order0)
    high0 = Gather <axis = 1> (highs, order0)
    area0 = Gather <axis = 1> (area, order0)
    score0 = Gather (scores, order0)
    group0 = Gather (groups, order0)
    count0 = Size (order0)
    some0 = Cast <to = 9> (count0)

    low9, high9, area9, score9, group9, order9, indices, kept_scores = Loop <body = step (
        int64 i, bool some, float[2, n] low, float[2, n] high, float[1, n] extent, float[n] score, int64[n] group,
        int64[n] order
    ) => (
        bool more, float[2, m] low_, float[2, m] high_, float[1, m] extent_, float[m] score_, int64[m] group_,
        int64[m] order_, int64 index, float best
    ) {{
        k = ArgMax <axis = 0, keepdims = 1> (score)
        k0 = Squeeze (k)
        best = Gather (score, k0)
        index = Gather (order, k0)
        my_low = Gather <axis = 1> (low, k)
        my_high = Gather <axis = 1> (high, k)
        my_extent = Gather <axis = 1> (extent, k)
        my_group = Gather (group, k)

        from = Max (low, my_low)
        to = Min (high, my_high)
        reach = Sub (to, from)
        overlap = Relu (reach)
        across, down = Split <axis = 0, num_outputs = 2> (overlap)
        shared = Mul (across, down)
        both = Add (extent, my_extent)
        union = Sub (both, shared)
        whole = Max (union, tiny)
        ratio = Div (shared, whole)
        flat = Squeeze (ratio, zero)
        same = Equal (group, my_group)
        iou = Where (same, flat, nil)

        square = Mul (iou, iou)
        exponent = Mul (square, slope)
        bell = Exp (exponent)
        is_over = Greater (iou, iou_threshold)
        over = CastLike (is_over, unit)
        tilt = Mul (linear, iou)
        loss = Add (hard, tilt)
        cut = Mul (over, loss)
        left = Sub (unit, cut)
        weight = Mul (bell, left)
        decayed = Mul (score, weight)

        fair = GreaterOrEqual (decayed, min_score)
        heavy = Greater (weight, nil)
        is_best = Equal (order, index)
        is_other = Not (is_best)
        stays = And (fair, heavy)
        keeps = And (stays, is_other)
        rows = NonZero (keeps)
        row = Squeeze (rows, zero)
        low_ = Gather <axis = 1> (low, row)
        high_ = Gather <axis = 1> (high, row)
        extent_ = Gather <axis = 1> (extent, row)
        score_ = Gather (decayed, row)
        group_ = Gather (group, row)
        order_ = Gather (order, row)
        count = Size (order_)
        more = Cast <to = 9> (count)
    }}> (max_output, some0, low0, high0, area0, score0, group0, order0)
    kept_classes = Gather (classes, indices)
}}
"""


def soft_nms() -> onnx.FunctionProto:
    return parser.parse_function(_TEXT)
