"""Softmax -> Mul(a) -> Add(b) -> Clip(0, 1) becomes `ai.calmclip.Softmax` with gamma = b, zeta = a + b.

Source: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4: clip((zeta - gamma) softmax(x) + gamma, 0, 1), with
gamma <= 0 and zeta >= 1. The numbers of Mul and Add may stand on either side; Sub(-b) is Add(b).
"""

import numpy as np
from onnxscript import ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

from calmclip.export.functions.softmax import softmax
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _patterns
from calmclip.export.rewrites.softmax import axis, no, ours, unfit
from calmclip.models.ops.spec import SOFTMAX

_ROUNDING = 4 * 2.0**-24  # of a, b and their sum, at 1
_LARGEST = 1e30  # of gamma and zeta, which the op takes


class Clipped(RewriteRuleClassBase):
    sign = 1

    def pattern(self, op, x, a, b, low, high):  # type: ignore[no-untyped-def]
        return op.Clip(op.Add(self.wide(op, x, a), b), low, high)

    def wide(self, op, x, a):  # type: ignore[no-untyped-def]
        return op.Mul(op.Softmax(x, _allow_other_attributes=True, _outputs=["y"]), a)

    def check(self, context, x, y, a, b, low, high, **_) -> MatchResult:  # type: ignore[no-untyped-def]
        if why := unfit(x, y):
            return no(why)
        rank = 1 if x.shape is None else max(1, len(x.shape))
        found = {name: _scalar(value, rank) for name, value in (("a", a), ("b", b), ("low", low), ("high", high))}
        if unknown := [name for name, value in found.items() if value is None]:
            names = {"a": "the factor", "b": "the summand", "low": "the clip's minimum", "high": "the clip's maximum"}
            return no(f"{' and '.join(names[name] for name in unknown)} is no constant number")
        if (found["low"], found["high"]) != (0.0, 1.0):
            return no(f"the clip is [{found['low']:g}, {found['high']:g}]; expected [0, 1]")
        gamma = self.sign * float(found["b"])
        zeta = float(found["a"]) + gamma
        if not (-_LARGEST <= gamma <= 0 and 1 - _ROUNDING <= zeta <= _LARGEST):
            return no(f"gamma is {gamma:g} and zeta {zeta:g}; expected -1e30 <= gamma <= 0 and 1 <= zeta <= 1e30")
        return MatchResult()

    def rewrite(self, op, x, y, a, b, **_):  # type: ignore[no-untyped-def]
        factor, summand = (np.float32(_patterns.constant(value).numpy().item()) for value in (a, b))
        gamma = np.float32(self.sign) * summand
        return ours(op, x, axis(y), float(gamma), float(stretch(factor, gamma)))


class Subtracted(Clipped):
    sign = -1

    def pattern(self, op, x, a, b, low, high):  # type: ignore[no-untyped-def]
        return op.Clip(op.Sub(self.wide(op, x, a), b), low, high)


def stretch(a: np.float32, gamma: np.float32) -> np.float32:
    """zeta, at least 1, for which the kernel's float32(zeta - gamma) comes nearest to ``a``."""
    near = np.float32(a + gamma)
    tried = [np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(np.inf)), np.float32(1)]
    return min((zeta for zeta in tried if zeta >= 1), key=lambda zeta: (abs(np.float32(zeta - gamma) - a), zeta))


def _scalar(value: ir.Value | None, rank: int) -> float | None:
    """The one number in ``value``, if it is constant and broadcasting it to ``rank`` axes adds none."""
    tensor = _patterns.constant(value)
    return (
        float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 and len(tensor.shape) <= rank else None
    )


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    return _patterns.rewrite(model, Clipped, Subtracted, replaces=4)


REWRITES.register("clipped_softmax")(Rewrite(SOFTMAX, lambda params: softmax(), rewrite, replaces=4))
