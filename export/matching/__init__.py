"""Find patterns in a graph of onnxscript's IR and replace them: the common code of the rules in `export.rewrites`.

A rule is one function, `match`. It gets a node and returns a `Match`, a reason, or None. `at_each_node` loops over the
graph. onnxscript's own rewriter is not used: it also rewrites function bodies (the body of our Softmax would become a
call of itself), folds constants and renames values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx
from onnxscript import ir

from calmclip.export import light
from calmclip.export.matching.values import new_value_like, remove_dead, replace_value


@dataclass(frozen=True)
class Outcome:
    """One run of a rule over a graph: how often it fired, and its near misses (node or graph -> reason)."""

    fired: int
    missed: Mapping[str, str]


@dataclass(frozen=True)
class Match:
    """A pattern in the graph, and its replacement.

    ``insert`` gets a new value for each of the ``replaced`` values and inserts the nodes that produce them. The
    consumers of the replaced values then read the new ones, and nodes without a consumer are removed.
    """

    replaced: tuple[ir.Value, ...]
    insert: Callable[..., object]


def in_ir(model: onnx.ModelProto) -> ir.Model:
    """A copy of ``model`` for rules: without its big weights, and with all types and shapes that can be inferred, which
    rules need and a graph need not state."""
    bare = light.lighten(model)
    del bare.graph.value_info[:]
    bare.graph.value_info.extend(light.shapes(model))
    return ir.from_proto(bare)


def at_each_node(match: Callable[[ir.Node], Match | str | None]) -> Callable[[ir.Model, object], Outcome]:
    """-> a rewrite that offers every node of the main graph to ``match`` and applies the matches.

    ``match`` returns None if the node does not start the pattern, and the reason if the pattern is there but the
    operator cannot stand for it.
    """

    def rewrite(model: ir.Model, params: object) -> Outcome:
        fired, missed = 0, {}
        for node in list(model.graph):
            if node.graph is None:  # an earlier match removed it
                continue
            result = match(node)
            if isinstance(result, Match):
                _apply(result)
                fired += 1
            elif result is not None:
                missed[node.name or f"the {node.op_type} that makes {node.outputs[0].name}"] = result
        return Outcome(fired, missed)

    return rewrite


def _apply(match: Match) -> None:
    new_values = [new_value_like(value) for value in match.replaced]
    match.insert(*new_values)
    for old, new in zip(match.replaced, new_values, strict=True):
        replace_value(old, new)
    remove_dead([value.producer() for value in match.replaced])
