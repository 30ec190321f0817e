"""`RotaryAttention` as a local function of standard ops. Its memory is that of all logits, [B, H, T, S].

A weight or a table of one number means that there is none; the sizes decide when the graph is loaded, because weights
and tables have fixed ranks.
"""

import onnx

from calmclip.export.functions.template import local_function
from calmclip.models.ops.spec import ROTARY_ATTENTION

_PART = """
    {x}_column = Constant <value_int: int = @{x}_start> ()
    {x}_first = Reshape ({x}_column, single)
    {x}_width = Mul ({number}, size)
    {x}_end = Add ({x}_first, {x}_width)
    {x}_cut = Slice ({x}, {x}_first, {x}_end, last)
    {x}_sides = Concat <axis = 0> (nothing, nothing, {number}, size)
    {x}_apart = Reshape ({x}_cut, {x}_sides)
    {x}_heads = Transpose <perm = [0, 2, 1, 3]> ({x}_apart)
"""
_PREPARED = """
    {x}_weights = Size ({x}_weight)
    {x}_has_weight = Greater ({x}_weights, one_number)
    {x}_unit = If ({x}_has_weight) <
        then_branch = {x}_rms () => (float[] {x}_normed) {{
            {x}_squares = Mul ({x}_heads, {x}_heads)
            {x}_mean = ReduceMean <keepdims = 1> ({x}_squares, minus)
            {x}_padded = Add ({x}_mean, epsilon)
            {x}_root = Sqrt ({x}_padded)
            {x}_even = Div ({x}_heads, {x}_root)
            {x}_normed = Mul ({x}_even, {x}_weight)
        }},
        else_branch = {x}_plain () => (float[] {x}_same) {{
            {x}_same = Identity ({x}_heads)
        }}
    >
    {x}_numbers = Size ({x}_cos)
    {x}_turns = Greater ({x}_numbers, one_number)
    {x}_ready = If ({x}_turns) <
        then_branch = {x}_turned () => (float[] {x}_rotated) {{
            {x}_two = Constant <value = int64[1] {{2}}> ()
            {x}_half = Div (size, {x}_two)
            {x}_a = Slice ({x}_unit, nothing, {x}_half, minus)
            {x}_b = Slice ({x}_unit, {x}_half, size, minus)
            {x}_across = Concat <axis = -1> ({x}_b, {x}_a)
            {x}_kept = Mul ({x}_unit, {x}_cos)
            {x}_added = Mul ({x}_across, {x}_sin)
            {x}_rotated = Add ({x}_kept, {x}_added)
        }},
        else_branch = {x}_still () => (float[] {x}_unturned) {{
            {x}_unturned = Identity ({x}_unit)
        }}
    >
"""
_NODES = f"""
    nothing = Constant <value = int64[1] {{0}}> ()
    single = Constant <value = int64[1] {{1}}> ()
    last = Constant <value = int64[1] {{2}}> ()
    minus = Constant <value = int64[1] {{-1}}> ()
    one_number = Constant <value_int = 1> ()
    epsilon = Constant <value_float: float = @epsilon> ()
    head_number = Constant <value_int: int = @heads> ()
    group_number = Constant <value_int: int = @groups> ()
    dim_number = Constant <value_int: int = @dims> ()
    heads = Reshape (head_number, single)
    groups = Reshape (group_number, single)
    size = Reshape (dim_number, single)
    {_PART.format(x="q", number="heads")}
    {_PART.format(x="k", number="groups")}
    {_PART.format(x="v", number="groups")}
    {_PREPARED.format(x="q")}
    {_PREPARED.format(x="k")}
    tokens = Shape <start = 1, end = 2> (q)
    together = Concat <axis = 0> (nothing, groups, minus, size)
    rows = Concat <axis = 0> (nothing, heads, tokens, size)
    q_grouped = Reshape (q_ready, together)
    keys = Transpose <perm = [0, 1, 3, 2]> (k_ready)
    products = MatMul (q_grouped, keys)
    spread = Concat <axis = 0> (nothing, heads, tokens, minus)
    logits = Reshape (products, spread)
    cap = Constant <value_float: float = @cap> ()
    low = Constant <value_float: float = @gamma> ()
    high = Constant <value_float: float = @zeta> ()
    nil = Constant <value_float = 0.0> ()
    whole = Constant <value_float = 1.0> ()
    is_capped = Greater (cap, nil)
    bounded = If (is_capped) <
        then_branch = capped () => (float[] cut_logits) {{
            tangent = Tanh (logits)
            cut_logits = Mul (tangent, cap)
        }},
        else_branch = uncapped () => (float[] same_logits) {{
            same_logits = Identity (logits)
        }}
    >
    bound = Constant <value_float = -10000.0> ()
    lowest = Constant <value_float = -1e30> ()
    seen = Greater (mask, bound)
    added = Add (bounded, mask)
    masked = Where (seen, added, lowest)
    soft = Softmax <axis = -1> (masked)
    span = Sub (high, low)
    is_plain = Equal (span, whole)
    p = If (is_plain) <
        then_branch = as_it_is () => (float[] kept) {{
            kept = Identity (soft)
        }},
        else_branch = clipped () => (float[] cut) {{
            wide = Mul (soft, span)
            moved = Add (wide, low)
            cut = Clip (moved, nil, whole)
        }}
    >
    columns = Shape <start = -1> (p)
    group_sides = Concat <axis = 0> (nothing, groups, minus, columns)
    p_grouped = Reshape (p, group_sides)
    y_grouped = MatMul (p_grouped, v_heads)
    y_apart = Reshape (y_grouped, rows)
    y_rows = Transpose <perm = [0, 2, 1, 3]> (y_apart)
    width = Mul (heads, size)
    flat = Concat <axis = 0> (nothing, nothing, width)
    y = Reshape (y_rows, flat)
"""


def rotary_attention() -> onnx.FunctionProto:
    """The body of `models.ops.spec.ROTARY_ATTENTION`."""
    return local_function(ROTARY_ATTENTION, _NODES, opset=18)
