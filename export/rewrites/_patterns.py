"""Patterns of onnxscript's rewriter, driven by us: one graph, no function bodies, and a reason for every near miss.

Its own driver also rewrites the functions of a model (the body of our Softmax would become a call of itself), folds
constants and renames what it likes; its matcher and its checks are what we want.
"""

from collections.abc import Sequence

import numpy as np
from onnxscript import ir
from onnxscript.rewriter import MatchingTracer, MatchStatus, RewriteRule, RewriteRuleClassBase

from calmclip.export.rewrites import Outcome
from calmclip.models.flow import Array


def rewrite(model: ir.Model, *forms: type[RewriteRuleClassBase], replaces: int) -> Outcome:
    """Any of a rule's ``forms`` wherever it fits, operands in either order.

    A near miss is a place where all but its check fits, or where a value between its ``replaces`` nodes is used.
    """
    rules = [rule for form in forms for rule in form.rule().commute()]
    fired, missed = 0, {}
    for node in model.graph:
        tracer = MatchingTracer()
        if _fire(model, node, rules, tracer):
            fired += 1
            continue
        for found in [match for matches in tracer.best_matches_map.values() for match in matches]:
            name = node.name or f"the {node.op_type} that makes {node.outputs[0].name}"
            if found.status == MatchStatus.CONDITION_FAILED:
                missed[name] = found.match_result.reason
            elif len(found.match_result.nodes) == replaces:
                missed[name] = "a value between its nodes is used elsewhere too"
    return Outcome(fired, missed)


def _fire(model: ir.Model, node: ir.Node, rules: Sequence[RewriteRule], tracer: MatchingTracer) -> bool:
    for rule in rules:
        found = rule.try_rewrite(model, model.graph, node, tracer=tracer)
        if found is None:
            continue
        (made,) = found.new_nodes
        ir.convenience.replace_nodes_and_values(
            model.graph, node, found.match.nodes, found.new_nodes, found.match.outputs, found.new_outputs
        )
        made.name = f"{made.op_type}.{made.outputs[0].name}"
        return True
    return False


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What an initializer or a Constant node holds; None for anything else, an input's default among it."""
    return None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)


def array(value: ir.Value | None) -> Array | None:
    """The numbers of a constant; None where there are none, or too many to have been brought (`export.light.SMALL`)."""
    held = constant(value)
    return None if held is None or isinstance(held, ir.ExternalTensor) else np.asarray(held.numpy())
