"""Softmax in float32 over one axis -> `ai.calmclip.Softmax` with gamma = 0, zeta = 1.

Source: the op is `calmclip.models.ops.spec.SOFTMAX`; its two-pass form Dukhan & Ablavatski 2020 (arXiv 2001.04438).

For attention and for scores over labels alike, between DequantizeLinear and QuantizeLinear too: there ONNX Runtime
(1.32) would run QLinearSoftmax, which takes 3.5 to 5 times as long as the three ops with ours and rounds one number in
50 to 200 to a neighbour (50 to 197 tokens). What it leaves alone: a Softmax whose NaN the graph looks for, as
decompositions of attention do for rows that are masked throughout: ours answers such a row with numbers.
"""

from onnxscript import ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

from calmclip.export.functions.softmax import softmax
from calmclip.export.rewrites import REWRITES, NoParams, Outcome, Rewrite, _patterns
from calmclip.models.ops.spec import DOMAIN, SOFTMAX, VERSION


class Plain(RewriteRuleClassBase):
    def pattern(self, op, x):  # type: ignore[no-untyped-def]
        return op.Softmax(x, _allow_other_attributes=True, _outputs=["y"])

    def check(self, context, x: ir.Value, y: ir.Value, **_) -> MatchResult:  # type: ignore[no-untyped-def]
        return no(why) if (why := unfit(x, y)) else MatchResult()

    def rewrite(self, op, x: ir.Value, y: ir.Value, **_):  # type: ignore[no-untyped-def]
        return ours(op, x, axis(y))


def unfit(x: ir.Value, y: ir.Value) -> str:
    """Why the op cannot stand for ``y = Softmax(x)``; "" when it can."""
    if x.dtype != ir.DataType.FLOAT:
        return f"its input is {x.dtype.name if x.dtype else 'of unknown type'}; the op takes FLOAT"
    if "IsNaN" in {use.node.op_type for use in y.uses()}:
        return "its NaN is looked for (IsNaN); the op makes none of rows that are masked throughout"
    return ""


def axis(y: ir.Value) -> int:
    node = y.producer()
    assert node is not None  # the pattern's own node
    return node.attributes.get_int("axis", -1)


def ours(op, x: ir.Value, along: int, gamma: float = 0.0, zeta: float = 1.0):  # type: ignore[no-untyped-def]
    settings = {"axis": along, "gamma": gamma, "zeta": zeta}
    return op.Softmax(x, **settings, _domain=DOMAIN, _version=VERSION)


def no(why: str) -> MatchResult:
    return MatchResult().fail(why)


def rewrite(model: ir.Model, params: NoParams) -> Outcome:
    return _patterns.rewrite(model, Plain, replaces=1)


REWRITES.register("softmax")(Rewrite(SOFTMAX, lambda params: softmax(), rewrite, replaces=1))
