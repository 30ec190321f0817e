"""Softmax in float32 over one axis -> `ai.calmclip.Softmax` with gamma = 0, zeta = 1.

Source: the op is `calmclip.models.ops.spec.SOFTMAX`; its two-pass form Dukhan & Ablavatski 2020 (arXiv 2001.04438).

It matches attention and scores over labels alike, also between DequantizeLinear and QuantizeLinear. There ONNX Runtime
(1.32) would run QLinearSoftmax, which takes 3.5 to 5 times as long as the three ops with ours and rounds one number in
50 to 200 to a neighbour (50 to 197 tokens). A Softmax whose result is tested for NaN is not matched: decompositions of
attention do so for rows that are masked throughout, and our op gives such a row numbers.
"""

from onnxscript import ir

from calmclip.export.matching import Match, at_each_node
from calmclip.export.matching.values import insert
from calmclip.export.rewrites import REWRITES, Rewrite
from calmclip.models.ops.spec import SOFTMAX


def match(node: ir.Node) -> Match | str | None:
    if node.domain or node.op_type != "Softmax":
        return None
    return unfit(node) or replacement(node, node, 0.0, 1.0)


def unfit(softmax: ir.Node) -> str:
    """Why the op cannot stand for a standard Softmax; "" if it can."""
    x = softmax.inputs[0]
    if x is None or x.dtype != ir.DataType.FLOAT:
        return f"its input is {x.dtype.name if x is not None and x.dtype else 'of unknown type'}; the op takes FLOAT"
    if "IsNaN" in {use.node.op_type for use in softmax.outputs[0].uses()}:
        return "its result is tested for NaN (IsNaN); the op makes no NaN of rows that are masked throughout"
    return ""


def replacement(softmax: ir.Node, last: ir.Node, gamma: float, zeta: float) -> Match:
    """The op for the nodes from ``softmax`` to ``last``."""
    settings = {"axis": softmax.attributes.get_int("axis", -1), "gamma": gamma, "zeta": zeta}
    return Match((last.outputs[0],), lambda y: insert(last, SOFTMAX, softmax.inputs, y, **settings))


REWRITES.register("softmax")(Rewrite(SOFTMAX, at_each_node(match), replaces=1))
