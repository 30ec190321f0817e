"""`QuantAttention` as a local function: float attention between DequantizeLinear and QuantizeLinear.

Clip replaces -inf as in `softmax`. The conditions of the Ifs are attributes and p_scale. If p_scale is an initializer,
ONNX Runtime folds both Ifs when it loads the graph.
"""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import QUANT_ATTENTION

_NODES = f"""
    nothing = Constant <value = int64[1] {{0}}> ()
    single = Constant <value = int64[1] {{1}}> ()
    last = Constant <value = int64[1] {{2}}> ()
    minus = Constant <value = int64[1] {{-1}}> ()
    number = Constant <value_int: int = @heads> ()
    all_columns = Constant <value_int: int = @width> ()
    q_column = Constant <value_int: int = @q_start> ()
    k_column = Constant <value_int: int = @k_start> ()
    v_column = Constant <value_int: int = @v_start> ()
    head_count = Reshape (number, single)
    columns = Reshape (all_columns, single)
    q_first = Reshape (q_column, single)
    k_first = Reshape (k_column, single)
    v_first = Reshape (v_column, single)
    q_end = Add (q_first, columns)
    k_end = Add (k_first, columns)
    v_end = Add (v_first, columns)
    dims = Div (columns, head_count)
    apart = Concat <axis = 0> (nothing, nothing, head_count, dims)
    together = Concat <axis = 0> (nothing, nothing, columns)
    middle = Constant <value = uint8 {{128}}> ()

    q_cut = Slice (q, q_first, q_end, last)
    k_cut = Slice (k, k_first, k_end, last)
    v_cut = Slice (v, v_first, v_end, last)
    q_real = DequantizeLinear (q_cut, q_scale, q_zero)
    k_real = DequantizeLinear (k_cut, k_scale, middle)
    v_real = DequantizeLinear (v_cut, v_scale, middle)
    q_apart = Reshape (q_real, apart)
    k_apart = Reshape (k_real, apart)
    v_apart = Reshape (v_real, apart)
    queries = Transpose <perm = [0, 2, 1, 3]> (q_apart)
    keys = Transpose <perm = [0, 2, 3, 1]> (k_apart)
    values = Transpose <perm = [0, 2, 1, 3]> (v_apart)

    lowest = Constant <value_float = -3.4028234663852886e38> ()
    highest = Constant <value_float = inf> ()
    logits = MatMul (queries, keys)
    masked = Add (logits, mask)
    seen = Clip (masked, lowest, highest)
    soft = Softmax <axis = -1> (seen)
    low = Constant <value_float: float = @gamma> ()
    high = Constant <value_float: float = @zeta> ()
    nil = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    span = Sub (high, low)
    plain = Equal (span, one)
    p = If (plain) <
        then_branch = as_it_is () => (float[] kept) {{
            kept = Identity (soft)
        }},
        else_branch = clipped () => (float[] cut) {{
            wide = Mul (soft, span)
            moved = Add (wide, low)
            cut = Clip (moved, nil, one)
        }}
    >
    bottom = Constant <value = uint8 {{0}}> ()
    finest = Constant <value = float {{{1 / 255}}}> ()
    is_relative = Equal (p_scale, nil)
    weights = If (is_relative) <
        then_branch = of_the_row () => (float[] row_weights) {{
            greatest = ReduceMax <keepdims = 1> (seen, minus)
            below = Sub (seen, greatest)
            power = Exp (below)
            power_bytes = QuantizeLinear (power, finest, bottom)
            power_real = DequantizeLinear (power_bytes, finest, bottom)
            sum = ReduceSum <keepdims = 1> (power_real, minus)
            row_weights = Div (power_real, sum)
        }},
        else_branch = of_the_tensor () => (float[] tensor_weights) {{
            p_bytes = QuantizeLinear (p, p_scale, bottom)
            tensor_weights = DequantizeLinear (p_bytes, p_scale, bottom)
        }}
    >

    y_apart = MatMul (weights, values)
    y_rows = Transpose <perm = [0, 2, 1, 3]> (y_apart)
    y_real = Reshape (y_rows, together)
    y = QuantizeLinear <axis = -1> (y_real, y_scale, y_zero)
"""


def quant_attention() -> onnx.FunctionProto:
    """The body of `models.ops.spec.QUANT_ATTENTION`."""
    return local_function(QUANT_ATTENTION, _NODES)
