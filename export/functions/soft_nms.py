"""`SoftNMS` as a local function: a Loop over standard ops, one step per box that is kept, in a Loop over the images.

The three methods are one formula without a branch,

    weight = exp(-IoU^2 * gaussian / sigma) * (1 - (IoU > iou_threshold) * (hard + linear * IoU)),

in which the switches hard, linear and gaussian are 0 or 1. The state holds only the boxes that are still candidates,
in their original order. So ArgMax breaks ties as the spec requires, and every step is shorter than the one before.
One image is B = 1: boxes of both ranks are reshaped to [B, N, 4].

Unlike the reference and the library, a function cannot raise. A NaN score compares false and its box is dropped. ONNX
Runtime refuses shapes that do not fit. Settings out of range give an undefined result.
"""

import numpy as np
import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import SOFT_NMS

OPSET = 18
_LIMITS = np.finfo(np.float32)

_NODES = f"""
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    two = Constant <value = int64[1] {{2}}> ()
    four = Constant <value = int64[1] {{4}}> ()
    nil = Constant <value = float[1] {{0.0}}> ()
    unit = Constant <value = float[1] {{1.0}}> ()
    tiny = Constant <value = float[1] {{{_LIMITS.tiny}}}> ()
    huge = Constant <value = float[1] {{{_LIMITS.max}}}> ()

    is_hard = Equal (method, zero)
    hard = CastLike (is_hard, unit)
    is_linear = Equal (method, one)
    linear = CastLike (is_linear, unit)
    is_gaussian = Equal (method, two)
    gaussian = CastLike (is_gaussian, unit)
    quotient = Div (gaussian, sigma)
    steep = Min (quotient, huge)
    slope = Neg (steep)
    groups = Mul (classes, per_class)

    front = Shape <start = 0, end = -2> (boxes)
    factors = Concat <axis = 0> (one, front)
    images = ReduceProd <keepdims = 1> (factors)
    length = Shape <start = -2, end = -1> (boxes)
    shape3 = Concat <axis = 0> (images, length, four)
    shape2 = Concat <axis = 0> (images, length)
    boxes3 = Reshape <allowzero = 1> (boxes, shape3)
    scores2 = Reshape <allowzero = 1> (scores, shape2)
    classes2 = Reshape <allowzero = 1> (classes, shape2)
    groups2 = Reshape <allowzero = 1> (groups, shape2)
    empty = ConstantOfShape <value = int64[1] {{0}}> (zero)
    empty_scores = ConstantOfShape <value = float[1] {{0.0}}> (zero)
    once = Squeeze (one)
    always = Cast <to = 9> (once)

    indices, kept_scores, kept_classes, batch_indices = Loop <body = suppress (
        int64 b, bool going, int64[p] indices_before, float[p] scores_before, int64[p] classes_before,
        int64[p] images_before
    ) => (
        bool on, int64[q] indices_after, float[q] scores_after, int64[q] classes_after, int64[q] images_after
    ) {{
        on = Identity (going)
        my_boxes = Gather (boxes3, b)
        my_scores = Gather (scores2, b)
        my_classes = Gather (classes2, b)
        my_groups = Gather (groups2, b)

        columns = Transpose <perm = [1, 0]> (my_boxes)
        first_corners, second_corners = Split <axis = 0, num_outputs = 2> (columns)
        open_sides = Sub (second_corners, first_corners)
        sides = Relu (open_sides)
        widths, heights = Split <axis = 0, num_outputs = 2> (sides)
        product = Mul (widths, heights)
        enough = GreaterOrEqual (product, tiny)
        finite = LessOrEqual (product, huge)
        normal = And (enough, finite)
        lows = Where (normal, first_corners, nil)
        highs = Where (normal, second_corners, nil)
        area = Where (normal, product, nil)

        good = GreaterOrEqual (my_scores, min_score)
        found = NonZero (good)
        order0 = Squeeze (found, zero)
        low0 = Gather <axis = 1> (lows, order0)
        high0 = Gather <axis = 1> (highs, order0)
        area0 = Gather <axis = 1> (area, order0)
        score0 = Gather (my_scores, order0)
        group0 = Gather (my_groups, order0)
        count0 = Size (order0)
        some0 = Cast <to = 9> (count0)

        low9, high9, area9, score9, group9, order9, kept, decays = Loop <body = step (
            int64 i, bool some, float[2, n] low, float[2, n] high, float[1, n] extent, float[n] score,
            int64[n] group, int64[n] order
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
            iou = Squeeze (ratio, zero)

            square = Mul (iou, iou)
            exponent = Mul (square, slope)
            bell = Exp (exponent)
            is_over = Greater (iou, iou_threshold)
            over = CastLike (is_over, unit)
            tilt = Mul (linear, iou)
            loss = Add (hard, tilt)
            cut = Mul (over, loss)
            left = Sub (unit, cut)
            pull = Mul (bell, left)
            same = Equal (group, my_group)
            weight = Where (same, pull, unit)
            decayed = Mul (score, weight)

            fair = GreaterOrEqual (decayed, min_score)
            heavy = GreaterOrEqual (weight, tiny)
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

        kept_here = Gather (my_classes, kept)
        how_many = Shape (kept)
        here = Expand (b, how_many)
        indices_after = Concat <axis = 0> (indices_before, kept)
        scores_after = Concat <axis = 0> (scores_before, decays)
        classes_after = Concat <axis = 0> (classes_before, kept_here)
        images_after = Concat <axis = 0> (images_before, here)
    }}> (images, always, empty, empty_scores, empty, empty)
"""


def soft_nms() -> onnx.FunctionProto:
    """The body of `calmclip.models.ops.spec.SOFT_NMS`."""
    return local_function(SOFT_NMS, _NODES, OPSET)
