"""FAMILY rewrites: a graph of standard ops -> the same graph with our ops in it, and why not where it is not.

A rule that *swaps* finds a pattern of standard ops and puts one op of ours in its place; what the graph takes and
answers stays. A rule that *attaches* puts an op at an end of the graph, so inputs or outputs change; it runs only
where a net or a recipe asks for it.

Only the main graph is rewritten: the functions are the bodies of our own ops.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import onnx
from onnxscript import ir

from calmclip.export import light
from calmclip.models.bundle.manifest import FrozenModel
from calmclip.models.errors import ExportError
from calmclip.models.ops.spec import DOMAIN, VERSION, Op
from calmclip.models.registry import Registry

P = TypeVar("P", bound=FrozenModel)
_ROUNDS = 10  # of all rules; one is enough for those there are, and no rule may make work for itself for ever


@dataclass(frozen=True)
class Outcome:
    """One run over a graph: how often the rule fired, and where (node or graph: why) it nearly did."""

    fired: int
    missed: Mapping[str, str]


class NoParams(FrozenModel):
    pass


@dataclass(frozen=True)
class Rewrite(Generic[P]):
    """``rewrite(model, params)`` changes ``model`` in place, wherever the rule fits; -> `Outcome`.

    ``op``: what it puts in; ``function(params)``: that op's body in standard ops. ``replaces``: how many nodes one op
    takes the place of; of two rules that fit the same node the one that replaces more goes first. ``holds``: ops of
    ours that are part of what it does.
    """

    op: Op
    function: Callable[[P], onnx.FunctionProto]
    rewrite: Callable[[ir.Model, P], Outcome]
    replaces: int
    attaches: bool = False
    holds: tuple[Op, ...] = ()
    params: type[P] = NoParams  # type: ignore[assignment]


REWRITES: Registry[Rewrite[Any]] = Registry("rewrites", "calmclip.export.rewrites")


@dataclass(frozen=True)
class Applied:
    """``counts``: rule -> how often it fired. ``missed``: rule -> where it nearly fired -> why it did not, though
    another rule may have done so there since."""

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
    """Rewrite until no rule fires any more; ``params``: rule -> its params. ``model`` itself stays as it is.

    Each op that was put in gets its local function (once) and its domain's opset import. A model older than the
    function is missed: it has one opset for all.
    Raises `ExportError` when the rules make work for each other without end.
    """
    chosen = {name: REWRITES.get(name) for name in rules}
    given = {name: rule.params.model_validate((params or {}).get(name, {})) for name, rule in chosen.items()}
    bodies = {name: rule.function(given[name]) for name, rule in chosen.items()}
    missed = _too_old(model, bodies)
    fitting = sorted(chosen.keys() - missed.keys())
    order = sorted(fitting, key=lambda name: (chosen[name].attaches, -chosen[name].replaces))
    # without big weights; with the types of what lies inside, which a rule asks for and a graph need not state
    bare = light.lighten(model)
    del bare.graph.value_info[:]
    bare.graph.value_info.extend(light.shapes(model))
    whole = ir.from_proto(bare)
    counts = dict.fromkeys(chosen, 0)
    for _ in range(_ROUNDS):
        fired = 0
        for name in order:
            if chosen[name].attaches and counts[name]:
                continue  # once is what was asked for
            found = chosen[name].rewrite(whole, given[name])
            counts[name] += found.fired
            missed.setdefault(name, found.missed)  # of the first round: later the place may be another rule's
            fired += found.fired
        if not fired:
            break
    else:
        raise ExportError(f"the rewrites {', '.join(order)} still fire after {_ROUNDS} rounds; one undoes another")
    if not any(counts.values()):
        return Applied(model, counts, {name: where for name, where in missed.items() if where})
    _distinct(whole.graph)
    bare = ir.to_proto(whole)
    _prune(bare.graph)
    changed = light.fill(bare, model)
    stated = {value.name for value in model.graph.value_info}
    kept = [value for value in changed.graph.value_info if value.name in stated]
    del changed.graph.value_info[:]
    changed.graph.value_info.extend(kept)
    _complete(changed, [bodies[name] for name in order if counts[name]])
    return Applied(changed, counts, {name: where for name, where in missed.items() if where})


def require(applied: Applied, promises: Mapping[str, int], what: str) -> None:
    """Raises `ExportError` where a graph holds fewer of an op than its net promises: which places are left, and why.

    A promise counts where all rules that could keep it were applied.
    """
    made = applied.ops()
    for op, promised in promises.items():
        rules = [name for name in REWRITES.names() if REWRITES.get(name).op.name == op]
        every = [REWRITES.get(name) for name in REWRITES.names()]
        held = {one.op.name for one in every if op in [inner.name for inner in one.holds]}
        found = sum(made.get(name, 0) for name in {op, *held})
        if not applied.counts.keys() >= {*rules} or found >= promised:
            continue
        left = [f"{rule} at {where}: {why}" for rule in rules for where, why in applied.missed.get(rule, {}).items()]
        raise ExportError(
            f"{what}: the net promises {promised} x {op}, the rewrites made {found}. "
            + ("; ".join(left) or "Nothing else in the graph looks like it")
            + ". A rule in export/rewrites must learn the new form, or `rewrites` in the recipe leave it out."
        )


def inner(graph: ir.Graph) -> set[str | None]:
    """Names of what nodes make and initializers hold; a new input or output can have none of them."""
    return {value.name for node in graph for value in node.outputs} | graph.initializers.keys()


def _too_old(model: onnx.ModelProto, bodies: Mapping[str, onnx.FunctionProto]) -> dict[str, Mapping[str, str]]:
    """Rule -> why not, for those whose op has a body of a later opset than ``model``."""
    found = _standard(model)
    return {
        name: {"the graph": f"it is of opset {found}; the body of the op needs {_standard(body)}"}
        for name, body in bodies.items()
        if found < _standard(body)
    }


def _standard(thing: onnx.ModelProto | onnx.FunctionProto) -> int:
    return max((opset.version for opset in thing.opset_import if opset.domain in ("", "ai.onnx")), default=0)


def _distinct(graph: ir.Graph) -> None:
    """A name for each value and node: rules call new ones after old ones, which several of them may read."""
    ends = {*graph.inputs, *graph.outputs}
    values = [value for node in graph for value in node.outputs if value not in ends]
    for things, taken in ((values, {*graph.initializers, *(end.name for end in ends)}), (list(graph), set())):
        for thing in (thing for thing in things if thing.name):
            name, number = thing.name, 1
            while thing.name in taken:
                thing.name, number = f"{name}_{number}", number + 1
            taken.add(thing.name)


def _prune(graph: onnx.GraphProto) -> None:
    """Drop the constants that nobody reads any more, and no input's default."""
    read = _read(graph) | {value.name for value in graph.input}
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in read:
            del graph.initializer[place]


def _read(graph: onnx.GraphProto) -> set[str]:
    """What its nodes and outputs name, those of graphs within it too."""
    found = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    inner = (a for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    return found.union(*(_read(attribute.g) for attribute in inner))


def _complete(model: onnx.ModelProto, functions: Iterable[onnx.FunctionProto]) -> None:
    """Add ``functions``, each once where the graph has its op, and what they import.

    Their bodies are written for an older opset than graphs are traced to. The checker wants one for all, and later
    versions of what they use only add types.
    """
    imports = {opset.domain: opset.version for opset in model.opset_import}
    there = {(function.domain, function.name) for function in model.functions}
    used = {(node.domain, node.op_type) for node in model.graph.node}
    for function in functions:
        if (function.domain, function.name) in there or (function.domain, function.name) not in used:
            continue
        there.add((function.domain, function.name))
        copy = model.functions.add()
        copy.CopyFrom(function)
        _narrow(model, copy)
        for opset in copy.opset_import:
            opset.version = max(opset.version, imports.get(opset.domain, 0))
        if function.domain not in imports:
            imports[function.domain] = VERSION
            model.opset_import.append(onnx.helper.make_opsetid(function.domain, VERSION))


def _narrow(model: onnx.ModelProto, function: onnx.FunctionProto) -> None:
    """As many outputs as the widest node asks for, and all of them named in each: where a node has fewer than its
    function, ONNX Runtime infers no types. What nobody reads costs the op's time; what is not there costs none."""
    nodes = [n for n in model.graph.node if (n.domain, n.op_type) == (function.domain, function.name)]
    widest = max(place for node in nodes for place, name in enumerate(node.output, 1) if name)
    del function.output[widest:]
    for node in nodes:
        asked = [*node.output, *[""] * widest][:widest]
        names = zip(asked, function.output, strict=True)
        node.output[:] = [name or f"{node.output[0]}_{own}" for name, own in names]
