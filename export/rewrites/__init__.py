"""FAMILY rewrites: a graph of standard ops -> the same graph with our ops in it, and the reasons for near misses.

A rule that *swaps* finds a pattern of standard ops and replaces it by one op of ours; the inputs and outputs of the
graph stay. A rule that *attaches* puts an op at an end of the graph, so its inputs or outputs change; it runs only if
a net or a recipe asks for it.

Only the main graph is rewritten: the functions are the bodies of our own ops.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import onnx
from onnxscript import ir

from calmclip.export import light
from calmclip.export.functions import BODIES
from calmclip.export.matching import Outcome, in_ir
from calmclip.models.bundle.manifest import FrozenModel, Tensor, fits
from calmclip.models.errors import ExportError
from calmclip.models.ops.spec import DOMAIN, SOFTMAX, VERSION, Op
from calmclip.models.registry import Registry

P = TypeVar("P", bound=FrozenModel)
DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "uint8": ir.DataType.UINT8}
_ROUNDS = 10  # of all rules; the rules need one, and a rule must not make work for itself without end


class NoParams(FrozenModel):
    pass


@dataclass(frozen=True)
class Rewrite(Generic[P]):
    """``rewrite(model, params)`` changes ``model`` in place, wherever the rule fits; -> `Outcome`.

    ``op``: the op that it inserts, with a body for ``attributes(params)``. ``replaces``: how many nodes one op stands
    for; if two rules fit the same node, the rule that replaces more goes first. ``includes``: ops of ours that the
    inserted op includes.
    """

    op: Op
    rewrite: Callable[[ir.Model, P], Outcome]
    replaces: int
    attaches: bool = False
    includes: tuple[Op, ...] = ()
    params: type[P] = NoParams  # type: ignore[assignment]
    attributes: Callable[[P], Mapping[str, Any]] = lambda params: {}

    def function(self, params: P) -> onnx.FunctionProto:
        """The op's body in standard ops."""
        return BODIES[self.op.name](**{**self.op.attributes, **self.attributes(params)})


REWRITES: Registry[Rewrite[Any]] = Registry("rewrites", "calmclip.export.rewrites")


@dataclass(frozen=True)
class Applied:
    """``counts``: rule -> how often it fired. ``missed``: rule -> near miss -> reason; another rule may have fired
    there since."""

    model: onnx.ModelProto
    counts: Mapping[str, int]
    missed: Mapping[str, Mapping[str, str]]

    def ops(self) -> dict[str, int]:
        """Op of ours -> its nodes in the graph."""
        return dict(Counter(node.op_type for node in self.model.graph.node if node.domain == DOMAIN))


def swaps() -> tuple[str, ...]:
    """The rules that leave a graph's inputs and outputs alone; a recipe uses all of them unless it says otherwise."""
    return tuple(name for name in REWRITES.names() if not REWRITES.get(name).attaches)


def apply(
    model: onnx.ModelProto, rules: Iterable[str], params: Mapping[str, Mapping[str, Any]] | None = None
) -> Applied:
    """Rewrite until no rule fires; ``params``: rule -> its params. ``model`` itself stays as it is.

    Each inserted op gets its local function (once) and its domain's opset import. A model with an older opset than the
    function is a near miss, because a model has one opset for all its nodes.
    Raises `ExportError` if the rules make work for each other without end.
    """
    chosen = {name: REWRITES.get(name) for name in rules}
    settings = {name: rule.params.model_validate((params or {}).get(name, {})) for name, rule in chosen.items()}
    bodies = {name: rule.function(settings[name]) for name, rule in chosen.items()}
    missed = _too_old(model, bodies)
    fitting = sorted(chosen.keys() - missed.keys())
    order = sorted(fitting, key=lambda name: (chosen[name].attaches, -chosen[name].replaces))
    rewritten = in_ir(model)
    counts = dict.fromkeys(chosen, 0)
    for _ in range(_ROUNDS):
        fired = 0
        for name in order:
            if chosen[name].attaches and counts[name]:
                continue  # it attaches once
            outcome = chosen[name].rewrite(rewritten, settings[name])
            counts[name] += outcome.fired
            missed.setdefault(name, outcome.missed)  # of the first round: another rule may fire there later
            fired += outcome.fired
        if not fired:
            break
    else:
        raise ExportError(f"the rewrites {', '.join(order)} still fire after {_ROUNDS} rounds; one undoes another")
    if not any(counts.values()):
        return Applied(model, counts, {name: reasons for name, reasons in missed.items() if reasons})
    _make_names_unique(rewritten.graph)
    bare = ir.to_proto(rewritten)
    _prune(bare.graph)
    changed = light.fill(bare, model)
    stated = {value.name for value in model.graph.value_info}
    infos = [value for value in changed.graph.value_info if value.name in stated]
    del changed.graph.value_info[:]
    changed.graph.value_info.extend(infos)
    _add_functions(changed, [bodies[name] for name in order if counts[name]])
    return Applied(changed, counts, {name: reasons for name, reasons in missed.items() if reasons})


def require(applied: Applied, promises: Mapping[str, int], what: str) -> None:
    """Raises `ExportError` if the graph ``what`` has fewer of an op than its net promises; it lists the near misses,
    and names settings that export the net all the same.

    A promise is checked only if all rules that insert the op were applied.
    """
    counts, rules = applied.ops(), {name: REWRITES.get(name) for name in REWRITES.names()}
    for op, promised in promises.items():
        makers = [name for name, rule in rules.items() if rule.op.name == op]
        larger = [name for name, rule in rules.items() if op in [part.name for part in rule.includes]]
        count = sum(counts.get(name, 0) for name in {op, *(rules[name].op.name for name in larger)})
        if not applied.counts.keys() >= {*makers} or count >= promised:
            continue
        tried = (*makers, *larger)
        misses = [f"{rule} at {node}: {why}" for rule in tried for node, why in applied.missed.get(rule, {}).items()]
        raise ExportError(
            f"{what}: the net promises {promised} x {op}, the rewrites made {count}. "
            + ("; ".join(misses) or "Nothing else in the graph looks like it")
            + f". Teach a rule in export/rewrites the new form{_way_out(makers)}."
        )


def _way_out(makers: Collection[str]) -> str:
    """The settings of a recipe that export the net without the op that ``makers`` insert; "" if there are none."""
    if not {*makers} & {*swaps()}:
        return ""
    others = [name for name in swaps() if name not in makers]
    setting = f", or do without it, at the cost of speed: rewrites = {json.dumps(others)} in the recipe"
    if any(REWRITES.get(name).op == SOFTMAX for name in makers):
        setting += '; if the INT8 graph alone is at fault, attention = "never" in its [quantize.ROLE.params]'
    return setting


def tensor_names(graph: ir.Graph) -> set[str | None]:
    """Names of node outputs and initializers; a new input or output needs another name."""
    return {value.name for node in graph for value in node.outputs} | graph.initializers.keys()


def mismatch(value: ir.Value, expected: Tensor) -> str:
    """How the dtype or the shape of ``value`` differs from ``expected``; "" if it does not."""
    sides = () if value.shape is None else tuple(side if isinstance(side, int) else str(side) for side in value.shape)
    if value.shape is not None and value.dtype == DTYPES[expected.dtype] and fits(sides, expected.shape):
        return ""
    return f"{value.name} is {value.dtype} {list(sides)}; expected {expected.dtype} {list(expected.shape)}"


def _too_old(model: onnx.ModelProto, bodies: Mapping[str, onnx.FunctionProto]) -> dict[str, Mapping[str, str]]:
    """Rule -> reason, for the rules whose op has a body of a later opset than ``model``."""
    opset = _standard_opset(model)
    return {
        name: {"the graph": f"it is of opset {opset}; the body of the op needs {_standard_opset(body)}"}
        for name, body in bodies.items()
        if opset < _standard_opset(body)
    }


def _standard_opset(proto: onnx.ModelProto | onnx.FunctionProto) -> int:
    return max((opset.version for opset in proto.opset_import if opset.domain in ("", "ai.onnx")), default=0)


def _make_names_unique(graph: ir.Graph) -> None:
    """Rules name new values and nodes after old ones, and two of them may derive from the same old one."""
    ends = {*graph.inputs, *graph.outputs}
    values = [value for node in graph for value in node.outputs if value not in ends]
    for items, taken in ((values, {*graph.initializers, *(end.name for end in ends)}), (list(graph), set())):
        for item in (item for item in items if item.name):
            name, number = item.name, 1
            while item.name in taken:
                item.name, number = f"{name}_{number}", number + 1
            taken.add(item.name)


def _prune(graph: onnx.GraphProto) -> None:
    """Remove the initializers that no node reads, except the defaults of inputs."""
    read = _names_read(graph) | {value.name for value in graph.input}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in read:
            del graph.initializer[place]


def _names_read(graph: onnx.GraphProto) -> set[str]:
    """The names that nodes and outputs read, also those of subgraphs."""
    names = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    subgraphs = (a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    return names.union(*map(_names_read, subgraphs))


def _add_functions(model: onnx.ModelProto, functions: Iterable[onnx.FunctionProto]) -> None:
    """Add each function whose op the graph has, once, and the opset imports it needs.

    Bodies are written for an older opset than graphs are traced to. The checker requires one opset for all, and later
    versions of the ops in the bodies only add types.
    """
    imports = {opset.domain: opset.version for opset in model.opset_import}
    present = {(function.domain, function.name) for function in model.functions}
    used = {(node.domain, node.op_type) for node in model.graph.node}
    for function in functions:
        if (function.domain, function.name) in present or (function.domain, function.name) not in used:
            continue
        present.add((function.domain, function.name))
        copy = model.functions.add()
        copy.CopyFrom(function)
        _trim_outputs(model, copy)
        for opset in copy.opset_import:
            opset.version = max(opset.version, imports.get(opset.domain, 0))
        if function.domain not in imports:
            imports[function.domain] = VERSION
            model.opset_import.append(onnx.helper.make_opsetid(function.domain, VERSION))


def _trim_outputs(model: onnx.ModelProto, function: onnx.FunctionProto) -> None:
    """The function gets as many outputs as the nodes use, and every node names all of them.

    ONNX Runtime infers no types for a node with fewer outputs than its function. An output that no node reads costs
    the op time; a missing output costs none.
    """
    nodes = [n for n in model.graph.node if (n.domain, n.op_type) == (function.domain, function.name)]
    count = max(place for node in nodes for place, name in enumerate(node.output, 1) if name)
    del function.output[count:]
    for node in nodes:
        names = [*node.output, *[""] * count][:count]
        pairs = zip(names, function.output, strict=True)
        node.output[:] = [name or f"{node.output[0]}_{default}" for name, default in pairs]
