"""Softmax -> Mul(a) -> Add(b) -> Clip(0, 1) becomes `ai.calmclip.Softmax` with gamma = b, zeta = a + b.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4: clip((zeta - gamma) softmax(x) + gamma, 0, 1), with
gamma <= 0 and zeta >= 1. The numbers of Mul and Add may stand on either side; Sub(-b) is Add(b).
"""

import numpy as np
from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.values import constant_tensor, optional_input, other_input, producer, sole_consumer
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.export.rewrites.softmax import replacement, unfit
from calmclip.models.ops.spec import SOFTMAX

_ROUNDING = 4 * 2.0**-24  # of a, b and their sum, at 1
_MAX = 1e30  # of -gamma and zeta, for the op
_NAMES = ("the factor", "the summand", "the clip's minimum", "the clip's maximum")


def match(clip: ir.Node) -> Match | str | None:
    if clip.domain or clip.op_type != "Clip":
        return None
    add = producer(clip.inputs[0], "Add", "Sub")
    terms = () if add is None else add.inputs[:1] if add.op_type == "Sub" else add.inputs
    mul = next((node for term in terms if (node := producer(term, "Mul"))), None)
    softmax = None if mul is None else next((node for f in mul.inputs if (node := producer(f, "Softmax"))), None)
    if add is None or mul is None or softmax is None:
        return None
    if any(sole_consumer(node.outputs[0]) is None for node in (softmax, mul, add)):
        return "a value between its nodes is used elsewhere too"
    if why := unfit(softmax):
        return why
    x = softmax.inputs[0]
    rank = 1 if x is None or x.shape is None else max(1, len(x.shape))
    constants = (
        other_input(mul, softmax.outputs[0]),
        other_input(add, mul.outputs[0]),
        *map(optional_input, [clip] * 2, (1, 2)),
    )
    numbers = [_scalar(value, rank) for value in constants]
    if None in numbers:
        unknown = [name for name, number in zip(_NAMES, numbers, strict=True) if number is None]
        return f"not one constant number: {', '.join(unknown)}"
    factor, summand, low, high = (np.float32(number) for number in numbers)
    if low != 0 or high != 1:
        return f"the clip is [{low:g}, {high:g}]; expected [0, 1]"
    gamma = -summand if add.op_type == "Sub" else summand
    zeta = float(factor) + float(gamma)
    if not (-_MAX <= gamma <= 0 and 1 - _ROUNDING <= zeta <= _MAX):
        return f"gamma is {gamma:g} and zeta {zeta:g}; expected -1e30 <= gamma <= 0 and 1 <= zeta <= 1e30"
    return replacement(softmax, clip, float(gamma), float(stretch(factor, gamma)))


def stretch(a: np.float32, gamma: np.float32) -> np.float32:
    """zeta, at least 1, for which the kernel's float32(zeta - gamma) comes nearest to ``a``."""
    near = np.float32(a + gamma)
    candidates = [np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(np.inf)), np.float32(1)]
    return min((zeta for zeta in candidates if zeta >= 1), key=lambda zeta: (abs(np.float32(zeta - gamma) - a), zeta))


def _scalar(value: ir.Value | None, rank: int) -> float | None:
    """The one number in ``value``, if it is constant and broadcasting it to ``rank`` axes adds none."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or len(tensor.shape) > rank:
        return None
    return float(tensor.numpy().item())


REWRITES.register("clipped_softmax")(Rewrite(SOFTMAX, at_each_node(match), replaces=4))
