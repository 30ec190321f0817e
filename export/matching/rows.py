"""Rows in steps of their own (`export.quantizers.rows`), and the root-mean-square norm, in a graph of standard ops."""

from dataclasses import dataclass

import numpy as np
import onnx
from onnxscript import ir

from calmclip.export.matching import in_ir
from calmclip.export.matching.values import columns, constant_array, optional_input, other_input, producer, shape

MIDDLE, STEPS, LEAST = 128.0, 127.0, 1e-30


@dataclass(frozen=True)
class Rows:
    """uint8 ``value`` = ``real`` / ``scale`` + 128, with a scale for each row."""

    real: ir.Value
    value: ir.Value
    scale: ir.Value
    nodes: tuple[ir.Node, ...]  # between


@dataclass(frozen=True)
class Norm:
    """``x`` / sqrt(mean of x^2 + ``epsilon``) * ``weight`` along the last axis."""

    x: ir.Value
    weight: ir.Value
    epsilon: float


def number(value: ir.Value | None) -> float | None:
    """The number that a constant of one number holds."""
    array = constant_array(value)
    return float(array.item()) if array is not None and array.size == 1 else None


def rows_of(value: ir.Value | None) -> Rows | None:
    """The rows that the uint8 tensor ``value`` holds; None if it is no such tensor."""
    cast = producer(value, "Cast")
    if value is None or cast is None or cast.attributes.get_int("to", 0) != ir.DataType.UINT8:
        return None
    around = producer(cast.inputs[0], "Add")
    whole = None if around is None else producer(around.inputs[0], "Round")
    ratio = None if whole is None else producer(whole.inputs[0], "Div")
    bound = None if ratio is None else producer(ratio.inputs[1], "Max")
    share = None if bound is None else producer(bound.inputs[0], "Div")
    most = None if share is None else producer(share.inputs[0], "ReduceMax")
    size = None if most is None else producer(most.inputs[0], "Abs")
    if around is None or whole is None or ratio is None or bound is None or share is None or most is None:
        return None
    real, scale = ratio.inputs[0], ratio.inputs[1]
    if size is None or real is None or scale is None or size.inputs[0] is not real or not is_over_columns(most):
        return None
    numbers = number(around.inputs[1]), number(share.inputs[1]), number(bound.inputs[1])
    if numbers != (MIDDLE, STEPS, float(np.float32(LEAST))):
        return None
    return Rows(real, value, scale, (size, most, share, bound, ratio, whole, around, cast))


def is_over_columns(reduce: ir.Node) -> bool:
    """Whether a Reduce is over the last axis alone, and keeps it."""
    sizes, axes = reduce.inputs[0].shape if reduce.inputs[0] is not None else None, optional_input(reduce, 1)
    places = constant_array(axes)
    if places is None or places.size != 1 or reduce.attributes.get_int("keepdims", 1) != 1:
        return False
    return places.item() == -1 or (sizes is not None and places.item() == len(sizes) - 1)


def norm(value: ir.Value | None) -> Norm | None:
    """The root-mean-square norm that makes ``value``, with a number of weight for each column; None if none does."""
    weighted = producer(value, "Mul")
    if weighted is None:
        return None
    for place in (0, 1):
        unit, weight = weighted.inputs[place], weighted.inputs[1 - place]
        times = producer(unit, "Mul")
        if times is None or weight is None or weight.producer() is not None:
            continue
        for inner in (0, 1):
            x, root = times.inputs[inner], times.inputs[1 - inner]
            epsilon = None if x is None else _epsilon(x, root)
            if x is not None and epsilon is not None and shape(weight) == (columns(x),):
                return Norm(x, weight, epsilon)
    return None


def has_norm(model: onnx.ModelProto) -> bool:
    """Whether the graph has a root-mean-square norm, as language models have it."""
    if not any(node.op_type == "Reciprocal" for node in model.graph.node):
        return False
    return any(norm(node.outputs[0]) for node in in_ir(model).graph if node.op_type == "Mul")


def _epsilon(x: ir.Value, root: ir.Value | None) -> float | None:
    """The number that is added to the mean of x^2, if ``root`` is 1 / sqrt of the sum."""
    reciprocal = producer(root, "Reciprocal")
    square_root = None if reciprocal is None else producer(reciprocal.inputs[0], "Sqrt")
    padded = None if square_root is None else producer(square_root.inputs[0], "Add")
    mean = None if padded is None else producer(padded.inputs[0], "ReduceMean")
    square = None if mean is None else producer(mean.inputs[0], "Mul")
    if padded is None or mean is None or square is None or not is_over_columns(mean):
        return None
    epsilon = number(other_input(padded, mean.outputs[0]))
    return epsilon if [*square.inputs] == [x, x] and epsilon is not None and epsilon >= 0 else None
