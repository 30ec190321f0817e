"""Pools: whether an op of ours with channels last may stand for one."""

from onnxscript import ir

from calmclip.export.matching.values import CHANNELS_FIRST, CHANNELS_LAST, is_transpose


def between_channels_last(x: ir.Value | None, y: ir.Value) -> bool:
    """Whether the pool from ``x`` to ``y`` reads a tensor that has channels last before a Transpose, or makes one that
    a Transpose moves to channels last."""
    first = x is not None and is_transpose(x.producer(), CHANNELS_FIRST)
    return first or any(is_transpose(use.node, CHANNELS_LAST) for use in y.uses())


def unfit_window(node: ir.Node) -> str:
    """Why no op of ours has the windows of the pool ``node``; "" if one may."""
    if len(node.attributes.get_ints("kernel_shape", [])) != 2:
        return "its window does not have two sides"
    if set(node.attributes.get_ints("dilations", [1, 1])) != {1}:
        return "its window is dilated"
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", ""):
        return "its pads depend on the size of its input"
    return "its last windows may reach beyond its pads" if node.attributes.get_int("ceil_mode", 0) else ""
