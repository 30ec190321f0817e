"""What a bounded activation answers outside of its bounds, as nodes of standard ONNX.

Source: ProAct (code `hamidmousavi0/reliable-relu-toolbox`): the hard form answers 0 above lambda, the smooth form is
max(0, x - x sigmoid(20 (x - lambda))). Chen et al. 2021, Ranger (arXiv 2003.13874): the clamp, and the bounds of both
sides.

=======  ================================================================================  =====
form     y, for the bounds low and high                                                     NaN
=======  ================================================================================  =====
clamp    max(low, min(x, high))                                                             NaN, or 0 with a guard
zero     x if low <= x <= high, else 0                                                      0
smooth   low >= 0: max(0, x sigmoid(20 (high - x))); else x sigmoid(20 (high - x)) sigmoid(20 (x - low))   as clamp
=======  ================================================================================  =====

ONNX Runtime's Clip, Max and Min keep NaN, so a guard is two nodes of its own: Where(IsNaN(x), 0, x).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from calmclip.export.graph import Draft, node_of
from calmclip.models.flow import Array

STEEPNESS = 20.0  # of the smooth form: the paper's
LOW, HIGH = ".bound_low", ".bound_high"
_SPENT = 2.0  # beyond a bound: there float32 has sigmoid(-20 * 2) x = 0 for every x that a clamp lets pass


@dataclass(frozen=True)
class Bound:
    """``low`` and ``high``: float32, of rank 0, or broadcast over the channels of the tensor."""

    low: Array
    high: Array


@dataclass(frozen=True)
class Names:
    """Of one bound in a graph: the unbounded tensor, the bounded one, and the constants of the bounds."""

    source: str
    target: str
    low: str
    high: str

    def inner(self, part: str) -> str:
        return f"{self.target}.{part}"


Nodes = list[onnx.NodeProto]
Form = Callable[[Draft, Names, Bound], Nodes]


def guard(draft: Draft, source: str, target: str) -> Nodes:
    """NaN -> 0."""
    zero = draft.add("bound_zero", np.float32(0))
    return [
        node_of("IsNaN", [source], f"{target}.is_nan"),
        node_of("Where", [f"{target}.is_nan", zero, source], target),
    ]


def clamp(draft: Draft, names: Names, bound: Bound) -> Nodes:
    return _between(names.source, names.target, names.low, names.high, bound)


def zero(draft: Draft, names: Names, bound: Bound) -> Nodes:
    """Comparisons with NaN are false, so NaN becomes 0."""
    nothing = draft.add("bound_zero", np.float32(0))
    above, below, inside = map(names.inner, ("above", "below", "inside"))
    return [
        node_of("GreaterOrEqual", [names.source, names.low], above),
        node_of("LessOrEqual", [names.source, names.high], below),
        node_of("And", [above, below], inside),
        node_of("Where", [inside, names.source, nothing], names.target),
    ]


def smooth(draft: Draft, names: Names, bound: Bound) -> Nodes:
    """The clamp before it keeps infinity times 0, which is NaN, away."""
    steep = draft.add("bound_steepness", np.float32(STEEPNESS))
    wide = Bound(bound.low - np.float32(_SPENT), bound.high + np.float32(_SPENT))
    least, most = draft.add(names.inner("least"), wide.low), draft.add(names.inner("most"), wide.high)
    near = names.inner("near")
    nodes = _between(names.source, near, least, most, wide)
    upper, lower = _gate(names, "upper", [names.high, near], steep), _gate(names, "lower", [near, names.low], steep)
    if bool(np.all(bound.low >= 0)):
        product = node_of("Mul", [near, names.inner("upper")], names.inner("gated"))
        return [*nodes, *upper, product, node_of("Relu", [names.inner("gated")], names.target)]
    product = node_of("Mul", [near, names.inner("upper")], names.inner("gated"))
    return [
        *nodes, *upper, *lower, product, node_of("Mul", [names.inner("gated"), names.inner("lower")], names.target),
    ]  # fmt: skip


FORMS: dict[str, Form] = {"clamp": clamp, "zero": zero, "smooth": smooth}


def _gate(names: Names, side: str, difference: Sequence[str], steep: str) -> Nodes:
    """sigmoid(20 (a - b)), as the tensor ``side``."""
    apart, scaled, gate = (names.inner(part) for part in (f"{side}_apart", f"{side}_scaled", side))
    return [
        node_of("Sub", difference, apart),
        node_of("Mul", [apart, steep], scaled),
        node_of("Sigmoid", [scaled], gate),
    ]


def _between(source: str, target: str, low: str, high: str, bound: Bound) -> Nodes:
    """Clip takes one number for each side; bounds for each channel are Max and Min."""
    if bound.low.ndim == bound.high.ndim == 0:
        return [node_of("Clip", [source, low, high], target)]
    risen = f"{target}.risen"
    return [node_of("Max", [source, low], risen), node_of("Min", [risen, high], target)]
